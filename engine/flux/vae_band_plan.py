"""The plan for `vae_bands`: how large the bands are in which the autoencoder runs."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from weakref import WeakSet

from .geometry import VAE_DECODER, VAE_ENCODER, VAEPart

PARTS = 4  # of a band, converted to float32 one after another to be measured
_ROWS = (16, 2**31)  # of a band, least and most: smaller ones save little and leave a card idle
_QUERIES = (256, 4096)  # the most because a score for each pair of tokens would be too much
_SMALL_BYTES = 2**20  # scales, shifts and moments, which no cost below counts
Shape = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True)
class BandPlan:
    """How to run over pictures of one size.

    passes: for each pass over a map, in order: how many rows a band has (of attention: tokens),
    whether the map that it fills stays on the device, and the bytes that it allocates there.
    peak_bytes: device memory held at most, without weights, input and scratch of convolutions.
    host_bytes: host memory held at most, pinned for a CUDA device; includes a decoded picture.
    """

    passes: tuple[tuple[int, bool, int], ...]
    peak_bytes: int
    host_bytes: int


def plan_decode(height: int, width: int, itemsize: int, limit_bytes: float) -> BandPlan:
    """The largest bands for latents of `height` x `width` that fit into `limit_bytes`.

    itemsize: bytes of a value of the dtype to compute in. Where nothing fits: the smallest bands,
    whose `peak_bytes` is above the limit.
    """
    return _plan(VAE_DECODER, (height, width), itemsize, limit_bytes, resident=False)


def plan_encode(height: int, width: int, itemsize: int, limit_bytes: float) -> BandPlan:
    """As `plan_decode`; height and width in pixels."""
    return _plan(VAE_ENCODER, (height, width), itemsize, limit_bytes, resident=True)


def _plan(
    part: VAEPart, size: tuple[int, int], itemsize: int, limit_bytes: float, resident: bool
) -> BandPlan:
    """resident: whether the result stays on the device."""

    def walk(limit_bytes: float, reserve: int) -> _Planner:
        planner = _Planner(itemsize, limit_bytes, reserve)
        shape = (part.channels_in, *size)
        x = planner.add(shape, True, prod(shape) * itemsize)
        planner.whole(part, x, resident)
        return planner

    smallest = walk(0, 0)
    planner = walk(limit_bytes - _SMALL_BYTES, smallest.peak_bytes)
    return BandPlan(tuple(planner.chosen), planner.peak_bytes + _SMALL_BYTES, planner.host_bytes)


@dataclass(frozen=True, eq=False)
class _Map:
    shape: Shape
    resident: bool  # on the device
    nbytes: int  # that it keeps


class _Planner:
    """Makes the choices of a run, by walking as `vae_bands` does, with maps that have only a size.

    A map lives as long as there: while a name here stands for it. Each pass says what a band of so
    many rows costs: the values that are on the device for it at once, besides those of whole maps.
    reserve: bytes with which every pass gets by when all maps are in host memory.
    """

    def __init__(self, itemsize: int, limit_bytes: float, reserve: int):
        self.itemsize, self.limit_bytes, self.reserve = itemsize, limit_bytes, reserve
        self.chosen: list[tuple[int, bool, int]] = []
        self.maps: WeakSet[_Map] = WeakSet()
        self.peak_bytes = self.host_bytes = 0

    def whole(self, part: VAEPart, x: _Map, resident: bool) -> _Map:
        x = self.convolve(x, part.first)
        for kind, channels in part.steps:
            x = getattr(self, kind)(x, channels)
        return self.convolve(x, part.channels_out, measured=False, resident=resident)

    def convolve(
        self, x: _Map, after: int, measured: bool = True, resident: bool | None = None
    ) -> _Map:
        before, height, width = x.shape

        def cost(rows: int) -> int:
            return width * ((rows + 2) * before + rows * after)

        return self.fill(height, cost, (after, height, width), None, measured, resident)

    def residual(self, x: _Map, after: int) -> _Map:
        inner = self.convolve(x, after)
        before, height, width = x.shape
        beside = (0 if x.resident else before) + (0 if before == after else after)

        def cost(rows: int) -> int:
            return width * (rows * after + max((rows + 2) * after, rows * beside))

        return self.fill(height, cost, inner.shape, x if after <= before else None)

    def up(self, x: _Map, channels: int) -> _Map:
        _, height, width = x.shape

        def cost(rows: int) -> int:
            return channels * width * (4 * (rows + 2) + max(rows + 2, 4 * rows))

        return self.fill(height, cost, (channels, 2 * height, 2 * width))

    def down(self, x: _Map, channels: int) -> _Map:
        _, height, width = x.shape
        shape = channels, height // 2, width // 2

        def cost(rows: int) -> int:
            read = 2 * rows + 1
            return channels * (read * (width + 1) + max(read * width, rows * shape[2]))

        return self.fill(shape[1], cost, shape)

    def attention(self, x: _Map, channels: int) -> _Map:
        count = x.shape[1] * x.shape[2]
        copied = 0 if x.resident else 1

        def keys_cost(rows: int) -> int:
            return 5 * rows * channels

        def cost(rows: int) -> int:
            # Without a fused kernel: all keys, scaled, beside the scores; then the scores twice.
            scores = rows * count
            return scores + max(scores, count * channels) + rows * channels * (2 + copied)

        pairs = self.fill(count, keys_cost, (2 * channels, count, 1), None, False, True, _QUERIES)
        filled = self.fill(count, cost, (channels, count, 1), x, bounds=_QUERIES)
        del pairs
        return replace(filled, shape=x.shape)

    def fill(
        self,
        count: int,
        cost: Callable[[int], int],
        shape: Shape,
        inside: _Map | None = None,
        measured: bool = True,
        resident: bool | None = None,
        bounds: tuple[int, int] = _ROWS,
    ) -> _Map:
        """inside: the map that is filled; resident: whether the new one stays on the device, None
        where there is a choice."""
        channels, height, width = shape
        nbytes = prod(shape) * self.itemsize
        room = self.limit_bytes - self.held(True)
        if inside is not None:
            resident = inside.resident
        elif resident is None:
            resident = nbytes + self.reserve <= room
        new = nbytes if resident and inside is None else 0

        def needed(rows: int) -> int:
            out_rows = rows * (height // count)
            out = prod((channels, out_rows, width)) * self.itemsize
            if measured and self.itemsize < 4:
                out += 4 * channels * -(-out_rows // PARTS) * width
            return max(cost(rows) * self.itemsize, out) + (new if rows < count else 0)

        least, most = bounds
        rows = count
        if count > most or needed(count) > room:
            rows = bisect_right(range(1, count), room, key=needed)
            rows = min(count, most, max(least, rows))
        self.chosen.append((rows, resident, needed(rows)))
        self.peak_bytes = max(self.peak_bytes, self.held(True) + needed(rows))
        if inside is not None and not (resident and rows == count):
            nbytes = inside.nbytes  # filled in place
        elif not resident:
            self.host_bytes = max(self.host_bytes, self.held(False) + nbytes)
        return self.add(shape, resident, nbytes)

    def add(self, shape: Shape, resident: bool, nbytes: int) -> _Map:
        self.maps.add(result := _Map(shape, resident, nbytes))
        return result

    def held(self, resident: bool) -> int:
        return sum(x.nbytes for x in self.maps if x.resident == resident)
