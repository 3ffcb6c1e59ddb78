"""What stands between two matrix products, in plain PyTorch: what the fused kernels must give.

In the order and with the rounding of DiffSynth's modules.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .hadamard import rotate
from .row_format import EPS, ActivationFormat, QuantizedActivations


def norm_modulate_quantize(
    x: Tensor | None,
    norm: tuple[Tensor, Tensor] | None,
    gelu: Tensor | None,
    wanted: ActivationFormat | None,
    dtype: torch.dtype,
) -> Tensor | QuantizedActivations:
    """As of `ops`."""
    if norm is not None:
        assert x is not None
        shift, scale = norm
        x = F.layer_norm(x, x.shape[-1:], eps=EPS).mul_(1 + scale).add_(shift)
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
    return x.to(dtype) if wanted is None else quantize_activations(x, wanted, dtype)


def quantize_activations(
    x: Tensor, wanted: ActivationFormat, dtype: torch.dtype
) -> QuantizedActivations:
    """One scale a row, found in float32; a row of zeros gets a scale of almost nothing.

    Rows that are only to be rotated are so in `dtype`.
    """
    if wanted.dtype is None:
        return QuantizedActivations(rotate(x.to(dtype), wanted.group), None, dtype)
    values = rotate(x.float(), wanted.group)
    largest = torch.linalg.vector_norm(values, ord=float("inf"), dim=-1, keepdim=True)
    scale = (largest / wanted.limit).clamp_min_(1e-30)
    values = torch.div(values, scale, out=None if values is x else values)
    values.clamp_(-wanted.limit, wanted.limit)
    if not wanted.dtype.is_floating_point:
        values.round_()
    return QuantizedActivations(values.to(wanted.dtype), scale, dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """DiffSynth's RMSNorm, step by step, with a weight in any dtype."""
    variance = x.float().square().mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + eps)).to(x.dtype) * weight.to(x.dtype)


def rms_rope_(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, heads: int) -> None:
    """As of `ops`."""
    q, k, _ = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
    rope = rope.transpose(1, 2)
    for x, weight in ((q, q_weight), (k, k_weight)):
        pairs = rms_norm(x, weight).float().unflatten(-1, (-1, 1, 2))
        turned = rope[..., 0] * pairs[..., 0] + rope[..., 1] * pairs[..., 1]
        x.copy_(turned.flatten(-2))


def rescale_(y: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """As of `ops`."""
    y.mul_(row_scale)
    if bias is None:
        y.mul_(scale)
    else:
        torch.addcmul(bias, y, scale, out=y)
