"""What stands between two matrix products: norm, modulation, GELU, RoPE, quantization of rows.

Each function takes a fused kernel where the device has one, ours in Triton or else comfy-kitchen's,
and otherwise says the same in PyTorch, in the order and with the rounding of DiffSynth's modules.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import kernels
from .precision import ROTATION

EPS = 1e-6  # of every norm in Flux.1


@dataclass(frozen=True)
class Wanted:
    """The format in which a product takes its rows."""

    dtype: torch.dtype | None  # int8, float8_e4m3fn, or None: as they are, only rotated
    limit: float  # largest value that is used of it
    group: int  # columns that are rotated together, 0: none


@dataclass(frozen=True)
class Rows:
    """Rows as a product wanted them: values [..., n], scale float32 [..., 1], x = values * scale.

    scale is None where the values are only rotated. dtype: what they were made from and the
    product's result is to be.
    """

    values: Tensor
    scale: Tensor | None
    dtype: torch.dtype


def prepare(
    x: Tensor | None,
    norm: tuple[Tensor, Tensor] | None = None,
    gelu: Tensor | None = None,
    wanted: Wanted | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | Rows:
    """The rows [x | GELU(gelu)], or layer norm(x) * (1 + scale) + shift, quantized if wanted.

    x, gelu: [batch, tokens, width], either may be absent, and gelu may be used up; norm: (shift,
    scale) [batch, 1, width]; dtype: of the rows, or of what a product makes of them; that of x, or
    else of gelu, if absent.
    """
    source = x if x is not None else gelu
    assert source is not None
    dtype = dtype or source.dtype
    if kernels.fused(source) and (wanted is None or wanted.group in (0, ROTATION)):
        return _fused(x, norm, gelu, wanted, dtype)
    if norm is not None:
        shift, scale = norm
        if kernels.of_kitchen(source):
            import comfy_kitchen

            x = comfy_kitchen.adaln(source, scale, shift, EPS)
        else:
            x = F.layer_norm(source, source.shape[-1:], eps=EPS).mul_(1 + scale).add_(shift)
    if gelu is not None:
        if x is not None and x.is_cuda:  # one pass over the memory less than joining them
            both = x.new_empty(*x.shape[:-1], x.shape[-1] + gelu.shape[-1])
            both[..., : x.shape[-1]] = x
            torch.ops.aten.gelu.out(gelu, approximate="tanh", out=both[..., x.shape[-1] :])
            x = both
        else:
            activated = torch.ops.aten.gelu_(gelu, approximate="tanh")
            x = activated if x is None else torch.cat([x, activated], dim=-1)
    assert x is not None
    if wanted is None:
        return x.to(dtype)
    return quantize_activations(x, wanted, dtype)


def quantize_activations(x: Tensor, wanted: Wanted, dtype: torch.dtype) -> Rows:
    """One scale a row, found in float32; a row of zeros gets a scale of almost nothing.

    Rows that are only to be rotated are so in `dtype`.
    """
    from .stored_linear import rotate

    if wanted.dtype is None:
        x = x.to(dtype)
        return Rows(rotate(x, wanted.group), None, dtype)
    values = rotate(x.float(), wanted.group)
    largest = torch.linalg.vector_norm(values, ord=float("inf"), dim=-1, keepdim=True)
    scale = (largest / wanted.limit).clamp_min_(1e-30)
    values = torch.div(values, scale, out=None if values is x else values)
    values.clamp_(-wanted.limit, wanted.limit)
    if not wanted.dtype.is_floating_point:
        values.round_()
    return Rows(values.to(wanted.dtype), scale, dtype)


def rms_rope_(qkv: Tensor, q_norm: Any, k_norm: Any, rope: Tensor, heads: int) -> None:
    """Norm and rotate the queries and keys of `qkv` [batch, tokens, 3 * width] in place.

    rope: float32 [1 or batch, 1, tokens, head / 2, 2, 2], as DiffSynth's RoPEEmbedding gives it.
    """
    if kernels.fused(qkv):
        from . import triton_kernels

        triton_kernels.rms_rope_(qkv, q_norm.weight, k_norm.weight, rope, heads, EPS)
        return
    q, k, _ = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
    rope = rope.transpose(1, 2)
    if kernels.of_kitchen(qkv):
        import comfy_kitchen

        q_weight, k_weight = (norm.weight.to(qkv.dtype) for norm in (q_norm, k_norm))
        comfy_kitchen.rms_rope_(q, k, rope, q_weight, k_weight, EPS)
        return
    for x, norm in ((q, q_norm), (k, k_norm)):
        pairs = norm(x).float().unflatten(-1, (-1, 1, 2))
        turned = rope[..., 0] * pairs[..., 0] + rope[..., 1] * pairs[..., 1]
        x.copy_(turned.flatten(-2))


def add_gated_(x: Tensor, gate: Tensor, y: Tensor) -> None:
    """Add gate * y to x, which is changed last of all; y may be used up.

    Rounded once, but twice as in DiffSynth where no kernel is fused and x has the dtype of y.
    """
    if kernels.fused(x):
        from . import triton_kernels

        triton_kernels.add_gated_(x, gate, y)
    elif x.dtype != y.dtype or kernels.of_kitchen(x):
        x.addcmul_(gate, y)
    else:
        x.add_(y.mul_(gate))


def _fused(
    x: Tensor | None,
    norm: tuple[Tensor, Tensor] | None,
    gelu: Tensor | None,
    wanted: Wanted | None,
    dtype: torch.dtype,
) -> Tensor | Rows:
    from . import triton_kernels

    if wanted is None:
        return triton_kernels.prepare(x, norm, gelu, EPS, dtype)[0]
    given = (wanted.dtype or dtype, wanted.limit, wanted.group)
    return Rows(*triton_kernels.prepare(x, norm, gelu, EPS, *given), dtype)
