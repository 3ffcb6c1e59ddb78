"""Which spans of which files a weight is made of."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..engine.quant.formats import rotation_group
from .layouts import Layout
from .safetensors_file import ModelFileError, SafetensorsFile

FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# ComfyUI's two ways to store the scale of a float8 weight, as the ending of its name.
SCALE_NAMES = ((".weight", ".scale_weight"), (".weight", ".weight_scale"))
# ComfyUI's names of the formats that we read, in the JSON by which it marks a layer, and the dtype
# of their weights, which may also be written as plain bytes.
INT8_FORMAT = "int8_tensorwise"
FORMATS = {INT8_FORMAT: "I8", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
MARKER, MARKERS = "comfy_quant", "_quantization_metadata"  # beside a weight, of a whole file
MOST_MARKER_BYTES, MOST_FORMAT = 2**10, 40  # of one marker, characters of a format's name
DAMAGED = "damaged"  # in place of a format
# What stands beside a weight that is something else without it, and which we do not read.
MULTIPLIERS = ("weight_scale_2", "weight_scale_inv", "pre_quant_scale", "weight_s_rel",
               "smooth_factor", "weight_quantizer._scale")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Rows of one tensor in a file, and the name of the scale they are to be multiplied by.

    format: that the file declares, as ComfyUI names it. rotation: for ComfyUI's int8 format, how
    many columns are rotated together, 0 being none.
    """

    file: SafetensorsFile
    name: str
    first_row: int
    rows: int
    scale_name: str | None = None
    format: str | None = None
    rotation: int | None = None

    @property
    def dtype(self) -> str:
        dtype = self.file.tensors[self.name].dtype
        return FORMATS.get(self.format or "", dtype) if dtype == "U8" else dtype

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
    sources = {}
    for file in files:
        layers = file.declared(MARKERS).get("layers")
        declared = layers if isinstance(layers, dict) else {}
        for name, entry in file.tensors.items():
            if name.startswith(prefix):
                rows = entry.shape[0] if entry.shape else 1
                form = _format(file, name, prefix, declared)
                part = Part(file, name, 0, rows, _scale_name(file, name), *form)
                sources[name.removeprefix(prefix)] = Source((part,))
    return sources


def files_of(sources: Sources) -> list[SafetensorsFile]:
    """The files that the sources are in, by their paths."""
    files = {part.file for source in sources.values() for part in source.parts}
    return sorted(files, key=lambda file: file.path)


def stacked(sources: Iterable[Source]) -> Source:
    """The sources as one, first rows first."""
    return Source(tuple(part for source in sources for part in source.parts))


