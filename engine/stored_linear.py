"""A linear layer that stores its weight in one format and multiplies in another."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FLOAT8_DTYPE = torch.float8_e4m3fn
FLOAT8_MAX = 448.0  # largest finite value of float8_e4m3fn
VALUES_AT_ONCE = 256 * 3072  # of a conversion: few enough for the processor's cache


class StoredLinear(nn.Module):
    """`y = x W^T + b`, W converted to the dtype of x for the length of the product.

    weight: [out, in] in any floating dtype; scale: [out] float32, present only when the weight is
    float8, with W = weight * scale[:, None]; bias: [out] or absent.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.weight = _parameter(out_features, in_features, dtype=dtype)
        scaled = dtype == FLOAT8_DTYPE
        self.scale = _parameter(out_features, dtype=torch.float32) if scaled else None
        # float8 is for the matrices; a bias is a vector that costs nothing to keep.
        bias_dtype = torch.bfloat16 if scaled else dtype
        self.bias = _parameter(out_features, dtype=bias_dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if self.scale is not None:
            # The fresh copy is scaled in place; PyTorch multiplies in float32 and rounds once.
            weight.mul_(self.scale[:, None])
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight, bias)


def quantize_rows(weight: Tensor, into: Tensor, scale: Tensor) -> None:
    """Write `weight` [out, in] as float8_e4m3fn `into` [out, in] and float32 `scale` [out].

    scale = max|row| / 448, so every row uses the whole range of the format; a row of zeros gets
    scale 1. A weight that is float8_e4m3fn already is copied as it is, with scale 1. One that is
    float8_e5m2 gets a power of two, under which its 2 mantissa bits fit into 3 unrounded.
    Raises ValueError when the weight holds an infinity or a NaN, which no scale can save.
    """
    if weight.dtype == FLOAT8_DTYPE:
        into.copy_(weight)
        scale.fill_(1.0)
        return
    rows_at_once = max(1, VALUES_AT_ONCE // weight.shape[1])
    shape = (min(rows_at_once, weight.shape[0]), weight.shape[1])
    buffer = torch.empty(shape, device=weight.device)
    for start in range(0, weight.shape[0], rows_at_once):
        rows = slice(start, start + rows_at_once)
        values = buffer[: len(weight[rows])].copy_(weight[rows])
        largest = values.abs().amax(dim=1)
        if not torch.isfinite(largest).all():
            raise ValueError("the weight holds an infinity or a NaN")
        row_scale = torch.where(largest > 0, largest / FLOAT8_MAX, 1.0)
        if weight.dtype == torch.float8_e5m2:
            row_scale = torch.exp2(torch.ceil(torch.log2(row_scale)))
        # Division can land a hair above 448, which the cast would turn into NaN.
        into[rows].copy_(values.div_(row_scale[:, None]).clamp_(-FLOAT8_MAX, FLOAT8_MAX))
        scale[rows].copy_(row_scale)


def store_linears(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace every nn.Linear below `module` (built on the meta device) by a StoredLinear."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            stored = StoredLinear(
                child.in_features, child.out_features, child.bias is not None, dtype
            )
            setattr(module, name, stored)
        else:
            store_linears(child, dtype)


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
