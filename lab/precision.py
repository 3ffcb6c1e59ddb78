"""What a Flux.1 transformer file loses in each precision, measured on some rows of each matrix."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import groupby
from typing import TYPE_CHECKING

from ..engine.diffsynth_files import diffsynth_module
from ..engine.flux.geometry import FluxGeometry, kind_of_layer
from ..engine.quant.formats import FLOAT8, INT8_ROTATED, PRECISIONS, STORAGES, Precision, Storage
from ..loaders.convert import read_scale, store_rows
from ..loaders.flux_dit import storage_in
from ..loaders.layouts import Layout, flux_dit_layout
from ..loaders.read_ahead import FileSpan, read_ahead
from ..loaders.safetensors_file import DTYPES
from ..loaders.tensor_sources import Part, Source, Sources

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 64  # of each matrix; 1 % of a full-size file
Progress = Callable[[int, int], None]  # bytes read so far, and in all
VALUES_AT_ONCE = 2**18  # that are compared in float64
KINDS = tuple(field.name for field in fields(Precision))
# The 8-bit choices that can be suggested. Without scales there is nothing to gain: where that is
# as good, float8_e4m3fn holds the same values.
SUGGESTED = (str(INT8_ROTATED), str(FLOAT8))


@dataclass(frozen=True)
class Cost:
    """error: ||stored - W|| / ||W|| over matrices, W being the file's own values; infinite where
    a value is too large for the format. bytes: of matrices, scales, biases and norms."""

    error: float
    bytes: int


@dataclass(frozen=True)
class PrecisionReport:
    """The figures of one file.

    contents: the share of the parameters in each format of the file, the largest first. kinds:
    for each kind of layer, what it costs in each of STORAGES. choices: for each of PRECISIONS,
    what the whole file costs when it is loaded so. rows: measured of each matrix, at most.
    """

    geometry: FluxGeometry
    parameters: int
    contents: dict[str, float]
    kinds: dict[str, dict[str, Cost]]
    choices: dict[str, Cost]
    rows: int

    @property
    def suggested(self) -> str:
        """The weight_precision of 8 bits with the smallest error; of equals, the smallest."""
        return min(SUGGESTED, key=lambda name: (self.choices[name].error, self.choices[name].bytes))


@dataclass(frozen=True)
class _Sample:
    """Rows of one part of a matrix.

    weight: how many rows of the matrix each stands for. scale: [rows] or [1], float32, if the
    file scales them. groups: how many columns are rotated together in each of STORAGES.
    """

    layer: str
    part: Part
    rows: Sequence[int]  # of the tensor in the file
    width: int
    weight: float
    scale: "Tensor | None"
    groups: Mapping[str, int]

    def spans(self) -> Iterator[FileSpan]:
        """Where the rows lie, neighbours as one."""
        row_bytes = self.width * DTYPES[self.part.dtype][1]
        first_byte = self.part.file.tensors[self.part.name].start
        for _, run in groupby(enumerate(self.rows), lambda pair: pair[1] - pair[0]):
            rows = [row for _, row in run]
            start = first_byte + rows[0] * row_bytes
            yield FileSpan(
                self.part.file.path, start, len(rows) * row_bytes, self.part.file.identity
            )


# Of each layer: the sum of its squared values (under ITSELF) and of the squared errors of STORAGES.
_Squares = dict[str, dict[str, float]]
ITSELF = ""


def measure(
    geometry: FluxGeometry, sources: Sources, rows: int = ROWS, progress: Progress | None = None
) -> PrecisionReport:
    """Store `rows` evenly spread rows of every matrix in each format, and compare in float64.

    geometry and sources are what `inspect_flux_dit` gives; only these rows are read. They are
    stored by the function that loading uses, so that rows which the file holds in a format have
    no error in it. Raises ModelFileError as loading does.
    """
    names = diffsynth_module("utils.state_dict_converters.flux_dit")
    shapes: Layout = names.FluxDiTStateDictConverter(flux_dit_layout(geometry))
    renamed: dict[str, Source] = names.FluxDiTStateDictConverter(sources)
    with _one_thread():
        squares = _measured(_samples(shapes, renamed, rows), progress)

    def cost(precision: Precision, names: Iterable[str], as_loaded: bool) -> Cost:
        """Of the weights of these names, as `precision` says or as it is loaded from this file."""
        values = errors = size = 0
        for name in names:
            layer = name.rpartition(".")[0]
            storage: Storage = getattr(precision, kind_of_layer(layer))
            if as_loaded:
                storage = storage_in(precision, renamed, layer)
            size += _bytes(shapes[name], storage)
            if len(shapes[name]) == 2:
                values += squares[layer][ITSELF]
                errors += squares[layer][_column(storage)]
        return Cost(math.sqrt(errors / values) if values else 0.0, size)

    by_kind = {kind: [name for name in shapes if kind_of_layer(name) == kind] for kind in KINDS}
    return PrecisionReport(
        geometry,
        sum(map(math.prod, shapes.values())),
        _contents(sources),
        {
            kind: {
                label: cost(Precision(*[storage] * len(KINDS)), names, as_loaded=False)
                for label, storage in STORAGES.items()
            }
            for kind, names in by_kind.items()
        },
        {label: cost(precision, shapes, as_loaded=True) for label, precision in PRECISIONS.items()},
        rows,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch's threads wait for each other by spinning, which costs more than they help here."""
    import torch

    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def _samples(shapes: Layout, sources: Sources, count: int) -> list[_Sample]:
    """`count` rows of each matrix, spread evenly, in the order of the files."""
    samples = []
    for name, shape in shapes.items():
        if len(shape) != 2 or 0 in shape:
            continue
        source, (total, width) = sources[name], shape
        chosen = _spread(min(count, total), total)
        weight = total / len(chosen)
        groups = {label: _group(source, width, storage) for label, storage in STORAGES.items()}
        step = max(1, VALUES_AT_ONCE // width)
        first = 0
        for part in source.parts:
            inside = [row - first for row in chosen if first <= row < first + part.rows]
            first += part.rows
            scale = read_scale(part) if inside else None
            for start in range(0, len(inside), step):
                ours = inside[start : start + step]
                rows = [part.first_row + row for row in ours]
                ours_scale = scale if scale is None or len(scale) == 1 else scale[ours]
                layer = name.rpartition(".")[0]
                samples.append(_Sample(layer, part, rows, width, weight, ours_scale, groups))

    def place(sample: _Sample) -> tuple[str, int]:
        span = next(sample.spans())
        return str(span.path), span.start

    return sorted(samples, key=place)


def _spread(count: int, total: int) -> list[int]:
    """`count` of the numbers below `total`, each in the middle of its share of them."""
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def _group(source: Source, width: int, storage: Storage) -> int:
    """The columns that this storage rotates together; int8 in the file stays as it was rotated."""
    from ..engine.quant.formats import rotation_group

    rotations = {part.rotation for part in source.parts}
    if storage.dtype == "int8" and len(rotations) == 1 and None not in rotations:
        return rotations.pop() or 0
    return rotation_group(width, storage.rotated)


def _measured(samples: Sequence[_Sample], progress: Progress | None) -> _Squares:
    import torch

    spans = [list(sample.spans()) for sample in samples]
    total = sum(span.length for those in spans for span in those)
    squares: _Squares = defaultdict(lambda: defaultdict(float))
    reader = read_ahead([span for those in spans for span in those])
    done = 0
    for sample, those in zip(samples, spans, strict=True):
        lengths = [span.length for span in those]
        data = torch.empty(sum(lengths), dtype=torch.uint8)
        for rows in data.split(lengths):
            rows.copy_(next(reader))
        dtype = getattr(torch, DTYPES[sample.part.dtype][0])
        _compare(sample, data.view(dtype).view(-1, sample.width), squares[sample.layer])
        done += len(data)
        if progress is not None:
            progress(done, total)
    return squares


def _compare(sample: _Sample, values: "Tensor", squares: dict[str, float]) -> None:
    """Add the squares of these rows, `values` [rows, width] as the file holds them."""
    import torch

    own, rotation = values.to(torch.float64, copy=True), sample.part.rotation or 0
    if sample.scale is not None:
        own *= sample.scale.double()[:, None]
    squares[ITSELF] += sample.weight * _square(own)
    for label, storage in STORAGES.items():
        group = sample.groups[label]
        error = _stored(sample, values, storage, group)
        # A rotation leaves lengths as they are, so both may stay rotated.
        error -= own if group == rotation else _turned(own, rotation, group)
        squares[label] += sample.weight * _square(error)


def _stored(sample: _Sample, values: "Tensor", storage: Storage, group: int) -> "Tensor":
    """What the rows are once they are stored, in float64, still rotated."""
    import torch

    weight = torch.empty(values.shape, dtype=storage.torch_dtype)
    scale = torch.empty(len(values), dtype=torch.float32) if storage.scaled else None
    store_rows(sample.part, values, sample.scale, weight, scale, group)
    return weight.double() if scale is None else weight.double().mul_(scale.double()[:, None])


def _turned(values: "Tensor", rotation: int, group: int) -> "Tensor":
    from ..engine.kernels.hadamard import rotate

    return rotate(rotate(values, rotation), group)


def _square(values: "Tensor") -> float:
    """The sum of the squares; infinite if a value is not finite, as float8 beyond its range."""
    import torch

    square = torch.linalg.vector_norm(values).item() ** 2
    return square if math.isfinite(square) else math.inf


def _column(storage: Storage) -> str:
    """The one of STORAGES that this is measured as; int8 of a file may be rotated by its own."""
    return str(INT8_ROTATED if storage.dtype == "int8" else storage)


def _bytes(shape: Sequence[int], storage: Storage) -> int:
    import torch

    matrix = len(shape) == 2
    dtype = storage.torch_dtype if matrix else getattr(torch, storage.vector_dtype)
    scales = torch.float32.itemsize * shape[0] if matrix and storage.scaled else 0
    return math.prod(shape) * dtype.itemsize + scales


def _contents(sources: Sources) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for source in sources.values():
        for part in source.parts:
            counts[_format(part)] += part.rows * math.prod(part.row_shape)
    return {name: count / counts.total() for name, count in counts.most_common()}


def _format(part: Part) -> str:
    name = DTYPES[part.dtype][0]
    if part.rotation is not None:
        return f"{name} rotated" if part.rotation else name
    return f"{name} scaled" if part.scale_name else name
