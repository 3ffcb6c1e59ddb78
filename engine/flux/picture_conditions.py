"""Pictures that a prompt comes with, as ComfyUI's Flux takes them.

Fill, depth and canny models see one as further channels of the painted picture's tokens, Kontext
sees references as tokens that follow them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..latents import to_model_space
from ..sizes import CHANNELS, PATCH, PIXELS_PER_LATENT
from .geometry import FluxGeometry

PLACINGS = ("offset", "index", "uxo")


@dataclass(frozen=True)
class Place:
    """Where RoPE sees the tokens of a picture: its index, its first row and column, its size."""

    index: int
    top: int
    left: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class PictureConditions:
    """Float32 on the CPU, latents in model space.

    image: [n, 16, h, w] of any size, and mask: [m, 1, rows, columns], 1 where it is to be painted,
    for models that take them as further channels; references: each [n, 16, h, w]; placing: of the
    references, one of PLACINGS.
    """

    image: Tensor | None = None
    mask: Tensor | None = None
    references: tuple[Tensor, ...] = ()
    placing: str = PLACINGS[0]

    def __bool__(self) -> bool:
        """Whether there is any."""
        return self.has_image or bool(self.references)

    @property
    def has_image(self) -> bool:
        """Something for further channels; what is missing of it has a value that says nothing."""
        return self.image is not None or self.mask is not None

    @property
    def reference_tokens(self) -> int:
        places = self.places(0, 0)  # they take as many anywhere
        return sum(place.tokens for place in places)

    def places(self, height: int, width: int) -> Iterator[Place]:
        """Of the references, beside a painted picture of so many latents.

        offset: under or beside each other, where that makes the smaller picture; index: on one
        another; uxo: along the diagonal, from the lower right corner of the painted one.
        """
        down, right = (height, width) if self.placing == "uxo" else (0, 0)  # of what is there
        for number, reference in enumerate(self.references, start=1):
            rows, columns = reference.shape[2:]
            index, top, left = {"index": number, "uxo": 0}.get(self.placing, 1), 0, 0
            if self.placing == "uxo":
                top, left = down, right
            elif self.placing == "offset" and down + rows > right + columns:
                left = right
            elif self.placing == "offset":
                top = down
            down, right = max(down, top + rows), max(right, left + columns)
            yield Place(index, *(-(-side // PATCH) for side in (top, left, rows, columns)))


NO_PICTURES = PictureConditions()


@dataclass(frozen=True)
class PictureTokens:
    """What the transformer is given of them, for each picture of the batch.

    beside: [image tokens, channels], which follow those of the latents; references: each
    [tokens, 64]; places: of the references.
    """

    beside: Sequence[Sequence[Tensor]]
    references: Sequence[Sequence[Tensor]]
    places: tuple[Place, ...]

    def parts(self, number: int, painted: Tensor) -> list[Tensor]:
        """Of one picture: the tokens of what is painted, with what lies beside, and references."""
        beside = self.beside[number]
        first = torch.cat([painted, *beside], dim=-1) if beside else painted
        return [first, *self.references[number]]


def picture_tokens(
    given: PictureConditions,
    geometry: FluxGeometry,
    shape: Sequence[int],
    noise_mask: Tensor | None,
    on_device: Callable[[Tensor], Tensor],
) -> PictureTokens:
    """shape: of the latents to paint; noise_mask: [batch, 1, h, w], for fill models that are given
    no other; on_device: puts a tensor where the transformer wants it."""
    batch, _, height, width = shape
    channels = map(on_device, _channels(given, geometry, (height, width), noise_mask))
    spread = [[x[which] for which in _spread(len(x), batch)] for x in channels]
    references = [on_device(patches(_whole(x[:batch]))) for x in given.references]
    return PictureTokens(
        [[x[number] for x in spread] for number in range(batch)],
        [[x[number % len(x)] for x in references] for number in range(batch)],
        tuple(given.places(height, width)),
    )


def _channels(
    given: PictureConditions, geometry: FluxGeometry, size: tuple[int, int], mask: Tensor | None
) -> Iterator[Tensor]:
    """[n, image tokens, channels] of the picture, and of the mask in 8x8 pixels a latent.

    Without a picture it is one of zeros in the VAE's space, without a mask all is to be painted.
    """
    if geometry.takes_picture:
        image = given.image
        if image is None:
            image = to_model_space(torch.zeros(1, CHANNELS, *size, dtype=torch.float32))
        yield patches(_fitted(image, *size))
    if geometry.takes_mask:
        mask = mask if given.mask is None else given.mask
        if mask is None:
            mask = torch.ones(1, 1, *size, dtype=torch.float32)
        pixels = _fitted(mask, *(PIXELS_PER_LATENT * side for side in size))
        yield patches(F.pixel_unshuffle(pixels, PIXELS_PER_LATENT))


def patches(values: Tensor) -> Tensor:
    """[n, channels, h, w] as tokens of 2x2."""
    return F.pixel_unshuffle(values, PATCH).flatten(2).transpose(1, 2)


def _whole(latents: Tensor) -> Tensor:
    """With sides that tokens fill: the first row or column follows the last again."""
    rows, columns = (side % PATCH for side in latents.shape[2:])
    return F.pad(latents, (0, columns, 0, rows), mode="circular")


def _fitted(values: Tensor, height: int, width: int) -> Tensor:
    """The middle of [n, channels, h, w] in the proportions that are wanted, scaled."""
    return F.interpolate(middle(values, height, width), (height, width), mode="bilinear")


def middle(values: Tensor, height: int, width: int) -> Tensor:
    """The middle of [n, channels, h, w] in the proportions of this size, as a view.

    As ComfyUI's `common_upscale` crops.
    """
    rows, columns = values.shape[2:]
    found, wanted = columns / rows, width / height
    top, left = 0, 0
    if found > wanted:
        left = min(round((columns - columns * (wanted / found)) / 2), (columns - 1) // 2)
    elif found < wanted:
        top = min(round((rows - rows * (found / wanted)) / 2), (rows - 1) // 2)
    return values[..., top : rows - top, left : columns - left]


def _spread(count: int, batch: int) -> list[int]:
    """Which of so many each picture of a batch gets, as by ComfyUI's `resize_to_batch_size`."""
    if batch == 1:
        return [0]
    if batch < count:
        apart = (count - 1) / (batch - 1)
        return [round(number * apart) for number in range(batch)]
    apart = count / batch
    return [math.floor((number + 0.5) * apart) for number in range(batch)]
