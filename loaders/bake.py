"""LoRAs that become part of the weights while these are read.

They are added in float32, before a weight is rounded to its format: the sum is rounded once, and
no step has anything left to do.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..engine.torch_state import torch
from .convert import Changes, Progress, RowChange, convert_into, read_rows, require_sane
from .lora import read_tensors, scale_of
from .lora_changes import BIAS, DIFF, NORM, SET, Change
from .lora_factors import rows_of_change
from .lora_file import LoraFile
from .tensor_sources import Sources

SMALLEST_NORM = 1e-20

Loras = Sequence[tuple[LoraFile, float]]  # each with its strength, the first one first


def changes_of(loras: Loras, sources: Sources, progress: Progress | None = None) -> Changes:
    """What the files do to the weights of a transformer, which `sources` are, by their names.

    Raises ModelFileError when a LoRA cannot be read or holds an infinity or a NaN.
    """
    changes: dict[str, list[RowChange]] = defaultdict(list)
    for lora, strength in loras:
        bakes = [*_bakes(lora, strength, progress)]
        for bake in _with_column_norms(bakes, sources, changes, progress):
            changes[bake.name] += bake.places(bake.apply)
    return changes


@dataclass(frozen=True)
class _Bake:
    """A change with its values.

    scale: of its factors. tensors: by their role, matrices; DIFF and SET are as large as weights
    and are read row by row. magnitude: of DoRA, [columns, 1] or [1, inputs]; column_norms [inputs]:
    those of weight and change together, for the latter.
    """

    change: Change
    strength: float
    scale: float
    tensors: Mapping[str, "torch.Tensor"]
    magnitude: "torch.Tensor | None"
    column_norms: "torch.Tensor | None" = None

    @property
    def name(self) -> str:
        """Of the parameter that it changes."""
        kind = "bias" if self.change.method == BIAS else "weight"
        return f"{self.change.target.layer}.{kind}"

    def places(self, use: Callable[[slice, "torch.Tensor"], None]) -> Iterator[RowChange]:
        """The rows that it changes, for each of which `use` is called with those of the file."""
        target = self.change.target
        half = target.columns // 2
        places = [(half, half), (0, half)] if target.swapped else [(0, target.columns)]
        first = target.first
        for first_in_file, rows in places:
            yield RowChange(first, rows, partial(_in_file, use, first_in_file))
            first += rows

    def apply(self, rows: slice, values: "torch.Tensor") -> None:
        """Change the values of these rows in place."""
        if self.change.method in (SET, NORM):
            values.copy_(self._rows(rows))
        elif self.magnitude is None:
            values.add_(self._rows(rows), alpha=self.strength * self.scale)
        else:
            whole = self.sum(rows, values)
            if self.column_norms is None:
                whole *= self.magnitude[rows] / _not_0(whole.norm(dim=1, keepdim=True))
            else:
                whole *= self.magnitude / _not_0(self.column_norms)
            values.lerp_(whole, self.strength)
        require_sane(next(iter(self.change.tensors.values())), values)

    def sum(self, rows: slice, values: "torch.Tensor") -> "torch.Tensor":
        """Weight and change together, at full strength."""
        return values.add(self._rows(rows), alpha=self.scale)

    def _rows(self, rows: slice) -> "torch.Tensor":
        method = self.change.method
        if method in (DIFF, SET):
            return read_rows(self.change.tensors[method], rows)
        if method in (NORM, BIAS):
            return self.tensors[method][rows]
        return rows_of_change(method, self.tensors, rows)


def _bakes(lora: LoraFile, strength: float, progress: Progress | None) -> Iterator[_Bake]:
    changes = [change for change in lora.changes if not change.target.of_text]
    held = [change for change in changes if change.method not in (DIFF, SET)]
    values = read_tensors(held, None, progress)
    for change in changes:
        tensors = {
            role: _as_matrix(values[part.name])
            for role, part in change.tensors.items()
            if part.name in values
        }
        magnitude = None
        if change.magnitude is not None:
            shape = (-1, 1) if change.scales_rows else (1, -1)
            magnitude = values[change.magnitude.name].float().view(shape)
        yield _Bake(change, strength, scale_of(lora, change), tensors, magnitude)


def _with_column_norms(
    bakes: Sequence[_Bake], sources: Sources, before: Changes, progress: Progress | None
) -> list[_Bake]:
    """The same with the norms of columns, for which the weights of DoRA on the input axis are read
    and changed as `before` says, and not kept."""
    lock = threading.Lock()
    squares: dict[int, torch.Tensor] = {}
    measured: dict[str, list[RowChange]] = defaultdict(list)

    def measure(index: int, rows: slice, values: "torch.Tensor") -> None:
        found = bakes[index].sum(rows, values).double().square_().sum(0)
        with lock:
            squares[index] = squares.get(index, 0) + found

    for index, bake in enumerate(bakes):
        if bake.magnitude is not None and not bake.change.scales_rows:
            measured[bake.name] += bake.places(partial(measure, index))
    if not measured:
        return [*bakes]
    nowhere = (torch.empty(sources[n].shape, dtype=torch.float32, device="meta") for n in measured)
    holder = torch.nn.ParameterList(torch.nn.Parameter(x, requires_grad=False) for x in nowhere)
    names = {str(number): name for number, name in enumerate(measured)}
    changes = {n: [*before.get(name, ()), *measured[name]] for n, name in names.items()}
    read = {n: sources[name] for n, name in names.items()}
    convert_into(holder, read, progress, None, None, changes)
    return [
        replace(bake, column_norms=squares[index].sqrt().float()) if index in squares else bake
        for index, bake in enumerate(bakes)
    ]


def _in_file(
    use: Callable[[slice, "torch.Tensor"], None], first: int, start: int, values: "torch.Tensor"
) -> None:
    use(slice(first + start, first + start + len(values)), values)


def _as_matrix(values: "torch.Tensor") -> "torch.Tensor":
    return values.flatten(1) if values.ndim > 1 else values.view(-1, 1)


def _not_0(norms: "torch.Tensor") -> "torch.Tensor":
    """Of a row or column of zeros, to which no magnitude gives a direction."""
    return norms.clamp_min(SMALLEST_NORM)
