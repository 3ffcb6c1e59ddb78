"""Which stretches of which files a weight is made of."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..engine.precision import rotation_group
from ..messages import say
from .layouts import Layout
from .safetensors_file import ModelFileError, SafetensorsFile

MAX_BLOCKS = 256  # of one kind; Flux.1 has 38 at most
FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# ComfyUI's two ways to store the scale of a float8 weight, as the ending of its name.
SCALE_NAMES = ((".weight", ".scale_weight"), (".weight", ".weight_scale"))
MAX_MARKER_BYTES = 1024
INT8_FORMAT = "int8_tensorwise"  # ComfyUI's name for int8 with a scale, in its marker's JSON


@dataclass(frozen=True)
class Part:
    """Rows of one tensor in a file, and the name of the scale they are to be multiplied by.

    rotation: for ComfyUI's int8 format, how many columns are rotated together, 0 being none.
    """

    file: SafetensorsFile
    name: str
    first_row: int
    rows: int
    scale_name: str | None = None
    rotation: int | None = None

    @property
    def dtype(self) -> str:
        return self.file.tensors[self.name].dtype

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.file.tensors[self.name].shape[1:]


@dataclass(frozen=True)
class Source:
    """A weight as parts that are stacked along the first axis."""

    parts: tuple[Part, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        if not self.parts[0].file.tensors[self.parts[0].name].shape:
            return ()
        return (sum(part.rows for part in self.parts), *self.parts[0].row_shape)


Sources = Mapping[str, Source]


def sources_of(files: Iterable[SafetensorsFile], prefix: str = "") -> dict[str, Source]:
    """Every tensor of `files` whose name starts with `prefix`, by its name without the prefix."""
    found = {}
    for file in files:
        rotations = _rotations(file)
        for name, entry in file.tensors.items():
            if name.startswith(prefix):
                rows = entry.shape[0] if entry.shape else 1
                part = Part(file, name, 0, rows, _scale_name(file, name), rotations.get(name))
                found[name.removeprefix(prefix)] = Source((part,))
    return found


def files_of(sources: Sources) -> list[SafetensorsFile]:
    """The files that the sources are in, by their paths."""
    files = {part.file for source in sources.values() for part in source.parts}
    return sorted(files, key=lambda file: file.path)


def stacked(sources: Iterable[Source]) -> Source:
    """The sources as one, first rows first."""
    return Source(tuple(part for source in sources for part in source.parts))


def halves_swapped(source: Source) -> Source:
    """The same weight with the second half of its rows before the first."""
    (part,) = source.parts
    half = part.rows // 2
    last = replace(part, first_row=half, rows=part.rows - half)
    return Source((last, replace(part, rows=half)))


def prefix_before(names: Iterable[str], marker: str) -> str:
    """What stands before `marker` in the first name that ends with it; "" when none does."""
    return next((name.removesuffix(marker) for name in names if name.endswith(marker)), "")


def missing(path: Path, name: str) -> ModelFileError:
    """The error of a file that lacks a tensor."""
    return ModelFileError(
        say(
            "{file} is incomplete: {name} is missing. Download it again.",
            file=path.name,
            name=name,
        )
    )


def block_count(path: Path, names: Iterable[str], pattern: str) -> int:
    """How many blocks there are by the numbers in the names that begin with `pattern`.

    Raises ModelFileError when no model has as many: a layout of all of them would be built.
    """
    count = len({found[1] for name in names if (found := re.match(pattern, name))})
    if count > MAX_BLOCKS:
        raise ModelFileError(
            say(
                "{file} has {count:,} blocks; no Flux.1 model has more than {most}. Choose another "
                "file.",
                file=path.name,
                count=count,
                most=MAX_BLOCKS,
            )
        )
    return count


def require_layout(path: Path, sources: Sources, layout: Layout) -> None:
    """Raise ModelFileError unless every weight of `layout` is there, of its shape, readable.

    Tensors that the layout does not name are left alone; trailing axes of length 1 do not count.
    """
    absent = [name for name in layout if name not in sources]
    if absent:
        raise ModelFileError(
            say(
                "{file} is incomplete: {count} of {all} tensors are missing, {name} among them. "
                "Download it again, or choose another file.",
                file=path.name,
                count=len(absent),
                all=len(layout),
                name=absent[0],
            )
        )
    for name, shape in layout.items():
        source = sources[name]
        if _without_ones(source.shape) != _without_ones(shape):
            raise ModelFileError(
                say(
                    "{file} does not fit: {name} has the shape {shape} where {expected} follows "
                    "from the others. Choose another file.",
                    file=path.name,
                    name=name,
                    shape=list(source.shape),
                    expected=list(shape),
                )
            )
        for part in source.parts:
            if part.row_shape != source.parts[0].row_shape:
                raise ModelFileError(
                    say(
                        "{file} does not fit: {name} has rows of {shape} where {expected} follows "
                        "from the tensors that it belongs to. Choose another file.",
                        file=path.name,
                        name=part.name,
                        shape=list(part.row_shape),
                        expected=list(source.parts[0].row_shape),
                    )
                )
            _require_readable(path, name, part)


def _require_readable(path: Path, name: str, part: Part) -> None:
    if part.dtype not in FLOATING and not _is_int8(part):
        raise ModelFileError(
            say(
                "{file} stores {name} as {dtype}, a quantisation that MajicFlux cannot read. Use "
                "the bf16, fp16, float8 or int8_tensorwise file.",
                file=path.name,
                name=name,
                dtype=part.dtype,
            )
        )
    if part.scale_name is not None:
        entry = part.file.tensors[part.scale_name]
        rows = part.file.tensors[part.name].shape[0]
        if entry.dtype not in FLOATING or math.prod(entry.shape) not in (1, rows):
            raise ModelFileError(
                say(
                    "{file} stores {name} with a scale of {dtype} and shape {shape}, which "
                    "MajicFlux cannot read. Use the bf16 or fp16 file.",
                    file=path.name,
                    name=name,
                    dtype=entry.dtype,
                    shape=list(entry.shape),
                )
            )


def _is_int8(part: Part) -> bool:
    """Whether these are rows of int8 with a scale and a rotation that we know."""
    group, width = part.rotation, math.prod(part.row_shape)
    if part.dtype != "I8" or part.scale_name is None or group is None:
        return False
    return group == 0 or group == rotation_group(width, group)


def _rotations(file: SafetensorsFile) -> dict[str, int]:
    """The rotation of each weight that the file marks as ComfyUI's int8."""
    found = {}
    for name, entry in file.tensors.items():
        marker = file.tensors.get(name.removesuffix("weight") + "comfy_quant")
        if entry.dtype != "I8" or marker is None:
            continue
        try:
            if marker.end - marker.start > MAX_MARKER_BYTES:
                raise ValueError
            options = json.loads(file.read(marker))
            options = {**options.get("params", {}), **options}
            if options["format"] == INT8_FORMAT:
                turned = options.get("convrot", False)
                found[name] = int(options.get("convrot_groupsize", 256)) if turned else 0
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise ModelFileError(
                say(
                    "{file} has a damaged comfy_quant marker beside {name}. Download it again.",
                    file=file.path.name,
                    name=name,
                )
            ) from error
    return found


def _scale_name(file: SafetensorsFile, name: str) -> str | None:
    for ending, scale_ending in SCALE_NAMES:
        scale = name.removesuffix(ending) + scale_ending
        if name.endswith(ending) and scale in file.tensors:
            return scale
    return None


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
