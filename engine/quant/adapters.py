"""Adapters beside the stored weights of a module, for the length of a run.

Beside, never merged: a weight that has been rounded to 8 bits would be rounded again, and a small
change of it lost. The input meets `down` in the format in which it meets the weight.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.hadamard import rotate
from .formats import BFLOAT16
from .linear import LinearMethod, StoredLinear
from .low_rank import Adapter, LowRankTerm
from .quantize import quantize_rows

RANK_MULTIPLE = 16  # of the rows of a matrix that units multiply in 8 bits

Adapters = Sequence[tuple[Adapter, float]]  # each with its strength


class BoundTerms:
    """What adapters add to the products of one layer: y[:, columns] += (x down^T)[:, ranks] up^T.

    down: [ranks of all terms, in], in the format of the layer's rows; ups: for each term its
    columns, its ranks and up [columns, rank], scale and strength included; bias: [out] or None.
    """

    def __init__(
        self,
        down: StoredLinear | None,
        ups: Sequence[tuple[slice, slice, Tensor]],
        bias: Tensor | None,
    ):
        self.down, self.ups, self.bias = down, ups, bias

    def add_to(self, y: Tensor, x: Any, columns: slice, method: LinearMethod | None) -> None:
        """Add to y [..., these columns], contiguous, what the rows x of the layer give."""
        first = columns.start or 0
        last, flat = first + y.shape[-1], y.flatten(0, -2)
        if self.bias is not None:
            flat += self.bias[columns].to(y.dtype)
        if self.down is None:
            return
        low = self.down(x) if method is None else method(self.down, x, None, slice(None))
        low = low.flatten(0, -2)
        for reached, ranks, up in self.ups:
            begin, end = max(first, reached.start), min(last, reached.stop)
            if begin < end:
                part = up[begin - reached.start : end - reached.start].to(y.dtype)
                flat[:, begin - first : end - first].addmm_(low[:, ranks], part.T)


@contextmanager
def adapted(
    module: nn.Module,
    adapters: Adapters,
    names: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[None]:
    """Let these layers of `module` add the terms of `adapters`, in memory of `device`.

    names: some of `touched`. The layers have their methods already. dtype: of the activations.
    """
    layers, norms = [], []
    try:
        for name in names:
            layer = module.get_submodule(name)
            assert isinstance(layer, StoredLinear)
            layers.append(layer)
            layer.adapted = _bound(layer, name, adapters, dtype, device)
        for name, weight in _norms(adapters).items():
            norm: Any = module.get_submodule(name)
            norms.append((norm, norm.weight))
            norm.weight = nn.Parameter(weight.to(device, norm.weight.dtype), requires_grad=False)
        yield
    finally:
        for layer in layers:
            layer.adapted = None
        for norm, weight in norms:
            norm.weight = weight


def touched(adapters: Adapters) -> list[str]:
    """The names of the linear layers that something is added to."""
    names = [[*adapter.terms, *adapter.biases] for adapter, _ in adapters]
    return list(dict.fromkeys(name for some in names for name in some))


def bound_bytes(
    module: nn.Module, adapters: Adapters, names: Sequence[str], method: LinearMethod
) -> tuple[int, int]:
    """Of memory for what `adapted` makes of these, and the ranks of the layer with the most."""
    nbytes, most = 0, 0
    for name in names:
        layer: Any = module.get_submodule(name)
        downs, ups = _stacked(name, adapters)
        ranks = _padded(sum(len(down) for down in downs))
        wanted = method.wanted(layer)
        quantized = wanted is not None and wanted.dtype is not None
        itemsize = 1 if quantized else method.dtype.itemsize
        in_features, out_features = layer.weight.shape[1], layer.weight.shape[0]
        nbytes += ranks * (in_features * itemsize + 4 * quantized)
        nbytes += sum(term.up.numel() for term, _, _ in ups) * method.dtype.itemsize
        nbytes += out_features * 4 * any(name in adapter.biases for adapter, _ in adapters)
        most = max(most, ranks)
    return nbytes, most


def _norms(adapters: Adapters) -> dict[str, Tensor]:
    """Those of the last adapter that has one."""
    return {name: norm for adapter, _ in adapters for name, norm in adapter.norms.items()}


def _stacked(
    name: str, adapters: Adapters
) -> tuple[list[Tensor], list[tuple[LowRankTerm, float, slice]]]:
    """The downs of a layer, each once, and its terms with their strengths and places among them."""
    downs: list[Tensor] = []
    places: dict[int, slice] = {}
    ups, ranks = [], 0
    for adapter, strength in adapters:
        for term in adapter.terms.get(name, ()):
            if id(term.down) not in places:
                places[id(term.down)] = slice(ranks, ranks + len(term.down))
                downs.append(term.down)
                ranks += len(term.down)
            ups.append((term, strength, places[id(term.down)]))
    return downs, ups


def _padded(ranks: int) -> int:
    return -(-ranks // RANK_MULTIPLE) * RANK_MULTIPLE


def _bound(
    layer: StoredLinear, name: str, adapters: Adapters, dtype: torch.dtype, device: torch.device
) -> BoundTerms:
    downs, terms = _stacked(name, adapters)
    biases = [
        strength * adapter.biases[name].to(device, torch.float32)
        for adapter, strength in adapters
        if name in adapter.biases
    ]
    bias = torch.stack(biases).sum(0) if biases else None
    if not downs:
        return BoundTerms(None, (), bias)
    stacked = downs[0].new_zeros(_padded(sum(map(len, downs))), layer.weight.shape[1])
    torch.cat(downs, out=stacked[: sum(map(len, downs))])
    ups = [
        (
            slice(term.first, term.first + len(term.up)),
            ranks,
            (term.up.to(device, torch.float32) * (term.scale * strength)).to(dtype),
        )
        for term, strength, ranks in terms
    ]
    return BoundTerms(_as_rows_come(layer, stacked.to(device), dtype), ups, bias)


def _as_rows_come(layer: StoredLinear, down: Tensor, dtype: torch.dtype) -> StoredLinear:
    """`down` as a layer whose input has the format of that of `layer`."""
    found = StoredLinear(down.shape[1], len(down), False, BFLOAT16)
    found.group = layer.group
    if layer.method is not None:
        wanted = layer.method.wanted(layer)
        found.group = 0 if wanted is None else wanted.group
        if wanted is not None and wanted.dtype is not None:
            into = torch.empty_like(down, dtype=wanted.dtype)
            scale = down.new_empty(len(down), dtype=torch.float32)
            quantize_rows(down, into, scale, wanted.group)
            found.weight = nn.Parameter(into, requires_grad=False)
            found.scale = nn.Parameter(scale, requires_grad=False)
            return found
    if found.group:
        down = rotate(down.float(), found.group)
    found.weight = nn.Parameter(down.to(dtype), requires_grad=False)
    return found
