"""From the bytes of files into the weights of a module."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ..engine.torch_state import torch
from ..messages import later
from .convert_on_device import DeviceQuantizer
from .read_ahead import BUFFER_BYTES, FileSpan, Reader
from .safetensors_file import DTYPES, ModelFileError, SafetensorsFile
from .tensor_sources import Part, Sources, cut

if TYPE_CHECKING:
    from torch import Tensor, nn

# The largest value that a weight may have: the norms square what it gives in float32. No model has
# one of more than some thousands.
LARGEST = 1e18
MOST_WORKERS = 16  # each with a buffer to read into
READING = later("reading and converting {done:.1f} of {total:.1f} GB")

# progress(bytes done, bytes in all, what is being done: a text for `say` with fields `done` and
# `total` in GB); may raise to stop
Progress = Callable[[int, int, str], None]
MakeRoom = Callable[["Tensor"], None]  # called with rows of a weight before they are written


@dataclass(frozen=True)
class RowChange:
    """What is done to rows [first, first + rows) of a weight before they are stored.

    apply(start, values): changes `values` in place, float32 [n, values a row], which begin `start`
    rows after the first. Called by several threads.
    """

    first: int
    rows: int
    apply: Callable[[int, "Tensor"], None]


Changes = Mapping[str, Sequence[RowChange]]  # by the names of parameters, in their order


@dataclass(frozen=True)
class _Piece:
    """Some rows of a part, and where they go."""

    part: Part
    span: FileSpan
    weight: "Tensor"  # [rows, values a row]
    row_scale: "Tensor | None"  # [rows], for weights that are stored with a scale
    source_scale: "Tensor | None"  # [rows] or [1], float32, by which the file's values are scaled
    group: int  # columns that are rotated together in the weight
    first: int  # of the rows of the whole weight
    changes: Sequence[RowChange]  # of all these rows

    def change(self, start: int, values: "Tensor") -> None:
        """Change float32 values in place that begin `start` rows after the first."""
        for change in self.changes:
            change.apply(self.first + start - change.first, values)


def convert_into(
    module: "nn.Module",
    sources: Sources,
    progress: Progress | None = None,
    device: "torch.device | None" = None,
    make_room: MakeRoom | None = None,
    changes: Changes | None = None,
) -> None:
    """Convert each source into the parameter of the same name, some megabytes at a time.

    Files are read once, from front to back, by threads that each convert what they have read.
    Rows that the file holds in the 8 bits of the parameter are copied as they are, with its scale
    or 1; other rows are given a scale where the parameter has one, and are rotated and quantized
    on `device` (None: the CPU). Rows with `changes` are converted as float32 of the changed values.
    Raises ModelFileError when a file cannot be read or holds an infinity, a NaN or a value beyond
    LARGEST, and what `make_room` raises.
    """
    quantizer = None if device in (None, torch.device("cpu")) else DeviceQuantizer(device)
    # A processor has enough to do with less at a time, and needs memory to do it in.
    size = BUFFER_BYTES if quantizer else BUFFER_BYTES // 2
    pieces = [*_pieces(module, sources, size, changes or {})]
    pieces.sort(key=lambda piece: (piece.span.path, piece.span.start))
    total = sum(piece.span.length for piece in pieces)
    done = 0
    with _workers(quantizer, size, make_room) as start:
        if progress is not None:
            progress(0, total, READING)
        jobs = [start(piece) for piece in pieces]
        for piece, job in zip(pieces, jobs, strict=True):
            job.result()
            done += piece.span.length
            if progress is not None:
                progress(done, total, READING)


@contextmanager
def _workers(
    quantizer: DeviceQuantizer | None, size: int, make_room: MakeRoom | None
) -> Iterator[Callable[[_Piece], Future[None]]]:
    """A function that has a piece read, converted and written by one of several threads.

    Threads of our own, because PyTorch's wait for each other by spinning, which other programs
    pay for. They take over whether the caller is in inference mode. When the context is left by
    an error, what they have not begun is not done.
    """
    count, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    workers = min(MOST_WORKERS, count + 1)  # one may wait for the disk
    own = threading.local()

    def load(piece: _Piece) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = quantizer.buffer() if quantizer else torch.empty(size, dtype=torch.uint8)
        with torch.inference_mode(inference), torch.no_grad():
            data = reader.read(piece.span, own.buffer)
            if make_room is not None:
                make_room(piece.weight)
                if piece.row_scale is not None:
                    make_room(piece.row_scale)
            _convert(piece, data, quantizer)

    try:
        with (
            Reader() as reader,
            ThreadPoolExecutor(workers, "majicflux-load", torch.set_num_threads, (1,)) as pool,
        ):
            try:
                yield partial(pool.submit, load)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:  # once the last thread is gone: a part of PyTorch keeps one number for the process
        torch.set_num_threads(count)
        if quantizer is not None:
            quantizer.close()


def _pieces(module: "nn.Module", sources: Sources, size: int, changes: Changes) -> Iterator[_Piece]:
    """size: bytes of one at most. All rows of a piece have the same changes."""
    from ..engine.quant.linear import StoredLinear

    for prefix, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            stored = isinstance(child, StoredLinear)
            if stored and name == "scale":
                continue  # comes with the weight
            row_scale = child.scale if stored and name == "weight" else None
            group = child.group if stored and name == "weight" else 0
            first = 0
            full_name = f"{prefix}.{name}" if prefix else name
            own = changes.get(full_name, ())
            edges = [edge for change in own for edge in (change.first, change.first + change.rows)]
            source = cut(sources[full_name], edges)
            rows = sum(part.rows for part in source.parts)
            for part in source.parts:
                chosen = slice(first, first + part.rows)
                weight = parameter.view(rows, -1)[chosen]
                scale = None if row_scale is None else row_scale[chosen]
                made = [c for c in own if c.first <= first < c.first + c.rows]
                given = (part, _span(part), weight, scale, read_scale(part), group, first, made)
                yield from _split(_Piece(*given), size)
                first += part.rows


def _split(whole: _Piece, size: int) -> Iterator[_Piece]:
    """The rows of a part as pieces of at most `size` bytes."""
    count, scale = len(whole.weight), whole.source_scale
    row_bytes = whole.span.length // max(1, count)
    if row_bytes == 0:
        return
    step = max(1, size // row_bytes)
    for first in range(0, count, step):
        rows = slice(first, min(first + step, count))
        start, length = whole.span.start + first * row_bytes, (rows.stop - first) * row_bytes
        yield replace(
            whole,
            span=replace(whole.span, start=start, length=length),
            weight=whole.weight[rows],
            row_scale=None if whole.row_scale is None else whole.row_scale[rows],
            source_scale=scale if scale is None or len(scale) == 1 else scale[rows],
            first=whole.first + first,
        )


def _span(part: Part) -> FileSpan:
    row_bytes = math.prod(part.row_shape) * DTYPES[part.dtype][1]
    start = part.file.tensors[part.name].start + part.first_row * row_bytes
    return FileSpan(part.file.path, start, part.rows * row_bytes, part.file.identity)


def read_rows(part: Part, rows: slice) -> "Tensor":
    """Some rows of a part without a scale, float32 [rows, values a row].

    Raises ModelFileError as `convert_into`.
    """
    from ..engine.quant.quantize import float32_of

    span = _span(part)
    row_bytes = span.length // part.rows
    size = (rows.stop - rows.start) * row_bytes
    data = part.file.read_span(span.start + rows.start * row_bytes, size)
    values = torch.frombuffer(data, dtype=getattr(torch, DTYPES[part.dtype][0]))
    require_sane(part, values)
    return float32_of(values).view(rows.stop - rows.start, -1)


def read_small(file: SafetensorsFile, name: str) -> "Tensor":
    """The values of a small tensor, in one axis."""
    entry = file.tensors[name]
    data = bytearray(file.read(entry))
    return torch.frombuffer(data, dtype=getattr(torch, DTYPES[entry.dtype][0]))


def read_scale(part: Part) -> "Tensor | None":
    """The file's scale for the rows of this part, float32, [rows] or [1]."""
    if part.scale_name is None:
        return None
    scale = read_small(part.file, part.scale_name).float()
    _require_sane(part, part.scale_name, _largest(scale))
    return scale if len(scale) == 1 else scale[part.first_row : part.first_row + part.rows]


