"""Flux's autoencoder in bands of rows: the plain forward's result in a small part of its memory.

Feature maps wait in host memory, and the device sees one band of rows at a time, with the rows
beyond it that a 3x3 convolution looks at. Only the edge of the picture is padded and a norm
measures the whole map, so there are no seams. As far as there is memory, maps stay on the device
and a band is the whole map.

Maps are [1, channels, height, width] in channels-last order, in which a band of rows is one
contiguous piece that a single copy moves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .vae_band_plan import PARTS, BandPlan

BeforeBand = Callable[[], None]  # called before each band; may raise to stop there
MakeWay = Callable[[int], None]  # called before each band with the bytes that it will allocate
Affine = tuple[Tensor, Tensor]  # scale and shift of each channel, float32 [1, channels, 1, 1]
Make = Callable[[int, int], Tensor]  # the band that comes of rows first to last

META = torch.device("meta")
_GROUPS = 32  # of every norm


@torch.no_grad()
def decode(
    decoder: Any,
    latent: Tensor,
    bands: BandPlan,
    before_band: BeforeBand | None = None,
    make_way: MakeWay | None = None,
) -> Tensor:
    """`FluxVAEDecoder`'s forward: latent [1, 16, h, w] -> picture [1, 3, 8h, 8w] in host memory.

    The latent is on the decoder's device and in its dtype, which is also that of the picture.
    bands: of `plan_decode` for h, w. The picture is the same with any.
    """
    run = _Run(latent.device, latent.dtype, iter(bands.passes), before_band, make_way)
    x = _Map(latent / decoder.scaling_factor + decoder.shift_factor, True)
    picture = run.whole(decoder, x).values
    if latent.is_cuda:
        torch.cuda.current_stream(latent.device).synchronize()
    return picture


@torch.no_grad()
def encode(
    encoder: Any,
    picture: Tensor,
    bands: BandPlan,
    before_band: BeforeBand | None = None,
    make_way: MakeWay | None = None,
) -> Tensor:
    """`FluxVAEEncoder`'s forward: picture [1, 3, H, W] in -1..1 -> latent [1, 16, H/8, W/8].

    The picture may be in host memory and of any dtype; the latent is on the encoder's device and
    in its dtype. bands: of `plan_encode` for H, W. The latent is the same with any.
    """
    weight = encoder.conv_in.weight
    run = _Run(weight.device, weight.dtype, iter(bands.passes), before_band, make_way)
    picture = picture.to(weight.dtype, memory_format=torch.channels_last)
    x = _Map(picture, picture.device == weight.device)
    latent = run.whole(encoder, x).values[:, :16]
    return ((latent - encoder.shift_factor) * encoder.scaling_factor).contiguous()


def host_map(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a map that is not on `device`: pinned where that is CUDA and pins so much.

    For the meta device it is on the meta device too, as nothing can be copied from there.
    """
    options: dict[str, Any] = {"dtype": dtype, "memory_format": torch.channels_last}
    if device.type == "cuda":
        try:
            return torch.empty(shape, pin_memory=True, **options)
        except RuntimeError:
            pass  # copies to and from pageable memory wait, and are right all the same
    return torch.empty(shape, device=META if device == META else "cpu", **options)


@dataclass(frozen=True, eq=False)
class _Map:
    values: Tensor  # [1, channels, height, width]
    resident: bool  # on the device
    moments: list[Tensor] = field(default_factory=list)  # of its parts, see `_moments`


