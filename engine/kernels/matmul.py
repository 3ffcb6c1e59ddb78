"""Products of rows and weights that are both in 8 bits.

Weights are [columns, depth], their scale float32 [columns], the bias [columns]. The result has the
dtype that the rows were made from, and is `out` if that could be written.
"""

from typing import TypeGuard

import torch
from torch import Tensor, _int_mm, _scaled_mm  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import functional as F

from . import dispatch
from .libraries import row_scaled_product
from .ops import rescale_
from .row_format import LowRankProduct, QuantizedActivations

ROWS_AT_ONCE = 1024  # of an int8 product without a kernel, whose sums take 4 bytes each
FEWEST_ROWS = 32  # of the same: cuBLAS wants more than 16


def product(
    x: QuantizedActivations, weight: Tensor, scale: Tensor | None, bias: Tensor | None,
    out: Tensor | None = None, added: LowRankProduct | None = None,
) -> Tensor:  # fmt: skip
    """added: for rows of which `adds_low_rank` says so."""
    values, row_scale = _flat(x)
    if scale is None:
        scale = torch.ones(len(weight), dtype=torch.float32, device=weight.device)
    y = _result(weight, x, out)
    given = values, row_scale, weight, scale, bias, y.flatten(0, -2)
    integers = values.dtype == torch.int8
    ours = integers and dispatch.fused(values) and dispatch.int8_product_works(values.device)
    if ours or added is not None:  # which PyTorch's cannot take in
        from . import triton_products

        triton_products.product(*given, added)
    elif integers:
        _int8_product(*given)
    else:
        _float8_product(*given)
    return y


def _float8_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    if not x.is_cuda:  # the same arithmetic without the units
        y = (x.float() @ weight.float().T).mul_(x_scale).mul_(scale)
        out.copy_(y if bias is None else y.add_(bias.float()))
        return
    bias = None if bias is None else bias.to(out.dtype)  # unscaled files keep it in float8 too
    # In float32, which ComfyUI has with --force-fp32, PyTorch's product takes no bias.
    if out.dtype != torch.float32 and dispatch.float8_takes_row_scales(out.device):
        row_scaled_product(x, x_scale, weight, scale, bias, out)
        return
    one = torch.ones((), dtype=torch.float32, device=out.device)
    _scaled_mm(x, weight.T, one, one, out_dtype=out.dtype, use_fast_accum=True, out=out)
    rescale_(out, x_scale, scale, bias)


def _int8_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    for first in range(0, len(x), ROWS_AT_ONCE):
        rows = x[first : first + ROWS_AT_ONCE]
        some = slice(first, first + len(rows))
        more = max(0, FEWEST_ROWS - len(rows))
        padded = F.pad(rows, (0, 0, 0, more)) if more else rows
        sums = _int_mm(padded, weight.T)[: len(rows)].float()
        sums.mul_(x_scale[some]).mul_(scale)
        out[some] = sums if bias is None else sums.add_(bias)


def has_low_rank_kernels(x: Tensor | QuantizedActivations) -> TypeGuard[QuantizedActivations]:
    """Whether `low_rank_rows` takes these rows."""
    if isinstance(x, Tensor) or x.scale is None or not dispatch.fused(x.values):
        return False
    return dispatch.low_rank_works(x.values.device, x.values.dtype)


def adds_low_rank(
    x: Tensor | QuantizedActivations, weight: Tensor
) -> TypeGuard[QuantizedActivations]:
    """Whether the product of these rows and this weight can add what they give in a few ranks.

    Of float8 only where that is faster: PyTorch's product gains on ours with the depth, and what
    is added afterwards passes over the columns once more.
    """
    if not has_low_rank_kernels(x):
        return False
    device, dtype = x.values.device, x.values.dtype
    deep = weight.shape[1] > weight.shape[0] and dtype != torch.int8
    return not deep and dispatch.terms_join_product(device, dtype)


def low_parts(ranks: int, depth: int) -> int:
    """Of `low_rank_rows`: how many shares of the depth are summed apart, so that all of a card has
    work. Many ranks give it enough."""
    return 2 if ranks <= 64 and depth > 8192 else 1


def low_rank_rows(x: QuantizedActivations, down: Tensor, scale: Tensor | None) -> Tensor:
    """Some parts, whose sum is x (down * scale)^T: [parts, rows, ranks]."""
    assert scale is not None, "it is quantized as the rows are"
    from . import triton_products

    values, row_scale = _flat(x)
    (ranks, depth), rows = down.shape, values.shape[0]
    low = values.new_empty(low_parts(ranks, depth), rows, ranks, dtype=x.dtype)
    triton_products.low_rank_rows(values, row_scale, down, scale, low)
    return low


def add_low_rank_(y: Tensor, added: LowRankProduct) -> None:
    """Add it to y [rows, columns], contiguous, for rows of which `has_low_rank_kernels` says so."""
    from . import triton_products

    triton_products.add_low_rank_(y, added)


def _flat(x: QuantizedActivations) -> tuple[Tensor, Tensor]:
    """The values [rows, n] and their scale [rows, 1]."""
    assert x.scale is not None, "these rows have not been quantized"
    return x.values.flatten(0, -2), x.scale.reshape(-1, 1)


def _result(weight: Tensor, x: QuantizedActivations, out: Tensor | None) -> Tensor:
    """Memory for the product: `out` if its rows lie one after the other, or new."""
    if out is not None and out.is_contiguous():
        return out
    return x.values.new_empty(*x.values.shape[:-1], weight.shape[0], dtype=x.dtype)