def split(source: Source, count: int) -> list[Source]:
    """The weight as `count` of equally many rows."""
    (part,) = source.parts
    edges = [part.rows * index // count for index in range(count + 1)]
    return [Source((replace(part, first_row=a, rows=b - a),)) for a, b in pairwise(edges)]


def cut(source: Source, edges: Iterable[int]) -> Source:
    """The same weight, in which a part begins at each of these rows."""
    parts, first = [], 0
    for part in source.parts:
        inside = {edge - first for edge in edges if first < edge < first + part.rows}
        for start, end in pairwise(sorted({0, part.rows} | inside)):
            parts.append(replace(part, first_row=part.first_row + start, rows=end - start))
        first += part.rows
    return Source(tuple(parts))


def halves_swapped(source: Source) -> Source:
    """The same weight with the second half of its rows before the first."""
    return stacked(reversed(split(source, 2)))


def prefix_before(names: Iterable[str], marker: str) -> str:
    """What stands before `marker` in the first name that ends with it; "" when none does."""
    return next((name.removesuffix(marker) for name in names if name.endswith(marker)), "")


def missing(path: Path, name: str) -> ModelFileError:
    """The error of a file that lacks a tensor."""
    return ModelFileError(
        "{file} is incomplete: {name} is missing. Download it again, or choose another file.",
        file=path.name,
        name=name,
    )


def misfit(path: Path, name: str, shape: Iterable[int], expected: object) -> ModelFileError:
    """The error of a tensor whose shape is not the one that others have."""
    return ModelFileError(
        "{file} does not fit: {name} has the shape {shape} where {expected} follows from the "
        "others. Choose another file.",
        file=path.name,
        name=name,
        shape=list(shape),
        expected=expected,
    )


def in_layout(path: Path, sources: Sources, layout: Layout) -> dict[str, Source]:
    """The sources that the layout names; trailing axes of length 1 do not count.

    Raises ModelFileError unless each of them is there, of its shape, readable.
    """
    absent = [name for name in layout if name not in sources]
    if absent:
        raise ModelFileError(
            "{file} is incomplete: {count} of {all} tensors are missing, {name} among them. "
            "Download it again, or choose another file.",
            file=path.name,
            count=len(absent),
            all=len(layout),
            name=absent[0],
        )
    for name in layout:  # first, as other formats have other shapes too
        for part in sources[name].parts:
            require_readable(path, name, part)
    for name, shape in layout.items():
        source = sources[name]
        if without_ones(source.shape) != without_ones(shape):
            raise misfit(path, name, source.shape, list(shape))
        for part in source.parts:
            if part.row_shape != source.parts[0].row_shape:
                raise ModelFileError(
                    "{file} does not fit: {name} has rows of {shape} where {expected} follows "
                    "from the tensors that it belongs to. Choose another file.",
                    file=path.name,
                    name=part.name,
                    shape=list(part.row_shape),
                    expected=list(source.parts[0].row_shape),
                )
    return {name: sources[name] for name in layout}


def require_readable(path: Path, name: str, part: Part) -> None:
    """Raise ModelFileError when the weight of this name has a part in a format we do not know."""
    if part.format == DAMAGED:
        raise ModelFileError(
            "{file} has a damaged comfy_quant marker beside {name}. Download it again.",
            file=path.name,
            name=part.name,
        )
    layer = part.name.removesuffix("weight")
    beside = next((m for m in MULTIPLIERS if layer + m in part.file.tensors), None)
    unread = None
    if part.format is not None and part.format not in FORMATS:
        unread = part.format
    elif part.format is not None and (part.format == INT8_FORMAT) != (part.dtype == "I8"):
        unread = f"{part.dtype} ({part.format})"
    elif part.dtype not in FLOATING and not _is_int8(part):
        unread = part.dtype
    elif beside is not None and layer != part.name:
        unread = f"{part.dtype} + {beside}"
    if unread is not None:
        raise ModelFileError(
            "{file} stores {name} as {dtype}, a quantisation that MajicFlux cannot read. Use "
            "the bf16, fp16, float8 or int8_tensorwise file.",
            file=path.name,
            name=name,
            dtype=unread,
        )
    if part.scale_name is not None:
        entry = part.file.tensors[part.scale_name]
        rows = part.file.tensors[part.name].shape[0]
        if entry.dtype not in FLOATING or math.prod(entry.shape) not in (1, rows):
            raise ModelFileError(
                "{file} stores {name} with a scale of {dtype} and shape {shape}, which "
                "MajicFlux cannot read. Use the bf16 or fp16 file.",
                file=path.name,
                name=name,
                dtype=entry.dtype,
                shape=list(entry.shape),
            )


def _is_int8(part: Part) -> bool:
    """Whether these are rows of int8 with a scale and a rotation that we know."""
    group, width = part.rotation, math.prod(part.row_shape)
    if part.dtype != "I8" or part.scale_name is None or group is None:
        return False
    return group == 0 or group == rotation_group(width, group)


def _format(
    file: SafetensorsFile, name: str, prefix: str, declared: dict[str, Any]
) -> tuple[str | None, int | None]:
    """Format and rotation of a tensor, as ComfyUI declares them for the layer of a weight.

    In the header a layer has its name in the file or that without prefix, as in ComfyUI.
    """
    layer, dot, last = name.rpartition(".")
    if last != "weight":
        return None, None
    marker = file.tensors.get(f"{layer}{dot}{MARKER}")
    options = declared.get(layer, declared.get(layer.removeprefix(prefix)))
    try:
        if options is None:
            if marker is None:
                return None, None
            options = json.loads(file.read(marker, MOST_MARKER_BYTES))
        params = options.get("params")
        options = {**(params if isinstance(params, dict) else {}), **options}
        form = str(options["format"])[:MOST_FORMAT]
        if form != INT8_FORMAT:
            return form, None
        turned = options.get("convrot", False)
        return form, int(options.get("convrot_groupsize", 256)) if turned else 0
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return DAMAGED, None


def _scale_name(file: SafetensorsFile, name: str) -> str | None:
    for ending, scale_ending in SCALE_NAMES:
        scale = name.removesuffix(ending) + scale_ending
        if name.endswith(ending) and scale in file.tensors:
            return scale
    return None


def without_ones(shape: tuple[int, ...], axes: int = 0) -> tuple[int, ...]:
    """Without the axes of length 1 after the first `axes`, which a convolution has."""
    while len(shape) > axes and shape[-1] == 1:
        shape = shape[:-1]
    return shape