@dataclass
class _Run:
    """One pass over a map after another; `vae_plan` has walked the same way."""

    device: torch.device
    dtype: torch.dtype
    choices: Iterator[tuple[int, bool, int]]  # of a BandPlan
    before_band: BeforeBand | None
    make_way: MakeWay | None

    def whole(self, model: Any, x: _Map) -> _Map:
        steps = {
            "ResnetBlock": self.residual,
            "VAEAttentionBlock": self.attention,
            "UpSampler": self.up,
            "DownSampler": self.down,
        }
        x = self.convolve(x, None, model.conv_in)
        for block in model.blocks:
            x = steps[type(block).__name__](block, x)
        norm = self.affine(model.conv_norm_out, x)
        return self.convolve(x, norm, model.conv_out, measured=False)

    def convolve(self, x: _Map, norm: Affine | None, conv: Any, measured: bool = True) -> _Map:
        """The 3x3 convolution of x, or of SiLU(norm(x))."""
        height, width = x.values.shape[2:]

        def make(top: int, bottom: int) -> Tensor:
            return _conv(self.halo(x, top - 1, bottom + 1, norm), conv, padding=(0, 1))

        return self.fill(height, make, (conv.out_channels, height, width), measured=measured)

    def residual(self, block: Any, x: _Map) -> _Map:
        inner = self.convolve(x, self.affine(block.norm1, x), block.conv1)
        norm = self.affine(block.norm2, inner)
        _, after, height, width = inner.values.shape
        shortcut = block.conv_shortcut

        def make(top: int, bottom: int) -> Tensor:
            out = _conv(self.halo(inner, top - 1, bottom + 1, norm), block.conv2, padding=(0, 1))
            rest = self.on_device(x, x.values[:, :, top:bottom])
            return out.add_(rest if shortcut is None else _conv(rest, shortcut))

        return self.fill(height, make, (after, height, width), _narrowed(x, after))

    def up(self, block: Any, x: _Map) -> _Map:
        channels, height, width = x.values.shape[1:]

        def make(top: int, bottom: int) -> Tensor:
            larger = F.interpolate(self.halo(x, top - 1, bottom + 1), scale_factor=2.0)
            return _conv(larger[:, :, 1:-1], block.conv, padding=(0, 1))

        return self.fill(height, make, (channels, 2 * height, 2 * width))

    def down(self, block: Any, x: _Map) -> _Map:
        channels, height, width = x.values.shape[1:]
        shape = channels, height // 2, width // 2

        def make(top: int, bottom: int) -> Tensor:
            padded = F.pad(self.halo(x, 2 * top, 2 * bottom + 1), (0, 1))
            return _conv(padded, block.conv, stride=2)

        return self.fill(shape[1], make, shape)

    def attention(self, block: Any, x: _Map) -> _Map:
        (layer,) = block.transformer_blocks
        norm = self.affine(block.norm, x)
        flat = x.values.flatten(2)[..., None]  # a token a row; a view, as all below
        _, channels, count, _ = flat.shape
        tokens = flat[0, ..., 0].T

        def normed(rows: Tensor) -> Tensor:
            assert norm is not None
            scale, shift = (part.flatten() for part in norm)
            return torch.addcmul(shift, rows, scale, out=torch.empty_like(rows))

        def make_keys(first: int, last: int) -> Tensor:
            rows = normed(self.on_device(x, tokens[first:last]))
            pair = torch.cat([_linear(rows, layer.to_k), _linear(rows, layer.to_v)], dim=1)
            return pair.T[None, ..., None]

        def make(first: int, last: int) -> Tensor:
            rows = self.on_device(x, tokens[first:last])
            q = _linear(normed(rows), layer.to_q)
            found = F.scaled_dot_product_attention(q[None, None], k, v)[0, 0]
            return _linear(found, layer.to_out).add_(rows).T[None, ..., None]

        pairs = self.fill(count, make_keys, (2 * channels, count, 1), measured=False)
        k, v = pairs.values[..., 0].mT[:, None].split(channels, dim=-1)
        with _math_attention_in_16_bits():
            inside = replace(x, values=flat)
            filled = self.fill(count, make, (channels, count, 1), inside)
        return replace(filled, values=filled.values[..., 0].unflatten(2, x.values.shape[2:]))

    def fill(
        self,
        count: int,
        make: Make,
        shape: tuple[int, int, int],
        inside: _Map | None = None,
        measured: bool = True,
    ) -> _Map:
        """The map [1, *shape] that consists of the bands from `make`, of `count` rows in all.

        inside: the map to fill; `make` reads no row of it that an earlier band replaced.
        """
        rows, resident, nbytes = next(self.choices)
        target = None if inside is None else inside.values
        moments: list[Tensor] = []
        for first in range(0, count, rows):
            if self.before_band is not None:
                self.before_band()
            if self.make_way is not None:
                self.make_way(nbytes)
            last = min(first + rows, count)
            band = make(first, last)
            if measured:
                moments += _moments(band)
            if resident and rows >= count:
                return _Map(band, True, moments)
            if target is None:
                target = self.new_map(shape, resident)
                nbytes -= target.nbytes if resident else 0
            step = shape[1] // count
            target[:, :, first * step : last * step].copy_(band, non_blocking=True)
            del band  # before the next one is made
        assert target is not None
        return _Map(target, resident, moments)

    def affine(self, norm: Any, x: _Map) -> Affine | None:
        """What the norm of x does to each of its channels."""
        mean, variance, count = torch.stack(x.moments).double().unbind(1)
        share = count / count.sum(0)
        centre = (share * mean).sum(0)
        spread = (share * (variance + (mean - centre) ** 2)).sum(0)
        size = norm.num_channels // norm.num_groups
        scale = norm.weight.double() * (spread + norm.eps).rsqrt().repeat_interleave(size)
        shift = norm.bias.double() - centre.repeat_interleave(size) * scale
        return scale.float().view(1, -1, 1, 1), shift.float().view(1, -1, 1, 1)

    def new_map(self, shape: tuple[int, int, int], resident: bool) -> Tensor:
        if not resident:
            return host_map((1, *shape), self.dtype, self.device)
        options: dict[str, Any] = {"memory_format": torch.channels_last}
        return torch.empty((1, *shape), dtype=self.dtype, device=self.device, **options)

    def on_device(self, x: _Map, rows: Tensor) -> Tensor:
        if x.resident:
            return rows
        return torch.empty_like(rows, device=self.device).copy_(rows, non_blocking=True)

    def halo(self, x: _Map, first: int, last: int, norm: Affine | None = None) -> Tensor:
        """Rows first to last of x, or of SiLU(norm(x)), with zeros outside the picture."""
        _, channels, height, width = x.values.shape
        band = self.new_map((channels, last - first, width), True)
        top, bottom = max(first, 0), min(last, height)
        inner = band[:, :, top - first : bottom - first]
        rows = x.values[:, :, top:bottom]
        if norm is None or not x.resident:
            rows = inner.copy_(rows, non_blocking=True)
        if norm is not None:  # in float32 and rounded once, as PyTorch's group norm
            scale, shift = norm
            torch.addcmul(shift, rows, scale, out=inner)
            F.silu(inner, inplace=True)
        band[:, :, : top - first] = 0
        band[:, :, bottom - first :] = 0
        return band


