"""Adapters beside the stored weights of a module, for the length of a run.

Beside, never merged: a weight that has been rounded to 8 bits would be rounded again, and a small
change of it lost. The input meets `down` in the format in which it meets the weight.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.hadamard import rotate
from .formats import BFLOAT16, CONVERTED_AT_ONCE
from .linear import LinearMethod, StoredLinear
from .low_rank import Adapter, LowRankTerm
from .quantize import float32_of, quantize_rows

RANK_MULTIPLE = 16  # of the rows of a matrix that units multiply in 8 bits

Adapters = Sequence[tuple[Adapter, float]]  # each with its strength


@dataclass(frozen=True)
class BoundTerms:
    """What adapters add to the products of one layer: y[:, columns] += (x down^T)[:, ranks] up^T.

    down: [ranks of all terms, in], in the format of the layer's rows; ups: for each term its
    columns, its ranks and up [columns, rank], scale and strength included; gain, bias: float32
    [out] or None, y * gain + bias comes before the terms.
    """

    down: StoredLinear | None
    ups: Sequence[tuple[slice, slice, Tensor]]
    gain: Tensor | None = None
    bias: Tensor | None = None

    def add_to(self, y: Tensor, x: Any, columns: slice, method: LinearMethod | None) -> None:
        """Add to y [..., these columns], contiguous, what the rows x of the layer give."""
        first = columns.start or 0
        last, flat = first + y.shape[-1], y.flatten(0, -2)
        if self.gain is not None:
            flat.mul_(self.gain[columns])
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
    names = [[*a.terms, *a.biases, *a.gains] for a, _ in adapters]
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
        nbytes += sum(term.up.numel() for term, *_ in ups) * method.dtype.itemsize
        vectors = any(name in {*a.biases, *a.gains} for a, _ in adapters)
        nbytes += 2 * 4 * out_features * vectors
        most = max(most, ranks)
    return nbytes, most


@contextmanager
def beside_plain_layers(
    module: nn.Module, adapters: Adapters, device: torch.device
) -> Iterator[None]:
    """Let CLIP's layers, which are PyTorch's own, add the terms that adapters have for them."""
    hooks = []
    try:
        for adapter, strength in adapters:
            for name, terms in adapter.text_encoder.items():
                layer: Any = module.get_submodule(name)
                pairs = _on_device(terms, strength, device, layer.weight.dtype)
                hooks.append(layer.register_forward_hook(partial(_with_terms, pairs)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def plain_bytes(adapters: Adapters, itemsize: int) -> int:
    """Of memory for what `beside_plain_layers` makes."""
    terms = [term for a, _ in adapters for some in a.text_encoder.values() for term in some]
    return itemsize * sum(term.down.numel() + term.up.numel() for term in terms)


def _on_device(
    terms: Sequence[LowRankTerm], strength: float, device: torch.device, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Down and up of each, scale and strength included."""
    return [
        (term.down.to(device, dtype), (term.up * (term.scale * strength)).to(device, dtype))
        for term in terms
    ]


def _with_terms(terms: Sequence[tuple[Tensor, Tensor]], _: Any, given: Any, y: Tensor) -> Tensor:
    for down, up in terms:
        y = y + (given[0] @ down.T) @ up.T
    return y


def with_gains(adapter: Adapter, module: nn.Module) -> Adapter:
    """The same with the gains that its magnitudes mean beside the weights of this module."""
    layers: dict[str, Any] = {n: module.get_submodule(n) for n in adapter.magnitudes}
    return replace(adapter, gains={n: row_gains(x, adapter, n) for n, x in layers.items()})


def row_gains(layer: StoredLinear, adapter: Adapter, name: str) -> Tensor:
    """What DoRA multiplies the columns of a layer's product by, float32 [out]: its magnitude over
    the norm of that row of weight and terms together; 1 for rows that keep their norm."""
    magnitude, terms = adapter.magnitudes[name], adapter.terms.get(name, ())
    gains = torch.ones_like(magnitude)
    step = max(1, CONVERTED_AT_ONCE // layer.weight.shape[1])
    for start in range(0, len(magnitude), step):
        rows = slice(start, min(start + step, len(magnitude)))
        weight, scale, _ = layer.matrix(rows)
        whole = float32_of(weight.cpu())
        if scale is not None:
            whole *= scale.cpu()[:, None]
        whole = rotate(whole, layer.group)
        for term in terms:
            begin, end = max(rows.start, term.first), min(rows.stop, term.first + len(term.up))
            if begin < end:
                up = term.up[begin - term.first : end - term.first].float()
                whole[begin - rows.start : end - rows.start] += term.scale * up @ term.down.float()
        gains[rows] = magnitude[rows] / whole.norm(dim=1)
    return torch.where(magnitude.isnan(), 1.0, gains)


def _norms(adapters: Adapters) -> dict[str, Tensor]:
    """Those of the last adapter that has one."""
    return {name: norm for adapter, _ in adapters for name, norm in adapter.norms.items()}


def _stacked(
    name: str, adapters: Adapters
) -> tuple[list[Tensor], list[tuple[LowRankTerm, float, Tensor | None, slice]]]:
    """The downs of a layer, each once; and its terms with their strengths, the gains of their rows
    and their places among the downs."""
    downs: list[Tensor] = []
    places: dict[int, slice] = {}
    ups, ranks = [], 0
    for adapter, strength in adapters:
        for term in adapter.terms.get(name, ()):
            if id(term.down) not in places:
                places[id(term.down)] = slice(ranks, ranks + len(term.down))
                downs.append(term.down)
                ranks += len(term.down)
            ups.append((term, strength, adapter.gains.get(name), places[id(term.down)]))
    return downs, ups


def _padded(ranks: int) -> int:
    return -(-ranks // RANK_MULTIPLE) * RANK_MULTIPLE


def _bound(
    layer: StoredLinear, name: str, adapters: Adapters, dtype: torch.dtype, device: torch.device
) -> BoundTerms:
    downs, terms = _stacked(name, adapters)
    gain, bias = _gain_and_bias(layer, name, adapters, device)
    if not downs:
        return BoundTerms(None, (), gain, bias)
    stacked = downs[0].new_zeros(_padded(sum(map(len, downs))), layer.weight.shape[1])
    torch.cat(downs, out=stacked[: sum(map(len, downs))])
    ups = []
    for term, strength, gains, ranks in terms:
        columns = slice(term.first, term.first + len(term.up))
        up = term.up.to(device, torch.float32) * (term.scale * strength)
        if gains is not None:
            up *= gains[columns, None].to(device)
        ups.append((columns, ranks, up.to(dtype)))
    return BoundTerms(_as_rows_come(layer, stacked.to(device), dtype), ups, gain, bias)


def _gain_and_bias(
    layer: StoredLinear, name: str, adapters: Adapters, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Of the layer's own product: DoRA gives each column the part t of its gain."""
    gain = bias = None
    for adapter, strength in adapters:
        if name in adapter.gains:
            own = 1 + strength * (adapter.gains[name].to(device) - 1)
            gain = own if gain is None else gain * own
        if name in adapter.biases:
            added = strength * adapter.biases[name].to(device)
            bias = added if bias is None else bias + added
    if gain is not None and layer.bias is not None:  # which keeps its size
        kept = layer.bias.to(device, torch.float32) * (1 - gain)
        bias = kept if bias is None else bias + kept
    return gain, bias


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
