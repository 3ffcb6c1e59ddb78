"""How large a training is, and what all its stages share."""

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .models import TOY, TRAINED, Geometry, LittleFlux
from .supply import Size, Supply
from .thin_vae import ThinVAE
from .vocabulary import T5_LENGTH, Words

SHARES = (0.6, 0.2, 0.2)  # of the sizes, among the pictures


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the models that ship."""

    seconds: float = 1200
    device: str = "cuda"
    workers: int = field(default_factory=lambda: max(1, (os.cpu_count() or 2) - 3))
    geometry: Geometry = TRAINED
    sizes: tuple[Size, ...] = ((256, 256), (320, 192), (192, 320))
    pictures: int = 120_000  # drawn in all
    first: int = 20_000  # that are there before a stage begins
    crop: int = 128  # side of the pieces that the VAE learns from at first
    vae_batch: int = 128  # pieces
    decoder_batch: int = 12
    batch: int = 512  # of stage transformer
    guidance_batch: int = 256
    style_batch: int = 128
    style_pictures: int = 4096  # of each size
    save_every: float = 60.0  # seconds
    sheet_steps: int = 20

    @classmethod
    def quick(cls, seconds: float = 20) -> "Settings":
        """All stages at toy size, for a CPU."""
        return cls(
            seconds=seconds, device="cpu", workers=2, geometry=TOY,
            sizes=((64, 64), (80, 48), (48, 80)), pictures=40, first=12, crop=32,
            vae_batch=4, decoder_batch=2, batch=8, guidance_batch=4, style_batch=4,
            style_pictures=8, save_every=1.0, sheet_steps=2,
        )  # fmt: skip


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
    def empty_ids(self) -> tuple[Tensor, Tensor]:
        """Of an empty prompt, for both encoders."""
        t5_ids, clip_ids = (
            torch.tensor(ids, device=self.device) for ids in self.words("", T5_LENGTH)
        )
        return t5_ids, clip_ids
