"""Weights into 8 bits, and back to float32."""

import torch
from torch import Tensor

from ..kernels.hadamard import rotate
from ..kernels.row_format import FLOAT8_DTYPE, LIMITS

LARGEST_CAST = 464.0  # that rounds to 448, where there would be 480 if that were not a NaN
FLOAT8_NAN = 0x7F  # its bits, but for the sign
VALUES_AT_ONCE = 256 * 3072  # of a conversion: few enough for the processor's cache
VALUES_AT_ONCE_ON_CARD = 2**22  # many enough for a card, in 17 MB


def quantize_rows(weight: Tensor, into: Tensor, scale: Tensor, group: int = 0) -> None:
    """Write `weight` [out, in] as float8_e4m3fn or int8 `into` [out, in] and float32 `scale` [out].

    With a `group`, groups of so many columns are rotated first. scale = max|row| / the format's
    limit, so every row uses its whole range; a row of zeros gets scale 1. Into float8_e4m3fn,
    a weight that is in that format already is copied as it is, with scale 1, and one that is
    float8_e5m2 gets a power of two, under which its 2 mantissa bits fit into 3 unrounded.
    Raises ValueError when the weight holds an infinity or a NaN, which no scale can save.
    """
    if weight.dtype == into.dtype:
        into.copy_(weight)
        scale.fill_(1.0)
        return
    # A tensor, because CUDA multiplies by the inverse of a number, which rounds otherwise.
    limit = LIMITS[into.dtype]
    divisor = torch.full((), limit, dtype=torch.float32, device=weight.device)
    exact = weight.dtype == torch.float8_e5m2 and into.dtype == FLOAT8_DTYPE
    at_once = VALUES_AT_ONCE if weight.device.type == "cpu" else VALUES_AT_ONCE_ON_CARD
    rows_at_once = max(1, at_once // weight.shape[1])
    for start in range(0, weight.shape[0], rows_at_once):
        rows = slice(start, start + rows_at_once)
        values = rotate(float32_of(weight[rows]), group)
        largest = torch.maximum(values.amax(dim=1), values.amin(dim=1).neg_())
        row_scale = largest / divisor
        if exact:
            row_scale = torch.exp2(torch.ceil(torch.log2(row_scale)))
        # Values of below 1e-36 have a scale that float32 cannot hold; they are as good as zero.
        row_scale = torch.where(row_scale < torch.finfo(torch.float32).tiny, 1.0, row_scale)
        # Division can land a hair above the limit, which the cast would turn into NaN.
        values.div_(row_scale[:, None]).clamp_(-limit, limit)
        into[rows].copy_(values.round_() if into.dtype == torch.int8 else values)
        scale[rows].copy_(row_scale)
        del values  # before the next ones are there
    if not torch.isfinite(scale).all():  # once, because a card is waited for
        raise ValueError("the weight holds an infinity or a NaN")


def float32_of(values: Tensor) -> Tensor:
    """A copy in float32. On a CPU PyTorch takes 2 to 3 times as long for float8."""
    if values.itemsize > 1 or not values.is_floating_point() or values.device.type != "cpu":
        return values.to(torch.float32, copy=True)
    bits = values.view(torch.int8).to(torch.int16)
    if values.dtype == torch.float8_e5m2:  # the upper half of a float16
        return bits.bitwise_left_shift_(8).view(torch.float16).float()
    if holds_nan(values):  # which has no place below
        return values.float()
    # The bits in their places of a float16 are the value with an exponent that is 8 too small.
    bits.bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).float().mul_(256)


def holds_nan(values: Tensor) -> bool:
    """Whether a NaN is among these float8_e4m3fn."""
    return bool((values.view(torch.int8).bitwise_and(FLOAT8_NAN) == FLOAT8_NAN).any())
