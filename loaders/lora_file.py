"""What the header of a LoRA says: which layers it changes, and how."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.flux.geometry import ClipGeometry, FluxGeometry
from ..messages import later
from .lora_changes import BIAS, FACTORS, NORM, Change, Layer
from .lora_models import FLUX_LORA, MORE_BLOCKS, lora_of_another_model
from .lora_names import (
    OTHER,
    Found,
    Target,
    completed,
    find,
    in_first_block,
    names_of,
    of_t5,
    role_of,
)
from .recognise import is_lora, kind_of, not_wanted
from .safetensors_file import ModelFileError, SafetensorsFile
from .tensor_sources import sources_of

PEFT = "lora_adapter_metadata"  # how the file was trained
TOLD_ELSEWHERE = (".comfy_quant", ".reshape_weight")  # by other tensors of the layer

# Why a tensor is not used.
IN_T5 = later("T5")
NO_SUCH_LAYER = later("layers that this model does not have")
NO_PICTURE = later("the first layer of a model that takes no picture")
NO_SUCH_METHOD = later("a method that MajicFlux does not know")
TWICE = later("a second time")
UNKNOWN = later("unknown names")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA whose header has been read: changes in the order of the layers, and what is unused.

    declared: what PEFT says of the file.
    """

    file: SafetensorsFile
    dialect: str
    changes: tuple[Change, ...]
    unused: Mapping[str, tuple[str, ...]]
    declared: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.file.path

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

    flux, clip: of the models that it is for; None leaves open which, so that sizes may be others.
    Raises ModelFileError when the file is none, is one for another model, is damaged or does not
    fit.
    """
    file = SafetensorsFile(path)
    names = list(file.tensors)
    if is_lora(names):
        other = lora_of_another_model({name: entry.shape for name, entry in file.tensors.items()})
    else:
        other = kind_of(names)  # the norms of a whole model have the names of a LoRA's
    if other is not None:
        raise not_wanted(path, names, other, FLUX_LORA)
    return _Reading(file, flux, clip).whole()


class _Reading:
    """Sorts the tensors of a file."""

    def __init__(self, file: SafetensorsFile, flux: FluxGeometry | None, clip: ClipGeometry | None):
        self.file, self.path = file, file.path
        self.parts = {name: source.parts[0] for name, source in sources_of([file]).items()}
        self.fits, self.text_fits = flux is not None, clip is not None
        flux, clip = flux or FluxGeometry(), clip or ClipGeometry()
        self.names = names_of(flux, clip)
        self.known = names_of(completed(flux), clip)
        self.unused: dict[str, list[str]] = defaultdict(list)
        self.taken: set[tuple[str, int, int, str]] = set()

    def whole(self) -> LoraFile:
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
        layers = dict.fromkeys(found.target.layer for found in self.names.values())
        order = {layer: index for index, layer in enumerate(layers)}
        changes.sort(key=lambda c: (order[c.target.layer], c.target.first))
        unused = {reason: tuple(names) for reason, names in self.unused.items()}
        dialect = dialects.most_common(1)[0][0]
        return LoraFile(self.file, dialect, tuple(changes), unused, self.file.declared(PEFT))

    def _layers(self) -> dict[str, dict[str, str]]:
        """By the names of layers in the file: tensors by their role."""
        beside = {part.scale_name for part in self.parts.values()}
        layers: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self.parts:
            layer, role = role_of(name)
            if name in beside or name.endswith(TOLD_ELSEWHERE):
                continue
            if role == OTHER:  # of which a method has several
                role = name
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
        others = [name for role, name in roles.items() if role == name]
        if others:
            self.unused[NO_SUCH_METHOD] += dict.fromkeys([*others, *roles.values()])
            return
        used: set[str] = set()
        parts = {role: self.parts[name] for role, name in roles.items()}
        fits = self.text_fits if target.of_text else self.fits
        for change in Layer(target, parts, layer, fits).changes():
            all_parts = [*change.tensors.values(), change.alpha, change.magnitude]
            names = [part.name for part in all_parts if part is not None]
            used |= {*names}
            kind = change.method if change.method in (BIAS, NORM) else "weight"
            place = (target.layer, target.first, target.columns, kind)
            if place in self.taken or change.lacks_inputs:
                self.unused[NO_PICTURE if change.lacks_inputs else TWICE] += names
                continue
            self.taken.add(place)
            yield change
        left = [name for name in roles.values() if name not in used]
        if left:
            self.unused[UNKNOWN] += left

    def _nothing(self) -> ModelFileError:
        """The error of a file in which nothing is for this model."""
        names = [*self.parts]
        if self.unused[NO_SUCH_METHOD]:
            return ModelFileError(
                "{file} changes the model by a method that MajicFlux does not know, as in "
                "{name}. Choose a LoRA, LoHa or LoKr.",
                file=self.path.name,
                name=self.unused[NO_SUCH_METHOD][0],
            )
        if self.unused[IN_T5]:
            return ModelFileError(
                "{file} changes T5 alone, which MajicFlux does not adapt. Choose another file.",
                file=self.path.name,
            )
        return not_wanted(self.path, names, None, FLUX_LORA)
