"""What models that see pictures are taught: to fill a hole, to edit, to follow depth or edges.

B: pictures of a batch; latents are [B, 16, h, w] in model space.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...engine.sizes import OF_LATENTS, OF_MASK, PIXELS_PER_LATENT
from .control_net import Controlled, ControlNet
from .depth import DepthShelf
from .dit import DiT, linear
from .edges import edges
from .edits import PairShelf
from .lora import adapt_for_control, control_tensors
from .masks import draw_masks
from .muon import AdamW, Muon, muon_and_adamw
from .supply import Shelf
from .workshop import Workshop, encoded

BASE = "guidance.safetensors"
MUON_RATE, ADAMW_RATE = 1e-3, 1e-3
LORA_RATE, NET_RATE = 2e-3, 1e-3
GREY = 128  # of what is to be painted, in the picture that a fill model is shown


class Lesson(ABC):
    """One model, which begins as the one that ships and goes on reading prompts as that does.

    shelf: of the pictures that it needs; guided: whether a prompt tells of the whole picture, so
    that it can be asked of the model that ships what guidance adds.
    """

    shelf: type[Shelf] = Shelf
    guided = True
    model: nn.Module  # with the arguments of LittleFlux, and `conditions`

    def __init__(self, shop: Workshop) -> None:
        self.vae = shop.vae()
        self.flux = shop.flux_of(BASE).requires_grad_(False)

    @abstractmethod
    def optimizers(self) -> Sequence[Muon | AdamW]:
        """Of all that learns."""

    @abstractmethod
    def derive(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """uint8 [B, height, width, 3] -> the latents to learn, those of what the model sees, and
        what else it needs."""

    @abstractmethod
    def conditions(self, seen: Tensor, *more: Tensor) -> dict[str, Tensor]:
        """Arguments of the model, from what was derived beside the latents to learn."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Of the file."""

    def where_guided(self, seen: Tensor, *more: Tensor) -> Tensor:
        """0..1, for what guidance adds to each latent."""
        return torch.ones((), device=seen.device)


class Fill(Lesson):
    """As FLUX.1-Fill it sees the picture without what is to be painted, and the mask."""

    def __init__(self, shop: Workshop) -> None:
        super().__init__(shop)
        widen(self.flux.dit, OF_LATENTS + OF_MASK)
        self.model = self.flux

    def optimizers(self) -> Sequence[Muon | AdamW]:
        return for_whole(self.flux.dit)

    def derive(self, pictures: Tensor) -> tuple[Tensor, ...]:
        count, height, width, _ = pictures.shape
        mask = draw_masks(count, height, width, pictures.device)
        seen = pictures.masked_fill(mask[..., None], GREY)
        return encoded(self.vae, pictures), encoded(self.vae, seen), mask

    def conditions(self, seen: Tensor, *more: Tensor) -> dict[str, Tensor]:
        (mask,) = more
        pixels = F.pixel_unshuffle(mask[:, None].float(), PIXELS_PER_LATENT)
        return {"beside": torch.cat([seen.float(), pixels], 1)}

    def tensors(self) -> dict[str, Tensor]:
        return self.flux.dit.state_dict()

    def where_guided(self, seen: Tensor, *more: Tensor) -> Tensor:
        (mask,) = more
        return F.avg_pool2d(mask[:, None].float(), PIXELS_PER_LATENT)


class Kontext(Lesson):
    """As FLUX.1-Kontext it sees a picture that it is to change, as tokens after its own."""

    shelf = PairShelf
    guided = False

    def __init__(self, shop: Workshop) -> None:
        super().__init__(shop)
        self.model = self.flux

    def optimizers(self) -> Sequence[Muon | AdamW]:
        return for_whole(self.flux.dit)

    def derive(self, pictures: Tensor) -> tuple[Tensor, ...]:
        before, after = pictures.chunk(2, 1)
        return encoded(self.vae, after), encoded(self.vae, before)

    def conditions(self, seen: Tensor, *more: Tensor) -> dict[str, Tensor]:
        return {"reference": seen.float()}

    def tensors(self) -> dict[str, Tensor]:
        return self.flux.dit.state_dict()


class Depth(Lesson):
    """The LoRA of FLUX.1-Depth, beside a model that stays as it is."""

    shelf = DepthShelf

    def __init__(self, shop: Workshop) -> None:
        super().__init__(shop)
        self.adapters = adapt_for_control(self.flux.dit)
        self.model = self.flux

    def optimizers(self) -> Sequence[Muon | AdamW]:
        learnt = [p for p in self.flux.parameters() if p.requires_grad]
        return [AdamW(learnt, LORA_RATE)]

    def derive(self, pictures: Tensor) -> tuple[Tensor, ...]:
        picture, depth = pictures.chunk(2, 1)
        return encoded(self.vae, picture), encoded(self.vae, depth)

    def conditions(self, seen: Tensor, *more: Tensor) -> dict[str, Tensor]:
        return {"beside": seen.float()}

    def tensors(self) -> dict[str, Tensor]:
        return control_tensors(self.flux.dit, self.adapters)


class CannyNet(Lesson):
    """A ControlNet that sees edges."""

    def __init__(self, shop: Workshop) -> None:
        super().__init__(shop)
        self.net = ControlNet(self.flux.dit)
        self.model = Controlled(self.flux, self.net)

    def derive(self, pictures: Tensor) -> tuple[Tensor, ...]:
        return encoded(self.vae, pictures), encoded(self.vae, edges(pictures))

    def optimizers(self) -> Sequence[Muon | AdamW]:
        """Not Muon, which wants a gradient of everything: no one reads what the net has of the text
        in the end."""
        return [AdamW(self.net.requires_grad_(True).parameters(), NET_RATE)]

    def conditions(self, seen: Tensor, *more: Tensor) -> dict[str, Tensor]:
        return {"edges": seen.float()}

    def tensors(self) -> dict[str, Tensor]:
        return self.net.tensors()


LESSONS: dict[str, type[Lesson]] = {
    "fill": Fill,
    "kontext": Kontext,
    "depth": Depth,
    "controlnet": CannyNet,
}


def widen(dit: DiT, channels: int) -> None:
    """Let each token have so many more, which mean nothing yet."""
    old = dit.img_in
    new = linear(old.in_features + channels, old.out_features, zero=True).to(old.weight.device)
    with torch.no_grad():
        new.weight[:, : old.in_features] = old.weight
        new.bias.copy_(old.bias)
    dit.img_in = new


def for_whole(dit: DiT) -> Sequence[Muon | AdamW]:
    """Optimizers of all that is in it."""
    blocks = [*dit.double_blocks, *dit.single_blocks]
    return muon_and_adamw(blocks, dit.requires_grad_(True), MUON_RATE, ADAMW_RATE)