def _narrowed(x: _Map, channels: int) -> _Map | None:
    """Room for a map of so many channels in the memory of x, or None where x has fewer.

    When rows are replaced from the first to the last, those of x that follow are still intact.
    """
    _, before, height, width = x.values.shape
    if channels > before:
        return None
    if x.resident:
        return replace(x, values=x.values[:, :channels])
    strides = (channels * height * width, 1, width * channels, channels)
    return replace(x, values=x.values.as_strided((1, channels, height, width), strides))


def _conv(x: Tensor, conv: Any, stride: int = 1, padding: tuple[int, int] = (0, 0)) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, stride, padding)


def _linear(x: Tensor, layer: Any) -> Tensor:
    """A linear layer, or the same as a 1x1 convolution, of x [tokens, channels]."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


def _moments(band: Tensor) -> list[Tensor]:
    """Mean, variance and count of each group in parts of a band, float32 [3, groups] each."""
    found = []
    for part in band.chunk(PARTS if band.dtype.itemsize < 4 else 1, dim=2):
        groups = part.float().unflatten(1, (_GROUPS, -1))
        variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0)
        count = torch.full_like(mean, groups[0, 0].numel())
        found.append(torch.cat([mean, variance, count]))
        del groups  # before the next part is converted
    return found


@contextmanager
def _math_attention_in_16_bits() -> Iterator[None]:
    """Where no fused kernel fits, PyTorch would copy all keys and values to float32 each time."""
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)
