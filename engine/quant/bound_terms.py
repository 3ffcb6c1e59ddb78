"""What adapters add to the products of one layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..kernels.matmul import (
    add_low_rank_,
    adds_low_rank,
    has_low_rank_kernels,
    low_rank_rows,
    product,
)
from ..kernels.row_format import TILE
from .formats import BFLOAT16
from .linear import ALL, Rows, StoredLinear
from .rank_layout import Span


@dataclass(frozen=True)
class ColumnTerms:
    """What is added to some columns of a product: all at once, as a `LowRankProduct` of up and
    first_ranks, or one by one. sums: for each which of these columns, which ranks, None meaning
    all, and up^T."""

    up: Tensor
    first_ranks: Tensor | None
    sums: Sequence[tuple[slice | None, slice | None, Tensor]]


@dataclass(frozen=True)
class BoundTerms:
    """What adapters add to the products of one layer: y[:, columns] += (x down^T)[:, ranks] up^T.

    down: [ranks of all terms, in], in the format of the layer's rows; up: [out, ranks of a span],
    scale and strength included, zero where no term is; first_ranks: the first of the ranks that
    reach each tile of columns, None where `up` cannot be added within the layer's own product:
    a tile is in two spans, or the product is changed before. gain, bias: float32 [out] or None,
    y * gain + bias comes before the terms. x may have inputs that only `down` sees.
    """

    down: StoredLinear | None = None
    up: Tensor | None = None
    spans: Sequence[Span] = ()
    first_ranks: Tensor | None = None
    gain: Tensor | None = None
    bias: Tensor | None = None
    _parts: dict[tuple[int, int], ColumnTerms] = field(default_factory=dict, init=False)

    def to(self, device: torch.device) -> "BoundTerms":
        """The same in memory of `device`."""

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        down = self.down
        if down is not None:
            down = layer_of(down.weight.to(device), moved(down.scale), down.group)
        vectors = moved(self.first_ranks), moved(self.gain), moved(self.bias)
        return BoundTerms(down, moved(self.up), self.spans, *vectors)

    def low(self, layer: StoredLinear, x: Rows) -> Tensor | None:
        """x down^T of rows of the layer, for any columns of their product: parts of a sum, [parts,
        rows, ranks]."""
        if self.down is None:
            return None
        if has_low_rank_kernels(x):
            return low_rank_rows(x, *self.down.matrix()[:2])
        assert layer.method is not None
        return layer.method(self.down, x, None, ALL).flatten(0, -2)[None]

    def product(
        self, layer: StoredLinear, x: Rows, out: Tensor | None, columns: slice, low: Tensor | None
    ) -> Tensor:
        """What the method of the layer gives, and the terms of `low`, which is that of x."""
        assert layer.method is not None
        if isinstance(x, Tensor) and x.shape[-1] > layer.weight.shape[1]:
            x = x[..., : layer.weight.shape[1]]
        if low is None:
            return self._changed(layer.method(layer, x, out, columns), columns)
        terms = self._of(columns)
        added = None if terms.first_ranks is None else (low, terms.up, terms.first_ranks)
        if added is not None and adds_low_rank(x, layer.weight):
            return product(x, *layer.matrix(columns), out, added)
        y = self._changed(layer.method(layer, x, out, columns), columns)
        flat = y.flatten(0, -2)
        if added is not None and has_low_rank_kernels(x):
            add_low_rank_(flat, added)
            return y
        low = low[0] if len(low) == 1 else low.sum(0)
        for some, ranks, up in terms.sums:
            part = flat if some is None else flat[:, some]
            part.addmm_(low if ranks is None else low[:, ranks], up.to(y.dtype))
        return y

    def _changed(self, y: Tensor, columns: slice) -> Tensor:
        """By gain and bias, in place."""
        if self.gain is not None:
            y *= self.gain[columns]
        if self.bias is not None:
            y += self.bias[columns].to(y.dtype)
        return y

    def _of(self, columns: slice) -> ColumnTerms:
        """Made once for each columns: there are a few, and they are asked for at every step."""
        assert self.up is not None
        assert self.down is not None
        first, last, _ = columns.indices(self.up.shape[0])
        if (first, last) in self._parts:
            return self._parts[first, last]
        sums = []
        for span in self.spans:
            begin, end = max(first, span.columns.start), min(last, span.columns.stop)
            if begin < end:
                some = None if (begin, end) == (first, last) else slice(begin - first, end - first)
                ranks = None if self.up.shape[1] == len(self.down.weight) else span.ranks
                sums.append((some, ranks, self.up[begin:end].T))
        tiles = self.first_ranks
        if tiles is not None:
            tiles = None if first % TILE else tiles[first // TILE :]
        return self._parts.setdefault((first, last), ColumnTerms(self.up[first:last], tiles, sums))


def layer_of(weight: Tensor, scale: Tensor | None, group: int) -> StoredLinear:
    """A layer without a bias of these, as `StoredLinear` has them."""
    layer = StoredLinear(weight.shape[1], weight.shape[0], False, BFLOAT16)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if scale is not None:
        layer.scale = nn.Parameter(scale, requires_grad=False)
    layer.group = group
    return layer
