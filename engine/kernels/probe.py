"""Small trials of kernels at Flux.1's widths: what one gives on a device, what it should give."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import reference
from .hadamard import rotate
from .libraries import kitchen_int8_attention, kitchen_int8_product, row_scaled_product
from .row_format import EPS, FLOAT8_DTYPE, LIMITS, TILE, ActivationFormat

Pairs = Iterator[tuple[Tensor, Tensor]]  # what a kernel gave, and what it should have given

WIDTH, HEADS, TOKENS = 3072, 24, 16
GROUP = 256  # of columns that are rotated together
ROWS, RANKS = 48, 16  # of trials of products
ATTENDING = (200, 1000, 1100)  # tokens: comfy-kitchen attends in another way from 257 and 1025 on


def same(found: Tensor, right: Tensor) -> bool:
    """But for the rounding to 8 bits."""
    return bool((found.cpu().float() - right).norm() <= 0.04 * right.norm())


def fused(device: torch.device, float8: bool) -> Pairs:
    """All of `fused_triton` but the product; float8: rows in it as well."""
    from . import fused_triton

    x, gelu, y, shift, scale, qkv, weights = _random(
        (1, TOKENS, WIDTH), (1, TOKENS, 4 * WIDTH), (1, TOKENS, WIDTH), (1, 1, WIDTH),
        (1, 1, WIDTH), (1, TOKENS, 3 * WIDTH), (TOKENS, WIDTH),
    )  # fmt: skip
    formats = [(torch.bfloat16, 0.0, 0), (torch.int8, LIMITS[torch.int8], GROUP)]
    if float8:
        formats.append((FLOAT8_DTYPE, LIMITS[FLOAT8_DTYPE], 0))
    here = (x.to(device), (shift.to(device), scale.to(device)), None)
    beside = (x.to(device, torch.bfloat16), None, gelu.to(device, torch.bfloat16))
    for dtype, limit, group in formats:
        for given, right in (
            (here, reference.norm_modulate_quantize(x, (shift, scale), None, None, x.dtype)),
            (beside, reference.norm_modulate_quantize(x, None, gelu.clone(), None, x.dtype)),
        ):
            assert isinstance(right, Tensor)
            values, of_row = fused_triton.norm_modulate_quantize(*given, EPS, dtype, limit, group)
            found = values.float() if of_row is None else values.float() * of_row
            yield found, rotate(right, group)
    sums = x.to(device, copy=True)
    fused_triton.add_gated_(sums, scale.to(device), y.to(device, torch.bfloat16))
    yield sums, x + scale * y
    norm, rope = _norm_and_rope(weights)
    turned, weight = (given.to(device, torch.bfloat16) for given in (qkv, norm))
    fused_triton.rms_rope_(turned, weight, weight, rope.to(device), HEADS, EPS)
    reference.rms_rope_(qkv, norm, norm, rope, HEADS)
    yield turned, qkv
    product = y[0].to(device, torch.bfloat16)
    of_row, of_column = x[0, :, :1].abs(), x[0, 0].abs()
    given = (of_row.to(device), of_column.to(device), shift.flatten().to(device, torch.bfloat16))
    fused_triton.rescale_(product, *given)
    reference.rescale_(y[0], of_row, of_column, shift.flatten())
    yield product, y[0]
    for dtype, limit in LIMITS.items():
        stored = weights.mul(limit / 8).to(dtype)
        found = torch.empty(stored.shape, dtype=torch.bfloat16, device=device)
        fused_triton.dequantize(stored.to(device), of_row[:, 0].to(device), found)
        yield found, stored.float() * of_row


def kitchen(device: torch.device) -> Pairs:
    """What is used of comfy-kitchen."""
    import comfy_kitchen

    x, shift, scale, qkv, weights, rows = _random(
        (1, TOKENS, WIDTH), (1, 1, WIDTH), (1, 1, WIDTH), (1, TOKENS, 3 * WIDTH), (TOKENS, WIDTH),
        (1, 160, WIDTH),
    )  # fmt: skip
    here = [given.to(device, torch.bfloat16) for given in (x, scale, shift)]
    right = reference.norm_modulate_quantize(x, (shift, scale), None, None, x.dtype)
    assert isinstance(right, Tensor)
    yield comfy_kitchen.adaln(here[0], here[1], here[2], EPS), right
    norm, rope = _norm_and_rope(weights)
    turned, weight = (given.to(device, torch.bfloat16) for given in (qkv, norm))
    q, k, _ = turned.unflatten(-1, (3, HEADS, -1)).unbind(-3)
    comfy_kitchen.rms_rope_(q, k, rope.to(device).transpose(1, 2), weight, weight, EPS)
    reference.rms_rope_(qkv, norm, norm, rope, HEADS)
    yield turned, qkv
    rotated = ActivationFormat(torch.int8, LIMITS[torch.int8], GROUP)
    stored = reference.quantize_activations(weights, rotated, weights.dtype)
    assert stored.scale is not None
    of_weights = (stored.values.to(device), stored.scale.flatten().to(device), None)
    product = kitchen_int8_product(rows.to(device, torch.bfloat16), *of_weights, GROUP)
    yield product, rows @ weights.T


def int8_attention(device: torch.device, dtype: torch.dtype) -> Pairs:
    """comfy-kitchen's, of queries, keys and values that lie side by side, as a block has them."""
    for tokens in ATTENDING:
        (qkv,) = _random((1, tokens, 3 * WIDTH // HEADS))
        q, k, v = (x[:, None] for x in qkv.chunk(3, dim=-1))
        here = (x[:, None] for x in qkv.to(device, dtype).chunk(3, dim=-1))
        yield kitchen_int8_attention(*here), scaled_dot_product_attention(q, k, v)


def int8_product(device: torch.device) -> Pairs:
    """Ours in Triton, with rows and columns that do not fill a tile."""
    from . import triton_products

    yield _product(device, torch.int8, triton_products.product)


def float8_product(device: torch.device) -> Pairs:
    """PyTorch's, with a scale for each row of both."""
    yield _product(device, FLOAT8_DTYPE, row_scaled_product)


def low_rank(device: torch.device, dtype: torch.dtype, joined: bool) -> Pairs:
    """Ours in Triton: rows of few ranks, and what adds what they give: the product, if joined, and
    a pass after it, but for int8, which never takes one.

    Ranks as of a LoRA of rank 16 beside one layer and beside three that are one product: what is
    compiled for the trial then serves.
    """
    from . import triton_products

    def few_ranks(x, x_scale, down, scale, bias, out) -> None:
        triton_products.low_rank_rows(x, x_scale, down, scale, out[None])
        out += bias

    for ranks in (RANKS, 3 * RANKS):
        yield _product(device, dtype, few_ranks, ranks)
    columns = 2 * TILE - RANKS
    low, up = (x.bfloat16() for x in _random((1, ROWS, 3 * RANKS), (columns, RANKS)))
    first_rank = torch.tensor([0, RANKS], dtype=torch.int32)
    added = low.to(device), up.to(device), first_rank.to(device)
    of_terms = torch.empty(ROWS, columns, dtype=torch.float32, device="cpu")
    for first, some in ((0, slice(0, TILE)), (RANKS, slice(TILE, columns))):
        of_terms[:, some] = low[0, :, first : first + RANKS].float() @ up[some].float().T
    if joined:
        multiply = partial(triton_products.product, added=added)
        found, right = _product(device, dtype, multiply, columns)
        yield found, right + of_terms
    if dtype != torch.int8:
        (right,) = _random((ROWS, columns))
        triton_products.add_low_rank_(found := right.to(device, torch.bfloat16), added)
        yield found, right + of_terms


def _product(
    device: torch.device, dtype: torch.dtype, multiply, columns: int = 32
) -> tuple[Tensor, Tensor]:
    rows, weight, row_scale, scale, bias = _random(
        (ROWS, WIDTH), (columns, WIDTH), (ROWS, 1), (columns,), (columns,)
    )
    rows, weight = (x.mul(LIMITS[dtype] / 8).to(dtype) for x in (rows, weight))
    row_scale, bias = row_scale.abs() / WIDTH, bias.bfloat16()
    out = torch.empty(ROWS, columns, dtype=torch.bfloat16, device=device)
    multiply(*(x.to(device) for x in (rows, row_scale, weight, scale, bias)), out)
    return out, (rows.float() * row_scale) @ (weight.float() * scale[:, None]).T + bias


def _norm_and_rope(weights: Tensor) -> tuple[Tensor, Tensor]:
    rope = weights[:, :256].reshape(1, 1, TOKENS, 64, 2, 2)
    return weights[0, : WIDTH // HEADS], rope.contiguous()


def _random(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    return [draw(shape) for shape in shapes]
