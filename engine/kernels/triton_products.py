"""Products in 8 bits and what adapters add to them, in Triton.

Imported only where Triton is (see `dispatch`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_format import TILE, LowRankProduct
from .triton_start import cdiv, power_of_2, start

MOST_RANKS = 128  # at once, that a program has room for


@triton.jit
def _plus_low_rank(
    out, low_ptr, up_ptr, first_rank_ptr, low_row, row, column, rows, columns,
    RANKS: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`out` at these rows and columns, and what a `LowRankProduct` adds there."""
    first_rank = tl.multiple_of(tl.load(first_rank_ptr), 16)
    # Few registers, or there is no room for a second program, which is what hides the waiting: so
    # nothing is loaded while something else is multiplied, and parts are not summed before.
    for part in tl.range(0, PARTS, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
        of_part = low_ptr + part * rows * low_row + first_rank
        for first in tl.range(0, RANKS, STEP, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
            rank = first + tl.arange(0, STEP)[None, :]
            known = rank < RANKS
            of_row = of_part + row[:, None] * low_row + rank
            of_column = up_ptr + column[:, None] * RANKS + rank
            low = tl.load(of_row, mask=known & (row < rows)[:, None], other=0.0)
            up = tl.load(of_column, mask=known & (column < columns)[:, None], other=0.0)
            out = tl.dot(low, up.T, out, input_precision="ieee")
    return out


@triton.jit
def _product(
    x_tiles, w_tiles, x_scale_ptr, w_scale_ptr, bias_ptr, out_tiles,
    low_ptr, up_ptr, first_rank_ptr, low_row, rows, columns,
    DEPTH: tl.constexpr, BIAS: tl.constexpr, SIDE: tl.constexpr, GROUP: tl.constexpr,
    RANKS: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr, INTEGERS: tl.constexpr,
):  # fmt: skip
    # Programs that run at the same time share rows and columns, which then stay in the cache.
    program = tl.program_id(0)
    high, across = tl.cdiv(rows, SIDE), tl.cdiv(columns, SIDE)
    first = program // (GROUP * across) * GROUP
    size = min(high - first, GROUP)
    top = (first + program % (GROUP * across) % size) * SIDE
    left = program % (GROUP * across) // size * SIDE

    total = tl.zeros((SIDE, SIDE), tl.int32 if INTEGERS else tl.float32)
    for deep in range(0, DEPTH, SIDE):
        x, w = x_tiles.load([top, deep]), w_tiles.load([left, deep])
        total = tl.dot(x, w.T, total, out_dtype=total.dtype)

    row, column = top + tl.arange(0, SIDE), left + tl.arange(0, SIDE)
    x_scale = tl.load(x_scale_ptr + row, mask=row < rows)
    w_scale = tl.load(w_scale_ptr + column, mask=column < columns)
    out = total.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
    if BIAS:
        out += tl.load(bias_ptr + column, mask=column < columns).to(tl.float32)[None, :]
    if RANKS > 0:
        out = _plus_low_rank(
            out, low_ptr, up_ptr, first_rank_ptr + left // SIDE, low_row,
            row, column, rows, columns, RANKS, STEP, PARTS,
        )  # fmt: skip
    out_tiles.store([top, left], out.to(out_tiles.dtype))


def product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor,
    added: LowRankProduct | None = None,
) -> None:  # fmt: skip
    """out [rows, columns] = (x * x_scale) (weight * scale)^T + bias, sums of int8 exact in int32.

    x: int8 or float8 [rows, depth], x_scale: float32 [rows, 1]; weight: the same [columns, depth],
    scale: float32 [columns]; everything contiguous, depth and columns multiples of 16.
    added: to that, before it is rounded; its ranks multiples of 16.
    """
    (rows, depth), columns = x.shape, weight.shape[0]  # `len` takes a microsecond
    if depth % 16 or columns % 16:
        raise ValueError(f"a product's kernel needs multiples of 16, not {columns}x{depth}")
    from triton.tools.tensor_descriptor import TensorDescriptor  # since Triton 3.4

    # The best size of those that were measured on an H200.
    tiles = (TensorDescriptor.from_tensor(t, [TILE, TILE]) for t in (x, weight, out))
    x_tiles, w_tiles, out_tiles = tiles
    ranks, parts, beside = 0, 1, (None, None, None, None)
    if added is not None:
        low, up, _ = added
        ranks, parts, beside = up.shape[1], low.shape[0], (*added, low.shape[2])
    start(
        _product, x.device, (cdiv(rows, TILE) * cdiv(columns, TILE), 1, 1),
        (x_tiles, w_tiles, x_scale, scale, bias, out_tiles, *beside, rows, columns),
        DEPTH=depth, BIAS=bias is not None, SIDE=TILE, GROUP=16,
        RANKS=ranks, STEP=power_of_2(max(ranks, 16)) if ranks <= MOST_RANKS else 32, PARTS=parts,
        INTEGERS=x.dtype == torch.int8, num_warps=8,
    )  # fmt: skip


@triton.jit
def _low_rank_rows(
    x_ptr, x_scale_ptr, down_ptr, scale_ptr, out_ptr, rows, depth, ranks, depth_of_part,
    HIGH: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, AHEAD: tl.constexpr,
    EVEN: tl.constexpr, INTEGERS: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(2) * depth_of_part
    end = min(begin + depth_of_part, depth)
    row = tl.program_id(0) * HIGH + tl.arange(0, HIGH)
    rank = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    within = tl.arange(0, DEEP)[None, :]
    # Beyond the last row or rank it is read again: a load without a mask is the faster one.
    of_x = x_ptr + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * depth + within
    of_down = down_ptr + tl.minimum(rank, ranks - 1)[:, None] * depth + within
    total = tl.zeros((HIGH, WIDE), tl.int32 if INTEGERS else tl.float32)
    # Few programs, each of which waits for memory: so much of it is asked for ahead.
    for deep in tl.range(begin, end, DEEP, num_stages=AHEAD):
        if EVEN:
            x, down = tl.load(of_x + deep), tl.load(of_down + deep)
        else:
            inside = deep + within < end
            x = tl.load(of_x + deep, mask=inside, other=0.0)
            down = tl.load(of_down + deep, mask=inside, other=0.0)
        total = tl.dot(x, down.T, total, out_dtype=total.dtype)
    x_scale = tl.load(x_scale_ptr + row, mask=row < rows)
    scale = tl.load(scale_ptr + rank, mask=rank < ranks)
    out = total.to(tl.float32) * x_scale[:, None] * scale[None, :]
    place = out_ptr + (tl.program_id(2) * rows + row)[:, None] * ranks + rank[None, :]
    inside = (row < rows)[:, None] & (rank < ranks)[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=inside)


def low_rank_rows(x: Tensor, x_scale: Tensor, down: Tensor, scale: Tensor, out: Tensor) -> None:
    """out [parts, rows, ranks], whose sum is (x * x_scale) (down * scale)^T, as of `product`.

    For some 16 to 256 ranks, with which the large tiles of a product would leave most of a card
    without work. Each part is the sum over a share of the depth.
    """
    (rows, depth), (parts, _, ranks) = x.shape, out.shape
    # The best sizes of those that were measured on an H200 and fit into other cards' memory.
    if ranks > 64:
        high, wide, deep, ahead = 64, 32, 128, 6
    elif ranks > 32:
        high, wide, deep, ahead = 64, 64, 128, 5
    else:
        high, wide, deep, ahead = 64, power_of_2(ranks), 256, 4
    start(
        _low_rank_rows, x.device, (cdiv(rows, high), cdiv(ranks, wide), parts),
        (x, x_scale, down, scale, out, rows, depth, ranks, cdiv(depth, parts * deep) * deep),
        HIGH=high, WIDE=wide, DEEP=deep, AHEAD=ahead, EVEN=depth % deep == 0,
        INTEGERS=x.dtype == torch.int8,
    )  # fmt: skip


@triton.jit
def _add_low_rank(
    y_ptr, low_ptr, up_ptr, first_rank_ptr, low_row, ranks, rows, columns,
    HIGH: tl.constexpr, SIDE: tl.constexpr, TIMES: tl.constexpr, WIDE: tl.constexpr,
    SHARES: tl.constexpr, AHEAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    column, rank = tl.program_id(0) * SIDE + tl.arange(0, SIDE), tl.arange(0, WIDE)[None, :]
    low_ptr += tl.multiple_of(tl.load(first_rank_ptr + tl.program_id(0)), 16)
    of_column = up_ptr + column[:, None] * ranks + rank
    known = (column < columns)[:, None] & (rank < ranks)
    up = tl.load(of_column, mask=known, other=0.0)
    for time in tl.range(0, TIMES, num_stages=AHEAD):  # pyright: ignore[reportGeneralTypeIssues]
        row = (tl.program_id(1) * TIMES + time) * HIGH + tl.arange(0, HIGH)
        of_row = low_ptr + row[:, None] * low_row + rank
        found = (row < rows)[:, None] & (rank < ranks)
        place = y_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        y = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        for share in tl.static_range(SHARES):  # pyright: ignore[reportGeneralTypeIssues]
            more = rank < ranks - share * WIDE
            if share == 0:
                of_share = up
            else:
                of_share = tl.load(of_column + share * WIDE, mask=known & more, other=0.0)
            for part in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
                of_part = of_row + share * WIDE + part * rows * low_row
                low = tl.load(of_part, mask=found & more, other=0.0)
                y = tl.dot(low, of_share.T, y, input_precision="ieee")
        tl.store(place, y.to(y_ptr.dtype.element_ty), mask=inside)


def add_low_rank_(y: Tensor, added: LowRankProduct) -> None:
    """Add it to y [rows, columns], contiguous, rounded once."""
    (rows, columns), (low, up, _) = y.shape, added
    high, times, ranks = 64, 2, up.shape[1]  # the best of those that were measured on an H200
    wide = min(MOST_RANKS, power_of_2(ranks))
    shares = cdiv(ranks, wide)
    start(
        _add_low_rank, y.device, (cdiv(columns, TILE), cdiv(rows, high * times), 1),
        (y, *added, low.shape[2], ranks, rows, columns),
        HIGH=high, SIDE=TILE, TIMES=times, WIDE=wide, SHARES=shares,
        AHEAD=2 if shares == 1 else 1, PARTS=low.shape[0],
    )  # fmt: skip
