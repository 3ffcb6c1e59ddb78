"""A ControlNet of the little transformer, under Diffusers' names as FLUX.1's Union-Pro 2.0.

It has one double block, whose output is added after each of the transformer's: with more of them
programs do not agree which goes where in a transformer as small as ours.
"""

from copy import deepcopy

from torch import Tensor, nn

from ...engine.sizes import OF_LATENTS
from ...loaders.diffusers_names import FLUX_DOUBLE, FLUX_ROOT
from .dit import DiT, linear, patches
from .models import LittleFlux

BLOCKS = 1


class ControlNet(nn.Module):
    """It begins as the transformer's own first block, with nothing to add to it."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        hidden, device = dit.img_in.out_features, dit.img_in.weight.device
        self.dit = deepcopy(dit)
        del self.dit.single_blocks, self.dit.final_layer, self.dit.double_blocks[BLOCKS:]
        self.controlnet_x_embedder = linear(OF_LATENTS, hidden, zero=True).to(device)
        self.controlnet_blocks = nn.ModuleList([linear(hidden, hidden, zero=True).to(device)])

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        text: Tensor,
        pooled: Tensor,
        guidance: Tensor,
        edges: Tensor,
    ) -> Tensor:
        """[B, N, W]; edges: latents of a picture that is as large."""
        dit, words = self.dit, text.shape[1]
        rope = dit.rope(words, [latents.shape[2:]], latents.device)
        condition = dit.condition(sigma, pooled, guidance)
        img = dit.img_in(patches(latents)) + self.controlnet_x_embedder(patches(edges))
        txt = dit.txt_in(text)
        for block in dit.double_blocks:
            img, txt = block(img, txt, condition, rope[:, words:], rope[:, :words])
        return self.controlnet_blocks[0](img)

    def tensors(self) -> dict[str, Tensor]:
        """Under Diffusers' names."""
        found = {}
        for name, tensor in self.state_dict().items():
            module, _, kind = name.removeprefix("dit.").rpartition(".")
            theirs = _theirs(module)
            for part, rows in zip(theirs, tensor.chunk(len(theirs)), strict=True):
                found[f"{part}.{'weight' if kind == 'scale' else kind}"] = rows
        return found


class Controlled(nn.Module):
    """A transformer that stays as it is, and the net that tells it where edges are."""

    def __init__(self, flux: LittleFlux, net: ControlNet) -> None:
        super().__init__()
        self.flux, self.net = flux, net

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        t5_ids: Tensor,
        clip_ids: Tensor,
        guidance: Tensor,
        edges: Tensor,
    ) -> Tensor:
        """As LittleFlux."""
        text, pooled = self.flux.t5(t5_ids), self.flux.clip(clip_ids)
        given = (latents, sigma, text, pooled, guidance)
        return self.flux.dit(*given, control=self.net(*given, edges))


def _theirs(module: str) -> list[str]:
    """Diffusers' modules whose rows make this one."""
    if module.startswith("double_blocks."):
        _, index, rest = module.split(".", 2)
        return [f"transformer_blocks.{index}.{name}" for name in FLUX_DOUBLE[rest]]
    return FLUX_ROOT.get(module, [module])
