"""How large a training is."""

import os
from dataclasses import dataclass, field

from .models import TOY, TRAINED, Geometry
from .supply import Size

SHARES = (0.6, 0.2, 0.2)  # of the sizes, among the pictures


@dataclass(frozen=True)
class Settings:
    """The defaults are those of the models that ship."""

    seconds: float = 1300
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
    condition_batch: int = 128
    condition_pictures: int = 24_000  # or pairs of them
    condition_first: int = 2_000  # that are there before a kind begins
    save_every: float = 60.0  # seconds
    sheet_steps: int = 20

    @classmethod
    def quick(cls, seconds: float = 20) -> "Settings":
        """All stages at toy size, for a CPU."""
        return cls(
            seconds=seconds, device="cpu", workers=2, geometry=TOY,
            sizes=((64, 64), (80, 48), (48, 80)), pictures=40, first=12, crop=32,
            vae_batch=4, decoder_batch=2, batch=8, guidance_batch=4, style_batch=4,
            style_pictures=8, condition_batch=4, condition_pictures=8, condition_first=3,
            save_every=1.0, sheet_steps=2,
        )  # fmt: skip
