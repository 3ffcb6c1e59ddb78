"""A linear layer that stores its weight in one format and multiplies in another."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import kernels
from .diffsynth_files import diffsynth_module
from .precision import Storage, rotation_group
from .rows import Rows, prepare

if TYPE_CHECKING:
    from .products import Product

FLOAT8_DTYPE = torch.float8_e4m3fn
LIMITS = {FLOAT8_DTYPE: 448.0, torch.int8: 127.0}  # largest value that is used of each format
LARGEST_CAST = 464.0  # that rounds to 448, where there would be 480 if that were not a NaN
FLOAT8_NAN = 0x7F  # its bits, but for the sign
VALUES_AT_ONCE = 256 * 3072  # of a conversion: few enough for the processor's cache
VALUES_AT_ONCE_ON_CARD = 2**23  # many enough for a card, in 33 MB

ALL = slice(None)
StorageOf = Callable[[str], Storage]  # of the linear layer of that name


class StoredLinear(nn.Module):
    """`y = x W^T + b`, by the product that the run has chosen.

    weight: [out, in] in the dtype of the storage; scale: [out] float32 or absent, with
    W = weight * scale[:, None], rotated by groups of `group` input channels unless that is 0;
    bias: [out] or absent. low_rank: None, or (down [rank, in], up [out, rank]), whose product is
    added to W without rounding W again.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, storage: Storage):
        super().__init__()
        dtype = storage.torch_dtype
        self.weight = _parameter(out_features, in_features, dtype=dtype)
        self.scale = _parameter(out_features, dtype=torch.float32) if storage.scaled else None
        vector_dtype = getattr(torch, storage.vector_dtype)
        self.bias = _parameter(out_features, dtype=vector_dtype) if bias else None
        self.group = rotation_group(in_features, storage.rotated)
        self.low_rank: tuple[Tensor, Tensor] | None = None
        self.product: Product | None = None

    def rows(
        self,
        x: Tensor | None,
        norm: tuple[Tensor, Tensor] | None = None,
        gelu: Tensor | None = None,
    ) -> Tensor | Rows:
        """The input of this layer from what `prepare` takes, quantized if the product wants it."""
        if self.product is None:
            return prepare(x, norm, gelu)
        wanted = None if self.low_rank else self.product.wanted(self)
        return prepare(x, norm, gelu, wanted, self.product.dtype)

    def matrix(self, columns: slice = ALL) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight, scale and bias of these output columns."""
        scale, bias = (None if v is None else v[columns] for v in (self.scale, self.bias))
        return self.weight[columns], scale, bias

    def forward(self, x: Tensor | Rows, out: Tensor | None = None, columns: slice = ALL) -> Tensor:
        """These columns of the result, written to `out` when that is given.

        x: [..., in], or what `rows` gave.
        """
        if self.product is None:
            y = dequantized_product(self, x, columns=columns)
        else:
            y = self.product(self, x, out, columns)
        if self.low_rank is not None:
            assert isinstance(x, Tensor), "rows() leaves the input of a low-rank term as it is"
            down, up = (factor.to(x.dtype) for factor in self.low_rank)
            y += F.linear(F.linear(x, down), up[columns])
        if out is not None and y is not out:
            out.copy_(y)
        return y


class StoredNorm(nn.Module):
    """DiffSynth's RMSNorm, step by step, with a weight in any dtype."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = _parameter(width, dtype=dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().square().mean(-1, keepdim=True)
        return (x * torch.rsqrt(variance + self.eps)).to(x.dtype) * self.weight.to(x.dtype)


def dequantized_product(
    layer: StoredLinear,
    x: Tensor | Rows,
    buffer: Tensor | None = None,
    out: Tensor | None = None,
    columns: slice = ALL,
) -> Tensor:
    """The product in the dtype of x, the weight converted for its length, into `buffer` if given.

    A rotated weight meets a rotated input: that is the same product, and less to rotate. Rows have
    been rotated already.
    The result is `out` where that is given, contiguous, and the layer has a bias.
    """
    x = rotate(x, layer.group) if isinstance(x, Tensor) else x.values
    weight, scale, bias = layer.matrix(columns)
    if weight.dtype != x.dtype:
        weight = _converted(weight, scale, x.dtype, buffer)
    bias = None if bias is None else bias.to(x.dtype)
    if out is None or bias is None or not out.is_contiguous():
        return F.linear(x, weight, bias)
    torch.addmm(bias, x.flatten(0, -2), weight.T, out=out.flatten(0, -2))
    return out


def _converted(
    stored: Tensor, scale: Tensor | None, dtype: torch.dtype, buffer: Tensor | None
) -> Tensor:
    """The weight in another dtype, still rotated."""
    if buffer is None:
        buffer = torch.empty(stored.numel(), dtype=dtype, device=stored.device)
    weight = buffer[: stored.numel()].view(stored.shape)
    if scale is None:
        return weight.copy_(stored)
    if kernels.fused(stored):
        from . import triton_kernels

        triton_kernels.dequantize(stored, scale, weight)
        return weight
    # The fresh copy is scaled in place; PyTorch multiplies in float32 and rounds once.
    return weight.copy_(stored).mul_(scale[:, None])


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


def rotate(x: Tensor, group: int) -> Tensor:
    """x [..., n] with each `group` of its last axis rotated; its own inverse. 0: x as it is."""
    if group == 0:
        return x
    if group > 16 and x.itemsize >= 4 and x.device.type == "cpu":
        # It is the product of two smaller ones, one across the columns of the other: 3 x as fast.
        inner, outer = (hadamard(size, x.device, x.dtype) for size in (16, group // 16))
        return (outer @ (x.reshape(-1, 16) @ inner).view(-1, group // 16, 16)).view(x.shape)
    return (x.reshape(-1, group) @ hadamard(group, x.device, x.dtype)).view(x.shape)


@cache
def hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The regular Hadamard matrix of a power of 4, divided by its root: orthogonal, symmetric.

    Its entries are powers of two, so every floating dtype holds it exactly. It is the one that
    ComfyUI's int8 files are rotated by.
    """
    signs = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]
    four = torch.tensor(signs, dtype=torch.float32, device="cpu") / 2
    matrix = four.new_ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix.to(device, dtype)


def store(module: nn.Module, storage_of: StorageOf, prefix: str = "") -> None:
    """Replace every linear layer and RMS norm below `module`, which is on the meta device."""
    rms_norm = diffsynth_module("models.general_modules").RMSNorm
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.Linear):
            stored: nn.Module = StoredLinear(
                child.in_features, child.out_features, child.bias is not None, storage_of(path)
            )
        elif isinstance(child, rms_norm):
            dtype = getattr(torch, storage_of(path).vector_dtype)
            stored = StoredNorm(len(child.weight), child.eps, dtype)  # pyright: ignore[reportArgumentType]
        else:
            store(child, storage_of, f"{path}.")
            continue
        setattr(module, name, stored)


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
