"""What stands between two matrix products: norm, modulation, GELU, RoPE, quantization of rows.

Each function takes a fused kernel where the device has one, ours in Triton or else comfy-kitchen's,
and otherwise says the same in PyTorch.
"""

import torch
from torch import Tensor

from . import dispatch, reference
from .row_format import EPS, ActivationFormat, QuantizedActivations

FUSED_GROUPS = (0, 256)  # of columns that the fused kernel rotates together


def norm_modulate_quantize(
    x: Tensor | None,
    norm: tuple[Tensor, Tensor] | None = None,
    gelu: Tensor | None = None,
    wanted: ActivationFormat | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | QuantizedActivations:
    """The rows [x | GELU(gelu)], or layer norm(x) * (1 + scale) + shift, quantized if wanted.

    x, gelu: [batch, tokens, width], either may be absent, and gelu may be used up; norm: (shift,
    scale) [batch, 1, width]; dtype: of the rows, or of what a product makes of them; that of x, or
    else of gelu, if absent.
    """
    source = x if x is not None else gelu
    assert source is not None
    dtype = dtype or source.dtype
    if dispatch.fused(source) and (wanted is None or wanted.group in FUSED_GROUPS):
        from . import fused_triton

        if wanted is None:
            return fused_triton.norm_modulate_quantize(x, norm, gelu, EPS, dtype)[0]
        into = (wanted.dtype or dtype, wanted.limit, wanted.group)
        values, scale = fused_triton.norm_modulate_quantize(x, norm, gelu, EPS, *into)
        return QuantizedActivations(values, scale, dtype)
    if norm is not None and dispatch.of_kitchen(source):
        import comfy_kitchen

        shift, scale = norm
        x, norm = comfy_kitchen.adaln(source, scale, shift, EPS), None
    return reference.norm_modulate_quantize(x, norm, gelu, wanted, dtype)


def rms_rope_(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, heads: int) -> None:
    """Norm and rotate the queries and keys of `qkv` [batch, tokens, 3 * width] in place.

    q_weight, k_weight: of their norms, [width / heads]; rope: float32 [1 or batch, 1, tokens,
    head / 2, 2, 2], as DiffSynth's RoPEEmbedding gives it.
    """
    if dispatch.fused(qkv):
        from . import fused_triton

        fused_triton.rms_rope_(qkv, q_weight, k_weight, rope, heads, EPS)
    elif dispatch.of_kitchen(qkv):
        import comfy_kitchen

        q, k, _ = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
        weights = q_weight.to(qkv.dtype), k_weight.to(qkv.dtype)
        comfy_kitchen.rms_rope_(q, k, rope.transpose(1, 2), *weights, EPS)
    else:
        reference.rms_rope_(qkv, q_weight, k_weight, rope, heads)


def add_gated_(x: Tensor, gate: Tensor, y: Tensor) -> None:
    """Add gate * y to x, which is changed last of all; y may be used up.

    Rounded once, but twice as in DiffSynth where no kernel is fused and x has the dtype of y.
    """
    if dispatch.fused(x):
        from . import fused_triton

        fused_triton.add_gated_(x, gate, y)
    elif x.dtype != y.dtype or dispatch.of_kitchen(x):
        x.addcmul_(gate, y)
    else:
        x.add_(y.mul_(gate))


def rescale_(y: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """y [rows, columns] = y * row_scale * scale + bias, in place.

    row_scale: float32 [rows, 1]; scale: float32 [columns]; bias: [columns].
    """
    if dispatch.fused(y):
        from . import fused_triton

        fused_triton.rescale_(y, row_scale, scale, bias)
    else:
        reference.rescale_(y, row_scale, scale, bias)


def dequantize(stored: Tensor, scale: Tensor, out: Tensor) -> None:
    """out [rows, columns] = stored * scale, in the dtype of out; scale: float32 [rows]."""
    if dispatch.fused(stored):
        from . import fused_triton

        fused_triton.dequantize(stored, scale, out)
    else:
        # The fresh copy is scaled in place; PyTorch multiplies in float32 and rounds once.
        out.copy_(stored).mul_(scale[:, None])
