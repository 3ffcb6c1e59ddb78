"""The fused kernels, in Triton: one pass over memory where PyTorch takes several.

Imported only where Triton is (see `dispatch`). Every program holds one whole row in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_start import cdiv, power_of_2, start

ROUNDER = tl.constexpr(1.5 * 2**23)  # float32 has no fractions from here on: adding it rounds


@triton.jit
def _gelu(x, PTX: tl.constexpr):
    # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)); the factor is -2 / log(2).
    u = x * (0.7978845608028654 + 0.035677408136300125 * (x * x))
    e = tl.exp2(u * -2.8853900817779268) + 1.0
    if PTX:  # a division that also guards denormals takes several times as long
        return x * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [e], dtype=tl.float32, is_pure=True, pack=1
        )
    return x / e


@triton.jit
def _norm_modulate_quantize(
    x_ptr, more_ptr, shift_ptr, scale_ptr, out_ptr, row_scale_ptr,
    tokens, x_batch, x_row, more_batch, more_row, mod_batch,
    WIDTH: tl.constexpr, MORE: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, ROTATE: tl.constexpr, LIMIT: tl.constexpr, ROUND: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch = row // tokens
    token = row % tokens
    columns = tl.arange(0, BLOCK)
    x = tl.zeros((BLOCK,), tl.float32)
    if WIDTH > 0:
        place = x_ptr + batch * x_batch + token * x_row + columns
        x = tl.load(place, mask=columns < WIDTH, other=0.0).to(tl.float32)
    if MORE > 0:
        place = more_ptr + batch * more_batch + token * more_row + columns - WIDTH
        inside = (columns >= WIDTH) & (columns < WIDTH + MORE)
        x += _gelu(tl.load(place, mask=inside, other=0.0).to(tl.float32), PTX)
    if NORM:
        mean = tl.sum(x, axis=0) / WIDTH
        centred = tl.where(columns < WIDTH, x - mean, 0.0)
        deviation = tl.sqrt(tl.sum(centred * centred, axis=0) / WIDTH + EPS)
        modulation = batch * mod_batch + columns
        scale = tl.load(scale_ptr + modulation, mask=columns < WIDTH, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + modulation, mask=columns < WIDTH, other=0.0).to(tl.float32)
        x = centred * (1.0 / deviation) * (1.0 + scale) + shift
    if ROTATE:
        # The regular Hadamard matrix of 4 is half the sum of all four less the one in the mirror;
        # that of 256 is the same along each of four axes. The mirrors are left to the end.
        x = tl.reshape(x, (BLOCK // 256, 4, 4, 4, 4))
        x = 0.5 * tl.sum(x, axis=4, keep_dims=True) - x
        x = 0.5 * tl.sum(x, axis=3, keep_dims=True) - x
        x = 0.5 * tl.sum(x, axis=2, keep_dims=True) - x
        x = 0.5 * tl.sum(x, axis=1, keep_dims=True) - x
        x = tl.reshape(x, (BLOCK,))
    if LIMIT > 0:
        row_scale = tl.maximum(tl.max(tl.abs(x), axis=0) / LIMIT, 1e-30)
        tl.store(row_scale_ptr + row, row_scale)
        x = x * (1.0 / row_scale)
        if ROUND:  # the integer is then the low byte, which costs less than a conversion
            x = (x + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
        else:
            x = tl.clamp(x, -LIMIT, LIMIT)
    place = columns
    inside = columns < WIDTH + MORE
    if (ROTATE and ROUND) and PTX:  # Triton 3.3 takes two at a time
        # Mirror the 8 bytes that a thread has among themselves, and the place of all 8, so that
        # they are stored at once.
        x = tl.inline_asm_elementwise(
            "prmt.b32 $0, $3, 0, 0x0123; prmt.b32 $1, $2, 0, 0x0123;", "=r,=r,r,r", [x],
            dtype=tl.int8, is_pure=True, pack=8,
        )  # fmt: skip
        place = tl.max_contiguous(tl.multiple_of(columns ^ 248, 8), 8)
        inside = tl.max_constancy(place < WIDTH + MORE, 8)
    elif ROTATE:
        place = columns ^ 255
    tl.store(out_ptr + row * (WIDTH + MORE) + place, x.to(out_ptr.dtype.element_ty), mask=inside)


def norm_modulate_quantize(
    x: Tensor | None,
    norm: tuple[Tensor, Tensor] | None,
    gelu: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    limit: float = 0.0,
    group: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """`rows.prepare` in one kernel: the values in `dtype`, and their scale if they have a limit.

    group: columns that are rotated together, 0 or 256.
    """
    source = x if x is not None else gelu
    assert source is not None
    batch, tokens, _ = source.shape
    width = 0 if x is None else x.shape[-1]
    more = 0 if gelu is None else gelu.shape[-1]
    x, gelu = _unit_stride(x), _unit_stride(gelu)
    out = torch.empty(batch, tokens, width + more, dtype=dtype, device=source.device)
    scale = None
    if limit:
        scale = torch.empty(batch, tokens, 1, dtype=torch.float32, device=source.device)
    shift, factor = norm or (None, None)
    block = power_of_2(width + more)
    warps = 8 if block > 8192 else 4
    # The assembly takes 8 neighbours of one thread, which has them from so many columns on.
    ptx = source.is_cuda and block >= 8 * 32 * warps
    start(
        _norm_modulate_quantize, source.device, (batch * tokens, 1, 1),
        (
            x, gelu, shift, factor, out, scale,
            tokens,
            0 if x is None else x.stride(0), 0 if x is None else x.stride(1),
            0 if gelu is None else gelu.stride(0), 0 if gelu is None else gelu.stride(1),
            0 if shift is None or len(shift) == 1 else shift.stride(0),
        ),
        WIDTH=width, MORE=more, BLOCK=block, NORM=norm is not None,
        EPS=eps, ROTATE=group > 0, LIMIT=limit, ROUND=dtype == torch.int8, PTX=ptx,
        num_warps=warps,
    )  # fmt: skip
    return out, scale


@triton.jit
def _rms_rope(
    qkv_ptr, q_norm_ptr, k_norm_ptr, rope_ptr,
    tokens, qkv_batch, qkv_row, rope_batch,
    HEADS: tl.constexpr, HALF: tl.constexpr, SOME: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch = row // tokens
    token = row % tokens
    head = tl.program_id(1) * SOME + tl.arange(0, SOME)  # the queries' heads, then the keys'
    column = tl.arange(0, 2 * HALF)
    there = (head < 2 * HEADS)[:, None]
    place = batch * qkv_batch + token * qkv_row + head[:, None] * (2 * HALF) + column[None, :]
    x = tl.load(qkv_ptr + place, mask=there, other=0.0).to(tl.float32)
    x = x / tl.sqrt(tl.sum(x * x, axis=1) / (2 * HALF) + EPS)[:, None]
    q_norm = tl.load(q_norm_ptr + column).to(tl.float32)
    k_norm = tl.load(k_norm_ptr + column).to(tl.float32)
    x *= tl.where((head < HEADS)[:, None], q_norm[None, :], k_norm[None, :])
    even, odd = tl.split(tl.reshape(x, (SOME, HALF, 2)))
    turn = rope_ptr + batch * rope_batch + token * (4 * HALF) + 4 * tl.arange(0, HALF)[None, :]
    turned_even = tl.load(turn) * even + tl.load(turn + 1) * odd
    turned_odd = tl.load(turn + 2) * even + tl.load(turn + 3) * odd
    x = tl.reshape(tl.join(turned_even, turned_odd), (SOME, 2 * HALF))
    tl.store(qkv_ptr + place, x.to(qkv_ptr.dtype.element_ty), mask=there)


@triton.jit
def _dequantize(
    weight_ptr, scale_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FLOAT8: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = row * WIDTH + column
    weight = tl.load(weight_ptr + place, mask=column < WIDTH, other=0)
    if FLOAT8:
        # Triton has no float8_e4m3fn on cards before Ada: these bits are float16's, 2^8 times less.
        bits = weight.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        value = tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    else:
        value = weight.to(tl.float32)
    out = value * tl.load(scale_ptr + row)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=column < WIDTH)


def dequantize(weight: Tensor, scale: Tensor, out: Tensor) -> None:
    """out [rows, columns] = weight * scale[:, None], rounded once; all contiguous.

    weight: float8_e4m3fn or int8.
    """
    rows, width = weight.shape
    block = min(4096, power_of_2(width))
    programs = (rows, cdiv(width, block), 1)
    float8 = weight.dtype == torch.float8_e4m3fn
    given = (weight.view(torch.uint8) if float8 else weight, scale, out)
    start(_dequantize, weight.device, programs, given, WIDTH=width, BLOCK=block, FLOAT8=float8)


def rms_rope_(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, rope: Tensor, heads: int, eps: float
) -> None:
    """`rows.rms_rope_` in one kernel."""
    batch, tokens, width = qkv.shape
    half = width // (6 * heads)
    assert qkv.stride(-1) == 1
    assert rope[0].is_contiguous()
    some = 16  # heads at once
    start(
        _rms_rope, qkv.device, (batch * tokens, cdiv(2 * heads, some), 1),
        (
            qkv, q_norm, k_norm, rope,
            tokens, qkv.stride(0), qkv.stride(1), rope.stride(0) if len(rope) > 1 else 0,
        ),
        HEADS=heads, HALF=half, SOME=some, EPS=eps,
    )  # fmt: skip


@triton.jit
def _add_gated(
    x_ptr, gate_ptr, y_ptr, tokens, x_batch, gate_batch, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = x_ptr + row // tokens * x_batch + row % tokens * WIDTH + column
    gate = tl.load(gate_ptr + row // tokens * gate_batch + column, mask=inside, other=0.0)
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    out = x + gate.to(tl.float32) * y
    tl.store(place, out.to(x_ptr.dtype.element_ty), mask=inside)


def add_gated_(x: Tensor, gate: Tensor, y: Tensor) -> None:
    """Add gate * y, rounded once. x, y: [batch, tokens, width]; gate: [batch, 1, width]."""
    batch, tokens, width = x.shape
    assert x[0].is_contiguous()
    y = y.contiguous()
    given = (x, gate, y, tokens, x.stride(0), gate.stride(0) if len(gate) > 1 else 0)
    block = power_of_2(width)
    start(_add_gated, x.device, (batch * tokens, 1, 1), given, WIDTH=width, BLOCK=block)


@triton.jit
def _rescale(
    y_ptr, row_scale_ptr, scale_ptr, bias_ptr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = y_ptr + row * WIDTH + column
    y = tl.load(place, mask=inside, other=0.0).to(tl.float32) * tl.load(row_scale_ptr + row)
    y *= tl.load(scale_ptr + column, mask=inside, other=0.0)
    if BIAS:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, y.to(y_ptr.dtype.element_ty), mask=inside)


def rescale_(y: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """`products.rescale_` in one kernel; all contiguous."""
    rows, width = y.shape
    block = min(4096, power_of_2(width))
    given = (y, row_scale, scale, bias)
    start(
        _rescale, y.device, (rows, cdiv(width, block), 1), given,
        WIDTH=width, BLOCK=block, BIAS=bias is not None,
    )  # fmt: skip


def _unit_stride(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()