def _convert(piece: _Piece, data: "Tensor", quantizer: DeviceQuantizer | None) -> None:
    from ..engine.quant.quantize import holds_nan

    dtype = getattr(torch, DTYPES[piece.part.dtype][0])
    values = data.view(dtype).view(len(piece.weight), -1)
    part, weight = piece.part, piece.weight
    scale, row_scale = piece.source_scale, piece.row_scale
    change = piece.change if piece.changes else None
    store_rows(part, values, scale, weight, row_scale, piece.group, quantizer, change)
    # A cast to float8 without a scale has a NaN for what is too large for the format.
    cast = weight.dtype == torch.float8_e4m3fn and row_scale is None
    if cast and holds_nan(weight):
        raise ModelFileError(
            "{file}, tensor {name}: a value is too large for float8 without a scale. Choose "
            "float8_e4m3fn or int8 rotated.",
            file=part.file.path.name,
            name=part.name,
        )


def store_rows(
    part: Part,
    values: "Tensor",
    scale: "Tensor | None",
    weight: "Tensor",
    row_scale: "Tensor | None",
    group: int,
    quantizer: DeviceQuantizer | None = None,
    change: Callable[[int, "Tensor"], None] | None = None,
) -> None:
    """Write rows of `part` into rows of a weight, as `convert_into` describes.

    values: [rows, n] as the file holds them, which a `quantizer` uses up; scale: [rows] or [1] if
    it scales them; weight: [rows, n] in its dtype; row_scale: [rows] float32 if it has scales;
    group: columns that are rotated together in it; change(first, some): of float32 rows before they
    are stored. Raises ModelFileError for an infinity, a NaN or a value beyond LARGEST.
    """
    from ..engine.kernels.hadamard import rotate
    from ..engine.kernels.row_format import FLOAT8_DTYPE, LIMITS
    from ..engine.quant.quantize import (
        FLOAT8_NAN,
        LARGEST_CAST,
        VALUES_AT_ONCE,
        float32_of,
        quantize_rows,
    )

    rotation = part.rotation or 0
    same = values.dtype == weight.dtype and rotation == group
    as_it_is = row_scale is not None and same and change is None
    # What is quantized shows its largest value by its scale.
    if as_it_is or row_scale is None or change is not None:
        by = 1.0 if scale is None else _largest(scale)
        _require_sane(part, part.name, _largest(values) * by)
    if row_scale is not None and as_it_is:
        weight.copy_(values)
        row_scale.copy_(torch.ones(1, dtype=torch.float32) if scale is None else scale)
        return
    quantize = quantize_rows if quantizer is None else quantizer.quantize
    plain_rows = scale is None and change is None
    whole = plain_rows and (row_scale is not None or values.dtype == weight.dtype)
    step = len(values) if whole else max(1, VALUES_AT_ONCE // values.shape[1])
    for first in range(0, len(values), step):
        rows = slice(first, first + step)
        some = values[rows]
        if scale is not None:
            by = scale if len(scale) == 1 else scale[rows]
            some = rotate(float32_of(some).mul_(by[:, None]), rotation)
        if change is not None:
            some = float32_of(some) if scale is None else some
            change(first, some)
        if row_scale is None:
            # By way of float32, because PyTorch is slow where neither format is wider.
            cast = some.dtype != weight.dtype
            plain = float32_of(some) if cast and some.itemsize < 4 else some
            weight[rows].copy_(plain)
            # Larger ones become a NaN by some versions of PyTorch, 448 by others.
            if cast and weight.dtype == FLOAT8_DTYPE:
                largest = torch.linalg.vector_norm(plain, ord=float("inf"))
                if not largest <= LARGEST_CAST:
                    beyond = plain.abs() > LARGEST_CAST
                    weight[rows].view(torch.int8).masked_fill_(beyond, FLOAT8_NAN)
            continue
        try:
            quantize(some, weight[rows], row_scale[rows], group)
        except ValueError as error:
            raise damaged(part, part.name) from error
        _require_sane(part, part.name, _largest(row_scale[rows]) * LIMITS[weight.dtype])


def _largest(values: "Tensor") -> float:
    """The largest magnitude, or what is not finite. Within the bytes that were just read, it takes
    a fraction of what reading them took."""
    if not values.is_floating_point():
        return torch.iinfo(values.dtype).max
    if not values.numel():
        return 0.0
    if values.itemsize == 1:  # without their sign, their bits are in the order of their values
        return values.view(torch.int8).bitwise_and(0x7F).amax().view(values.dtype).item()
    least, most = torch.aminmax(values)
    return torch.maximum(most, -least).item()  # a NaN is both of them


def require_sane(part: Part, values: "Tensor") -> None:
    """Raise ModelFileError, which names the part, unless a weight may have all these values."""
    _require_sane(part, part.name, _largest(values))


def _require_sane(part: Part, name: str, largest: float) -> None:
    if not largest <= LARGEST:
        raise damaged(part, name)


def damaged(part: Part, name: str) -> ModelFileError:
    """The error of a tensor that holds what no weight has."""
    return ModelFileError(
        "{file}, tensor {name}: it holds a NaN, an infinity or a value that no weight has. The "
        "file is damaged; download it again.",
        file=part.file.path.name,
        name=name,
    )
