"""The fused kernels, in Triton: one pass over memory where PyTorch takes several.

Imported only where Triton is (see `kernels`). Every program holds one whole row in registers.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_format import TILE, LowRankProduct

ROUNDER = tl.constexpr(1.5 * 2**23)  # float32 has no fractions from here on: adding it rounds
_compiled: dict[tuple[Any, ...], Any] = {}


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
    block = _power_of_2(width + more)
    warps = 8 if block > 8192 else 4
    # The assembly takes 8 neighbours of one thread, which has them from so many columns on.
    ptx = source.is_cuda and block >= 8 * 32 * warps
    _start(
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
    block = min(4096, _power_of_2(width))
    programs = (rows, _cdiv(width, block), 1)
    float8 = weight.dtype == torch.float8_e4m3fn
    given = (weight.view(torch.uint8) if float8 else weight, scale, out)
    _start(_dequantize, weight.device, programs, given, WIDTH=width, BLOCK=block, FLOAT8=float8)


def rms_rope_(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, rope: Tensor, heads: int, eps: float
) -> None:
    """`rows.rms_rope_` in one kernel."""
    batch, tokens, width = qkv.shape
    half = width // (6 * heads)
    assert qkv.stride(-1) == 1
    assert rope[0].is_contiguous()
    some = 16  # heads at once
    _start(
        _rms_rope, qkv.device, (batch * tokens, _cdiv(2 * heads, some), 1),
        (
            qkv, q_norm, k_norm, rope,
            tokens, qkv.stride(0), qkv.stride(1), rope.stride(0) if len(rope) > 1 else 0,
        ),
        HEADS=heads, HALF=half, SOME=some, EPS=eps,
    )  # fmt: skip


@triton.jit
def _int8_product(
    x_tiles, w_tiles, x_scale_ptr, w_scale_ptr, bias_ptr, out_tiles,
    low_ptr, up_ptr, first_rank_ptr, low_row, rows, columns,
    DEPTH: tl.constexpr, BIAS: tl.constexpr, SIDE: tl.constexpr, GROUP: tl.constexpr,
    RANKS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # Programs that run at the same time share rows and columns, which then stay in the cache.
    program = tl.program_id(0)
    high, across = tl.cdiv(rows, SIDE), tl.cdiv(columns, SIDE)
    first = program // (GROUP * across) * GROUP
    size = min(high - first, GROUP)
    top = (first + program % (GROUP * across) % size) * SIDE
    left = program % (GROUP * across) // size * SIDE

    total = tl.zeros((SIDE, SIDE), tl.int32)
    for start in range(0, DEPTH, SIDE):
        x, w = x_tiles.load([top, start]), w_tiles.load([left, start])
        total += tl.dot(x, w.T, out_dtype=tl.int32)

    row, column = top + tl.arange(0, SIDE), left + tl.arange(0, SIDE)
    x_scale = tl.load(x_scale_ptr + row, mask=row < rows)
    w_scale = tl.load(w_scale_ptr + column, mask=column < columns)
    out = total.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
    if BIAS:
        out += tl.load(bias_ptr + column, mask=column < columns).to(tl.float32)[None, :]
    if RANKS > 0:
        first_rank = tl.multiple_of(tl.load(first_rank_ptr + left // SIDE), 16)
        for start in tl.range(0, RANKS, STEP, num_stages=2):
            rank = start + tl.arange(0, STEP)[None, :]
            of_row = low_ptr + row[:, None] * low_row + first_rank + rank
            of_column = up_ptr + column[:, None] * RANKS + rank
            low = tl.load(of_row, mask=(row < rows)[:, None], other=0.0)
            up = tl.load(of_column, mask=(column < columns)[:, None], other=0.0)
            out = tl.dot(low, up.T, out, input_precision="ieee")
    out_tiles.store([top, left], out.to(out_tiles.dtype))


def int8_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor,
    added: LowRankProduct | None = None,
) -> None:  # fmt: skip
    """out [rows, columns] = (x * x_scale) (weight * scale)^T + bias, the sums exact in int32.

    x: int8 [rows, depth], x_scale: float32 [rows, 1]; weight: int8 [columns, depth], scale:
    float32 [columns]; everything contiguous, depth and columns multiples of 16.
    added: to that, before it is rounded; its ranks multiples of 16.
    """
    (rows, depth), columns = x.shape, weight.shape[0]  # `len` takes a microsecond
    if depth % 16 or columns % 16:
        raise ValueError(f"the int8 kernel needs multiples of 16, not {columns}x{depth}")
    from triton.tools.tensor_descriptor import TensorDescriptor  # since Triton 3.4

    # The best size of those that were measured on an H200.
    tiles = (TensorDescriptor.from_tensor(t, [TILE, TILE]) for t in (x, weight, out))
    x_tiles, w_tiles, out_tiles = tiles
    ranks, beside = 0, (None, None, None, None)
    if added is not None:
        low, up, _ = added
        ranks, beside = up.shape[1], (*added, low.shape[1])
    _start(
        _int8_product, x.device, (_cdiv(rows, TILE) * _cdiv(columns, TILE), 1, 1),
        (x_tiles, w_tiles, x_scale, scale, bias, out_tiles, *beside, rows, columns),
        DEPTH=depth, BIAS=bias is not None, SIDE=TILE, GROUP=8,
        RANKS=ranks, STEP=min(32, ranks & -ranks), num_warps=8,
    )  # fmt: skip


@triton.jit
def _low_rank_rows(
    x_ptr, x_scale_ptr, down_ptr, scale_ptr, out_ptr, rows,
    DEPTH: tl.constexpr, RANKS: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
    DEEP: tl.constexpr, INTEGERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * HIGH + tl.arange(0, HIGH)
    rank = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    deep = tl.arange(0, DEEP)[None, :]
    of_x = x_ptr + row.to(tl.int64)[:, None] * DEPTH + deep
    of_down = down_ptr + rank[:, None] * DEPTH + deep
    total = tl.zeros((HIGH, WIDE), tl.int32 if INTEGERS else tl.float32)
    # Few programs, each of which waits for memory: so much of it is asked for ahead.
    for start in tl.range(0, DEPTH, DEEP, num_stages=5):
        inside = start + deep < DEPTH
        x = tl.load(of_x + start, mask=(row < rows)[:, None] & inside, other=0.0)
        down = tl.load(of_down + start, mask=(rank < RANKS)[:, None] & inside, other=0.0)
        total += tl.dot(x, down.T, out_dtype=total.dtype)
    x_scale = tl.load(x_scale_ptr + row, mask=row < rows)
    scale = tl.load(scale_ptr + rank, mask=rank < RANKS)
    out = total.to(tl.float32) * x_scale[:, None] * scale[None, :]
    place = out_ptr + row[:, None] * RANKS + rank[None, :]
    inside = (row < rows)[:, None] & (rank < RANKS)[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=inside)


def low_rank_rows(x: Tensor, x_scale: Tensor, down: Tensor, scale: Tensor, out: Tensor) -> None:
    """out [rows, ranks] = (x * x_scale) (down * scale)^T, as of `int8_product`, in int8 or float8.

    For some 16 to 256 ranks, with which the large tiles of a product would leave most of a card
    without work.
    """
    (rows, depth), ranks = x.shape, down.shape[0]
    high, wide = 32, min(64, _power_of_2(ranks))
    _start(
        _low_rank_rows, x.device, (_cdiv(rows, high), _cdiv(ranks, wide), 1),
        (x, x_scale, down, scale, out, rows),
        DEPTH=depth, RANKS=ranks, HIGH=high, WIDE=wide, DEEP=128 if wide == 64 else 256,
        INTEGERS=x.dtype == torch.int8,
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
    block = _power_of_2(width)
    _start(_add_gated, x.device, (batch * tokens, 1, 1), given, WIDTH=width, BLOCK=block)


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
    block = min(4096, _power_of_2(width))
    given = (y, row_scale, scale, bias)
    _start(
        _rescale, y.device, (rows, _cdiv(width, block), 1), given,
        WIDTH=width, BLOCK=block, BIAS=bias is not None,
    )  # fmt: skip


def _start(
    kernel: Any,
    device: torch.device,
    programs: tuple[int, int, int],
    given: tuple[Any, ...],
    num_warps: int = 4,
    **constants: Any,
) -> None:
    """Start a kernel; `given` and `constants` are its arguments in their order.

    At each call Triton finds out which compiled kernel the arguments need, which takes longer than
    starting it. So what it found is kept, by all that it looks at.
    """
    key = (kernel.__name__, device, num_warps, *map(_kind, given), *constants.values())
    with _on(device):
        if compiled := _compiled.get(key):
            compiled[programs](*given, *constants.values())
        else:  # Triton's interpreter gives None
            _compiled[key] = kernel[programs](*given, **constants, num_warps=num_warps)


def _kind(given: Any) -> Any:
    """What of a kernel's argument is compiled in."""
    if isinstance(given, Tensor):
        return given.dtype, given.data_ptr() % 16 == 0
    if isinstance(given, int):
        return given == 1, given % 16 == 0, given < 2**31
    return None if given is None else given.base.dtype  # of a TensorDescriptor, aligned


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels start on the current card; Triton's interpreter takes tensors of the CPU."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


# Triton's own take a few microseconds, and are called some hundred times a step.
def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _unit_stride(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()
