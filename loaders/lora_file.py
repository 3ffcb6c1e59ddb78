"""What the header of a LoRA says: which layers it changes, and how."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.flux.geometry import ClipGeometry, FluxGeometry
from ..messages import later, say
from .lora_models import FLUX_LORA, MORE_BLOCKS, lora_of_another_model, model_of_size
from .lora_names import (
    Found,
    Target,
    find,
    in_first_block,
    names_of,
    of_t5,
    role_of,
    with_all_blocks,
)
from .recognise import LORA, kind_of, not_wanted
from .safetensors_file import DTYPES, ModelFileError, SafetensorsFile
from .tensor_sources import Part, missing, require_readable, sources_of

CONTROL_INPUTS = 128  # of the first layer: those of the noisy picture and of another
PEFT, MOST_DECLARED = "lora_adapter_metadata", 2**20  # characters of what it says of a file

LORA_, LOHA, LOKR = "LoRA", "LoHa", "LoKr"
# The matrices of each method, as the products of two; LoKr may have either of its own as a whole.
FACTORS = {
    LORA_: (("up", "down"),),
    LOHA: (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
    LOKR: (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b")),
}
WHOLE = {"lokr_w1_a": "lokr_w1", "lokr_w2_a": "lokr_w2"}
DIFF, SET, NORM, BIAS = "diff", "set", "norm", "bias"

# Why a tensor is not used.
IN_T5 = later("T5")
NO_SUCH_LAYER = later("layers that this model does not have")
NO_SUCH_METHOD = later("a method that MajicFlux does not know")
TWICE = later("a second time")
UNKNOWN = later("unknown names")


@dataclass(frozen=True)
class Change:
    """What some tensors of a file do to a layer.

    method: one of FACTORS, or DIFF, SET, NORM or BIAS. tensors: by their role. rank: of the change
    as low-rank factors, 0 when it has none; divisor: the rank that alpha is divided by, 0 where
    alpha has no effect. layer: its name in the file.
    """

    target: Target
    method: str
    tensors: Mapping[str, Part]
    layer: str
    rank: int = 0
    divisor: int = 0
    alpha: Part | None = None
    magnitude: Part | None = None

    @property
    def scales_rows(self) -> bool:
        """Whether its magnitude, if it has one, is of the rows of the weight."""
        return self.magnitude is not None and self.magnitude.rows == self.target.columns


@dataclass(frozen=True)
class LoraFile:
    """A LoRA whose header has been read: changes in the order of the layers, and what is unused.

    declared: what PEFT says of the file.
    """

    path: Path
    dialect: str
    changes: tuple[Change, ...]
    unused: Mapping[str, tuple[str, ...]]
    declared: Mapping[str, Any]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({change.rank for change in self.changes if change.rank}))

    @property
    def methods(self) -> tuple[str, ...]:
        found = {change.method for change in self.changes}
        methods = [method for method in FACTORS if method in found]
        if any(change.magnitude for change in self.changes):
            methods.append("DoRA")
        return tuple(methods)


def inspect_lora(
    path: Path, flux: FluxGeometry | None = None, clip: ClipGeometry | None = None
) -> LoraFile:
    """What a LoRA changes of a Flux.1 transformer and of CLIP-L, from its header alone.

    flux: of the model that it is for; None leaves open which. clip: by default CLIP-L's.
    Raises ModelFileError when the file is none, is one for another model, is damaged or does not
    fit.
    """
    file = SafetensorsFile(path)
    names = list(file.tensors)
    other = lora_of_another_model({name: entry.shape for name, entry in file.tensors.items()})
    if other is not None:
        raise not_wanted(path, names, other, FLUX_LORA)
    sources = sources_of([file])
    return _Reading(path, {n: s.parts[0] for n, s in sources.items()}, flux, clip).whole(file)


class _Reading:
    """Sorts the tensors of a file."""

    def __init__(
        self,
        path: Path,
        parts: Mapping[str, Part],
        flux: FluxGeometry | None,
        clip: ClipGeometry | None,
    ):
        self.path, self.parts, self.fits = path, parts, flux is not None
        flux, clip = flux or FluxGeometry(), clip or ClipGeometry()
        self.names = names_of(flux, clip)
        self.known = names_of(with_all_blocks(flux), clip)
        self.unused: dict[str, list[str]] = defaultdict(list)
        self.taken: set[tuple[str, int, str]] = set()

    def whole(self, file: SafetensorsFile) -> LoraFile:
        dialects: Counter[str] = Counter()
        changes: list[Change] = []
        for layer, roles in self._layers().items():
            found = self._found(layer, [*roles.values()])
            if found is not None:
                count = len(changes)
                changes += self._changes(found.target, roles, layer)
                dialects[found.dialect] += len(changes) > count
        if not changes:
            raise self._nothing()
        order = {found.target.layer: index for index, found in enumerate(self.names.values())}
        changes.sort(key=lambda c: (order[c.target.layer], c.target.first))
        unused = {reason: tuple(names) for reason, names in self.unused.items()}
        dialect = dialects.most_common(1)[0][0]
        return LoraFile(self.path, dialect, tuple(changes), unused, _declared(file))

    def _layers(self) -> dict[str, dict[str, str]]:
        """By the names of layers in the file: tensors by their role."""
        beside = {part.scale_name for part in self.parts.values()}
        layers: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self.parts:
            layer, role, _adapter = role_of(name)
            if name in beside or name.endswith(".comfy_quant"):
                continue
            if role in layers[layer]:
                self.unused[TWICE].append(name)
            else:
                layers[layer][role] = name
        return layers

    def _found(self, layer: str, names: list[str]) -> Found | None:
        found = find(layer, self.names)
        if found is not None:
            return found
        if of_t5(layer):
            self.unused[IN_T5] += names
        elif find(layer, self.known) is not None:
            self.unused[NO_SUCH_LAYER] += names
        elif find(in_first_block(layer), self.names) is not None:
            raise not_wanted(self.path, [*self.parts], MORE_BLOCKS, FLUX_LORA)
        else:
            self.unused[UNKNOWN] += names
        return None

    def _changes(self, target: Target, roles: dict[str, str], layer: str) -> Iterator[Change]:
        if "other" in roles:
            self.unused[NO_SUCH_METHOD] += roles.values()
            return
        used: set[str] = set()
        parts = {role: self.parts[name] for role, name in roles.items()}
        for change in self._read(target, parts, layer):
            all_parts = [*change.tensors.values(), change.alpha, change.magnitude]
            names = [part.name for part in all_parts if part is not None]
            used |= {*names}
            kind = change.method if change.method in (BIAS, NORM) else "weight"
            place = (target.layer, target.first, kind)
            if place in self.taken:
                self.unused[TWICE] += names
                continue
            self.taken.add(place)
            yield change
        left = [name for name in roles.values() if name not in used]
        if left:
            self.unused[UNKNOWN] += left

    def _read(self, target: Target, parts: dict[str, Part], layer: str) -> Iterator[Change]:
        width = (target.columns,)
        if target.inputs == 0:
            for role, method in (("norm", NORM), ("set", NORM), ("diff", DIFF)):
                if role in parts:
                    self._require(parts[role], width)
                    yield Change(target, method, {method: parts[role]}, layer)
            return
        for method, pairs in FACTORS.items():
            if any(role in parts for pair in pairs for role in (*pair, WHOLE.get(pair[0]))):
                yield self._factors(target, method, parts, layer)
        for role, method in (("diff", DIFF), ("set", SET)):
            if role in parts:
                self._require(parts[role], (target.columns, target.inputs))
                yield Change(target, method, {role: parts[role]}, layer)
        for role in () if target.of_text else ("up_bias", "bias"):
            if role in parts:
                self._require(parts[role], width)
                scaled = role == "up_bias" and "down" in parts
                divisor = parts["down"].rows if scaled else 0
                alpha = parts.get("alpha") if scaled else None
                yield Change(target, BIAS, {BIAS: parts[role]}, layer, 0, divisor, alpha)

    def _factors(self, target: Target, method: str, parts: dict[str, Part], layer: str) -> Change:
        """A change by matrices that are multiplied; their shapes have been compared then."""
        tensors: dict[str, Part] = {}
        sizes: list[tuple[int, int]] = []
        rank, divisors = 1, []
        for pair in FACTORS[method]:
            whole = WHOLE.get(pair[0])
            if whole is not None and whole in parts:
                tensors[whole] = parts[whole]
                sizes.append(self._size(parts[whole]))
                rank *= min(sizes[-1])
                continue
            for role in pair:
                if role not in parts:
                    raise missing(self.path, f"{layer}.{role}")
            left, right = (parts[role] for role in pair)
            (rows, inner), (next_inner, columns) = self._size(left), self._size(right)
            if inner != next_inner:
                raise self._misfit(left, (rows, next_inner))
            tensors |= zip(pair, (left, right), strict=True)
            sizes.append((rows, columns))
            rank *= inner
            divisors.append(inner)
        rows, columns = sizes[0]
        if method == LOKR:
            rows, columns = rows * sizes[1][0], columns * sizes[1][1]
        elif sizes[-1] != sizes[0]:
            raise self._misfit(tensors["hada_w2_a"], (rows, divisors[1]))
        if self.fits and (rows, columns) != (target.columns, target.inputs):
            raise self._other_model(target, layer, rows, columns)
        alpha, magnitude = parts.get("alpha"), parts.get("magnitude")
        if alpha is not None and (
            math.prod(self._shape(alpha, 0)) != 1 or alpha.dtype not in DTYPES
        ):
            raise self._misfit(alpha, ())
        if magnitude is not None and self._shape(magnitude, 1) != (1, target.inputs):
            self._require(magnitude, (target.columns,))
        # ComfyUI's and LyCORIS' choice: of LoKr the second matrix, of LoHa the first.
        divisor = (divisors[-1] if method == LOKR else divisors[0]) if divisors else 0
        return Change(target, method, tensors, layer, rank, divisor, alpha, magnitude)

    def _size(self, part: Part) -> tuple[int, int]:
        shape = self._shape(part, 2)
        if len(shape) != 2:
            raise self._misfit(part, "[n, m]")
        if 0 in shape:
            raise ModelFileError(
                say(
                    "{file} is damaged: {name} has rank 0. Download it again, or choose another "
                    "file.",
                    file=self.path.name,
                    name=part.name,
                )
            )
        return shape[0], shape[1]

    def _shape(self, part: Part, axes: int) -> tuple[int, ...]:
        """Without the axes of length 1 after the first `axes`, which a convolution has."""
        require_readable(self.path, part.name, part)
        shape = part.file.tensors[part.name].shape
        while len(shape) > axes and shape[-1] == 1:
            shape = shape[:-1]
        return shape

    def _require(self, part: Part, wanted: tuple[int, ...]) -> None:
        if self.fits and self._shape(part, len(wanted)) != wanted:
            raise self._other_size(part.name, part.file.tensors[part.name].shape, wanted)

    def _misfit(self, part: Part, wanted: object) -> ModelFileError:
        return ModelFileError(
            say(
                "{file} does not fit: {name} has the shape {shape} where {expected} follows from "
                "the others. Choose another file.",
                file=self.path.name,
                name=part.name,
                shape=list(part.file.tensors[part.name].shape),
                expected=wanted,
            )
        )

    def _other_size(self, name: str, shape: Sequence[int], wanted: Sequence[int]) -> ModelFileError:
        return ModelFileError(
            say(
                "{file} does not fit this model: what it adds to {name} has the shape {shape}, "
                "where the model has {expected}. Choose another file.",
                file=self.path.name,
                name=name,
                shape=list(shape),
                expected=list(wanted),
            )
        )

    def _other_model(self, target: Target, name: str, rows: int, columns: int) -> ModelFileError:
        """The error of factors whose product is of another size than the layer."""
        if target.layer == "x_embedder" and columns == CONTROL_INPUTS:
            return ModelFileError(
                say(
                    "{file} is a control LoRA, as for depth or edges: it needs a picture beside "
                    "the noise, which MajicFlux does not give it. Choose another file.",
                    file=self.path.name,
                )
            )
        kind = model_of_size(target.layer, rows, columns)
        if kind is not None:
            return not_wanted(self.path, [*self.parts], kind, FLUX_LORA)
        return self._other_size(name, (rows, columns), (target.columns, target.inputs))

    def _nothing(self) -> ModelFileError:
        """The error of a file in which nothing is for this model."""
        names = [*self.parts]
        if self.unused[NO_SUCH_METHOD]:
            return ModelFileError(
                say(
                    "{file} changes the model by a method that MajicFlux does not know, as in "
                    "{name}. Choose a LoRA, LoHa or LoKr.",
                    file=self.path.name,
                    name=self.unused[NO_SUCH_METHOD][0],
                )
            )
        kind = kind_of(names)
        return not_wanted(self.path, names, None if kind is LORA else kind, FLUX_LORA)


def _is_number(part: Part) -> bool:
    entry = part.file.tensors[part.name]
    return math.prod(entry.shape) == 1 and entry.dtype in DTYPES


def _declared(file: SafetensorsFile) -> Mapping[str, Any]:
    """What PEFT says of how the file was trained."""
    try:
        text = file.metadata[PEFT]
        return {**json.loads(text)} if len(text) <= MOST_DECLARED else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
