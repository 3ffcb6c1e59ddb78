"""Products and attention in 8 bits by PyTorch and by comfy-kitchen, which not every machine has."""

from torch import Tensor, _scaled_mm  # pyright: ignore[reportPrivateImportUsage]


def row_scaled_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """out [rows, columns] = (x * x_scale) (weight * scale)^T + bias, by PyTorch's float8 product.

    x: float8_e4m3fn [rows, depth], x_scale: float32 [rows, 1]; weight: float8_e4m3fn [columns,
    depth], scale: float32 [columns]; depth and columns multiples of 16.
    """
    _scaled_mm(
        x, weight.T, x_scale, scale[None], bias=bias, out_dtype=out.dtype, use_fast_accum=True,
        out=out,
    )  # fmt: skip


def kitchen_int8_product(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    """x (weight * scale)^T + bias; it quantizes x [..., depth], and rotates it in groups first."""
    import comfy_kitchen

    assert scale is not None, "int8 weights have a scale"
    bias = None if bias is None else bias.to(x.dtype)
    return comfy_kitchen.int8_linear(
        x, weight, scale, bias, x.dtype, convrot=group > 0, convrot_groupsize=group or 256
    )


def kitchen_int8_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What [batch, heads, tokens, width] find in each other, rotated and rounded to int8 on the
    way; the rows of a head need not lie one after the other."""
    import comfy_kitchen

    return comfy_kitchen.int8_attention(q, k, v)
