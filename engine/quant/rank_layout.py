"""Where the low-rank terms of one layer lie, so that they are few products."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ..kernels.row_format import TILE
from .low_rank import Adapter, LowRankTerm

RANK_MULTIPLE = 16  # of the rows of a matrix that units multiply in 8 bits
Adapters = Sequence[tuple[Adapter, float]]  # each with its strength


@dataclass(frozen=True)
class Span:
    """Columns of a layer, and the ranks of all its terms that reach them."""

    columns: slice
    ranks: slice


@dataclass(frozen=True)
class RankLayout:
    """Where the terms of a layer are kept. downs: one after the other, each once; terms: with
    strengths, the gains of their rows and their places among the downs; ranks: of all, and
    those of a span, multiples of RANK_MULTIPLE."""

    downs: Sequence[Tensor]
    terms: Sequence[tuple[LowRankTerm, float, Tensor | None, slice]]
    ranks: int
    spans: Sequence[Span]
    span_ranks: int

    @property
    def inputs(self) -> int:
        """Of the widest down."""
        return max((down.shape[1] for down in self.downs), default=0)

    def first_ranks(self, columns: int) -> list[int] | None:
        """For each tile of columns, 0 where no term is; None if one is in two spans."""
        found: dict[int, int] = {}
        for span in self.spans:
            for tile in range(span.columns.start // TILE, -(-span.columns.stop // TILE)):
                if found.setdefault(tile, span.ranks.start) != span.ranks.start:
                    return None
        return [found.get(tile, 0) for tile in range(-(-columns // TILE))]


def rank_layout(name: str, adapters: Adapters) -> RankLayout:
    """Ranks that reach the same columns lie together, as far as terms do not share them."""
    given = [
        (term, strength, adapter.gains.get(name))
        for adapter, strength in adapters
        for term in adapter.terms.get(name, ())
    ]
    downs: list[Tensor] = []
    places: dict[int, slice] = {}
    terms, ranks = [], 0
    for term, strength, gains in sorted(given, key=lambda some: some[0].first):
        if id(term.down) not in places:
            places[id(term.down)] = slice(ranks, ranks + term.rank)
            downs.append(term.down)
            ranks += term.rank
        terms.append((term, strength, gains, places[id(term.down)]))
    ranks = _padded(ranks)
    reached = [(term.columns, place) for term, _, _, place in terms]
    return RankLayout(downs, terms, ranks, *_spans(reached, ranks))


def _spans(reached: Sequence[tuple[slice, slice]], ranks: int) -> tuple[list[Span], int]:
    """Columns that the same ranks reach, and how many ranks reach columns at most; every span has
    so many, of which some may give nothing. reached: columns and ranks of each term."""
    edges = sorted({edge for columns, _ in reached for edge in (columns.start, columns.stop)})
    found: list[tuple[int, int, int]] = []
    most = 0
    for start, stop in pairwise(edges):
        met = [place for columns, place in reached if columns.start <= start < columns.stop]
        if met:
            first = min(place.start for place in met) // RANK_MULTIPLE * RANK_MULTIPLE
            most = max(most, _padded(max(place.stop for place in met)) - first)
            found.append((start, stop, first))
    spans: list[Span] = []
    for start, stop, first in found:
        first = min(first, ranks - most)
        some = slice(first, first + most)
        if spans and spans[-1].columns.stop == start and spans[-1].ranks == some:
            start = spans.pop().columns.start
        spans.append(Span(slice(start, stop), some))
    return spans, most


def _padded(ranks: int) -> int:
    return -(-ranks // RANK_MULTIPLE) * RANK_MULTIPLE
