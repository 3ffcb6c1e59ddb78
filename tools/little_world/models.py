"""The models of the little world as they are trained: transformer and text encoders together."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ...engine.flux.geometry import ClipGeometry, FluxGeometry, T5Geometry
from .dit import DiT
from .text_models import T5, Clip
from .vocabulary import CLIP_ROWS, T5_ROWS


@dataclass(frozen=True)
class Geometry:
    """Sizes of the trained models but the VAE, which has one size."""

    clip: ClipGeometry
    t5: T5Geometry
    hidden: int
    double_blocks: int
    single_blocks: int

    @property
    def dit(self) -> FluxGeometry:
        return FluxGeometry(
            hidden=self.hidden,
            double_blocks=self.double_blocks,
            single_blocks=self.single_blocks,
            text_width=self.t5.width,
            pooled_width=self.clip.width,
        )


TRAINED = Geometry(
    clip=ClipGeometry(width=128, mlp_width=256, layers=2, vocabulary=CLIP_ROWS),
    t5=T5Geometry(width=192, mlp_width=256, layers=2, heads=3, vocabulary=T5_ROWS),
    hidden=256,
    double_blocks=2,
    single_blocks=6,
)
TOY = Geometry(
    clip=ClipGeometry(width=64, mlp_width=64, layers=1, vocabulary=CLIP_ROWS),
    t5=T5Geometry(width=64, mlp_width=64, layers=1, heads=1, vocabulary=T5_ROWS),
    hidden=128,
    double_blocks=1,
    single_blocks=1,
)


class LittleFlux(nn.Module):
    """`dit`, `t5` and `clip`: the first parts of the names in the file that ships."""

    def __init__(self, geometry: Geometry = TRAINED) -> None:
        super().__init__()
        self.geometry = geometry
        self.dit, self.t5, self.clip = DiT(geometry.dit), T5(geometry.t5), Clip(geometry.clip)

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        t5_ids: Tensor,
        clip_ids: Tensor,
        guidance: Tensor,
        **conditions: Tensor,
    ) -> Tensor:
        """Velocity [B, 16, h, w] of latents in model space; sigma, guidance: [B].

        conditions: those of `DiT` that are made of pictures, for a transformer that knows them.
        """
        text, pooled = self.t5(t5_ids), self.clip(clip_ids)
        return self.dit(latents, sigma, text, pooled, guidance, **conditions)

    def blocks(self) -> Iterator[nn.Module]:
        """All layers that there are several of."""
        yield from self.dit.double_blocks
        yield from self.dit.single_blocks
        yield from self.t5.encoder.block
        yield from self.clip.text_model.encoder.layers
