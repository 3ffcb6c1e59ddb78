"""What all stages of a training share."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .learner import bfloat16_on_a_card, log
from .models import LittleFlux
from .settings import Settings
from .supply import Gallery, Supply, as_float
from .thin_vae import ThinVAE
from .vocabulary import T5_LENGTH, Words


@dataclass(frozen=True)
class Workshop:
    """Where a training takes place: its folder, the device, the pictures that are being drawn."""

    folder: Path
    settings: Settings
    supply: Supply

    @cached_property
    def device(self) -> torch.device:
        return torch.device(self.settings.device)

    @cached_property
    def words(self) -> Words:
        return Words(self.folder)

    def vae(self) -> ThinVAE:
        """The finished one, ready to encode and decode."""
        return ThinVAE().load(load_file(self.folder / "vae.safetensors")).to(self.device)

    def flux(self, tensors: dict[str, Tensor] | None = None) -> LittleFlux:
        """A new model with these weights or, as it begins, with random ones."""
        model = LittleFlux(self.settings.geometry).to(self.device)
        if tensors is not None:
            model.load_state_dict(tensors)
        return model

    def flux_of(self, result: str) -> LittleFlux:
        return self.flux(load_file(self.folder / result))

    @cached_property
    def latents(self) -> Gallery:
        """Of all that is drawn so far, by the finished VAE."""
        vae = self.vae()
        gallery = Gallery(self.supply, self.device, lambda pictures: (encoded(vae, pictures),))
        gallery.refill_all()
        log(f"{gallery.have} pictures are encoded")
        return gallery

    @cached_property
    def empty_ids(self) -> tuple[Tensor, Tensor]:
        """Of an empty prompt, for both encoders."""
        t5_ids, clip_ids = (
            torch.tensor(ids, device=self.device) for ids in self.words("", T5_LENGTH)
        )
        return t5_ids, clip_ids


@torch.no_grad()
def encoded(vae: ThinVAE, pictures: Tensor) -> Tensor:
    """uint8 [n, height, width, 3] -> latents in model space, bfloat16."""
    with bfloat16_on_a_card(pictures.device):
        return vae.encode(as_float(pictures)).to(torch.bfloat16)
