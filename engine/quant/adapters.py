"""Adapters beside the stored weights of a module, for the length of a run.

Beside, never merged: a weight that has been rounded to 8 bits would be rounded again, and a small
change of it lost. The input meets `down` in the format in which it meets the weight.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.hadamard import rotate
from ..kernels.matmul import low_parts
from ..kernels.row_format import TILE
from .bound_terms import BoundTerms, layer_of
from .formats import CONVERTED_AT_ONCE
from .linear import LinearMethod, StoredLinear
from .low_rank import Adapter, LowRankTerm
from .quantize import float32_of, quantize_rows
from .rank_layout import Adapters, rank_layout

CPU = torch.device("cpu")


@contextmanager
def adapted(
    module: nn.Module,
    adapters: Adapters,
    names: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    last: "LastTerms | None" = None,
) -> Iterator[None]:
    """Let these layers of `module` add the terms of `adapters`, in memory of `device`.

    names: some of `touched`. The layers have their methods already. dtype: of the activations.
    last: where they are kept for another run, if they shall be.
    """
    layers, norms = [], []
    try:
        for name in names:
            layer = module.get_submodule(name)
            assert isinstance(layer, StoredLinear)
            layers.append(layer)
            make = partial(_bound, layer, name, adapters, dtype, device)
            layer.adapted = make() if last is None else last.of(name, make, device)
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


class LastTerms:
    """What was bound in the last run, in the host's memory: making it takes as long as some steps,
    copying it as long as a part of one."""

    def __init__(self) -> None:
        self._made_of: tuple[Any, ...] = ()
        self._kept: dict[str, BoundTerms] = {}

    def made_of(self, *given: Any) -> "LastTerms":
        """The same, with nothing in it that was made of other adapters or for other methods."""
        if given != self._made_of:
            self._made_of, self._kept = given, {}
        return self

    def of(self, name: str, make: Callable[[], BoundTerms], device: torch.device) -> BoundTerms:
        """On `device` what was made for the layer of this name, or is now."""
        if name in self._kept:
            return self._kept[name].to(device)
        bound = make()
        self._kept[name] = bound.to(CPU)
        return bound


def touched(adapters: Adapters) -> list[str]:
    """The names of the linear layers that something is added to."""
    names = [[*a.terms, *a.biases, *a.gains] for a, _ in adapters]
    return list(dict.fromkeys(name for some in names for name in some))


def bound_bytes(
    module: nn.Module, adapters: Adapters, names: Sequence[str], method: LinearMethod
) -> tuple[int, int]:
    """Of memory for what `adapted` makes of these, and the ranks, of all parts, of the layer with
    the most."""
    nbytes, most = 0, 0
    for name in names:
        layer: Any = module.get_submodule(name)
        layout = rank_layout(name, adapters)
        wanted = method.wanted(layer)
        quantized = wanted is not None and wanted.dtype is not None
        itemsize = 1 if quantized else method.dtype.itemsize
        out_features = len(layer.weight)
        nbytes += layout.ranks * (layout.inputs * itemsize + 4 * quantized)
        vectors = any(name in {*a.biases, *a.gains} for a, _ in adapters)
        nbytes += 2 * 4 * out_features * vectors
        if layout.downs:
            nbytes += out_features * layout.span_ranks * method.dtype.itemsize
            nbytes += 4 * -(-out_features // TILE)
        most = max(most, layout.ranks * low_parts(layout.ranks, layer.weight.shape[1]))
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


def _bound(
    layer: StoredLinear, name: str, adapters: Adapters, dtype: torch.dtype, device: torch.device
) -> BoundTerms:
    layout = rank_layout(name, adapters)
    gain, bias = _gain_and_bias(layer, name, adapters, device)
    if not layout.downs:
        return BoundTerms(gain=gain, bias=bias)
    columns = len(layer.weight)
    down = layout.downs[0].new_zeros(layout.ranks, layout.inputs)
    first = 0
    for some in layout.downs:
        down[first : first + len(some), : some.shape[1]] = some
        first += len(some)
    up = torch.zeros(columns, layout.span_ranks, dtype=dtype, device=device)
    for term, strength, gains, ranks in layout.terms:
        some = term.up.to(device, torch.float32) * (term.scale * strength)
        if gains is not None:
            some *= gains[term.columns, None].to(device)
        for span in layout.spans:
            start = max(span.columns.start, term.first)
            stop = min(span.columns.stop, term.columns.stop)
            if start < stop:
                place = slice(ranks.start - span.ranks.start, ranks.stop - span.ranks.start)
                up[start:stop, place] += some[start - term.first : stop - term.first]
    first_ranks = layout.first_ranks(columns)
    tiled = first_ranks is not None and gain is None and bias is None
    tiles = torch.tensor(first_ranks, dtype=torch.int32, device=device) if tiled else None
    bound = _as_rows_come(layer, down.to(device), dtype)
    return BoundTerms(bound, up, layout.spans, tiles, gain, bias)


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
    group = layer.group
    if layer.method is not None:
        wanted = layer.method.wanted(layer)
        group = 0 if wanted is None else wanted.group
        if wanted is not None and wanted.dtype is not None:
            into = torch.empty_like(down, dtype=wanted.dtype)
            scale = down.new_empty(len(down), dtype=torch.float32)
            quantize_rows(down, into, scale, group)
            return layer_of(into, scale, group)
    if group:
        down = rotate(down.float(), group)
    return layer_of(down.to(dtype), None, group)
