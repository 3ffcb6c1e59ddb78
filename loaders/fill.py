"""From the bytes of files into the weights of a module."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..messages import say
from .reading import BUFFER_BYTES, Stretch, read_ahead
from .safetensors_file import DTYPES, ModelFileError
from .sources import Part, Sources

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SHARED_BYTES = 2**20  # a piece smaller than this is converted by one thread

# progress(bytes read so far, bytes in all); may raise to stop
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Piece:
    """Some rows of a part, and where they go."""

    part: Part
    stretch: Stretch
    weight: "Tensor"  # [rows, values a row]
    row_scale: "Tensor | None"  # [rows], for weights that are stored with a scale
    source_scale: "Tensor | None"  # [rows] or [1], float32, by which the file's values are scaled
    group: int  # columns that are rotated together in the weight


def fill(
    module: "nn.Module",
    sources: Sources,
    progress: Progress | None = None,
    device: "torch.device | None" = None,
) -> None:
    """Convert each source into the parameter of the same name, some megabytes at a time.

    Files are read once, from front to back. Rows that the file holds in the 8 bits of the
    parameter are copied as they are, with its scale or 1; other rows are given a scale where the
    parameter has one, and are rotated and quantized on `device` (None: the CPU).
    Raises ModelFileError when a file cannot be read or holds an infinity or a NaN.
    """
    pieces = sorted(_pieces(module, sources), key=lambda p: (p.stretch.path, p.stretch.start))
    total = sum(piece.stretch.length for piece in pieces)
    done = 0
    with _converters() as convert:
        stretches = [piece.stretch for piece in pieces]
        for piece, data in zip(pieces, read_ahead(stretches), strict=True):
            convert(piece, data, device)
            done += piece.stretch.length
            if progress is not None:
                progress(done, total)


@contextmanager
def _converters() -> Iterator[Callable[[_Piece, "Tensor", "torch.device | None"], None]]:
    """A function that converts a piece, its rows shared out among as many threads as PyTorch uses.

    Threads of our own, because PyTorch's wait for each other by spinning, which the reader and
    other programs pay for. They take over whether the caller is in inference mode.
    """
    import torch

    count, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def convert_rows(piece: _Piece, data: "Tensor", device: "torch.device | None") -> None:
        with torch.inference_mode(inference), torch.no_grad():
            _convert(piece, data, device)

    def convert(piece: _Piece, data: "Tensor", device: "torch.device | None") -> None:
        if len(data) < SHARED_BYTES:
            convert_rows(piece, data, device)
            return
        jobs = [
            pool.submit(convert_rows, part, rows, device)
            for part, rows in _shares(piece, data, count)
        ]
        for job in jobs:
            job.result()

    try:
        with ThreadPoolExecutor(count, "majicflux-convert", torch.set_num_threads, (1,)) as pool:
            yield convert
    finally:  # once the last thread is gone: a part of PyTorch keeps one number for the process
        torch.set_num_threads(count)


def _shares(piece: _Piece, data: "Tensor", count: int) -> Iterator[tuple[_Piece, "Tensor"]]:
    """The piece as up to `count` pieces of about as many rows each, with their bytes."""
    total = len(piece.weight)
    row_bytes = len(data) // total
    step = -(-total // count)
    for first in range(0, total, step):
        rows = slice(first, min(first + step, total))
        scale = piece.source_scale
        yield (
            replace(
                piece,
                weight=piece.weight[rows],
                row_scale=None if piece.row_scale is None else piece.row_scale[rows],
                source_scale=scale if scale is None or len(scale) == 1 else scale[rows],
            ),
            data[rows.start * row_bytes : rows.stop * row_bytes],
        )


def _pieces(module: "nn.Module", sources: Sources) -> Iterator[_Piece]:
    from ..engine.stored_linear import StoredLinear

    for prefix, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            stored = isinstance(child, StoredLinear)
            if stored and name == "scale":
                continue  # comes with the weight
            row_scale = child.scale if stored and name == "weight" else None
            group = child.group if stored and name == "weight" else 0
            first = 0
            source = sources[f"{prefix}.{name}" if prefix else name]
            rows = sum(part.rows for part in source.parts)
            for part in source.parts:
                chosen = slice(first, first + part.rows)
                weight = parameter.view(rows, -1)[chosen]
                scale = None if row_scale is None else row_scale[chosen]
                yield from _split(part, weight, scale, group)
                first += part.rows


def _split(
    part: Part, weight: "Tensor", row_scale: "Tensor | None", group: int
) -> Iterator[_Piece]:
    row_bytes = weight.shape[1] * DTYPES[part.dtype][1]
    if row_bytes == 0:
        return
    entry = part.file.tensors[part.name]
    source_scale = read_scale(part)
    step = max(1, BUFFER_BYTES // row_bytes)
    for first in range(0, part.rows, step):
        rows = slice(first, min(first + step, part.rows))
        count = rows.stop - rows.start
        start = entry.start + (part.first_row + first) * row_bytes
        yield _Piece(
            part,
            Stretch(part.file.path, start, count * row_bytes),
            weight[rows],
            None if row_scale is None else row_scale[rows],
            source_scale if source_scale is None or len(source_scale) == 1 else source_scale[rows],
            group,
        )


def read_scale(part: Part) -> "Tensor | None":
    """The file's scale for the rows of this part, float32, [rows] or [1]."""
    import torch

    if part.scale_name is None:
        return None
    entry = part.file.tensors[part.scale_name]
    data = bytearray(part.file.read(entry))
    scale = torch.frombuffer(data, dtype=getattr(torch, DTYPES[entry.dtype][0])).float()
    return scale if len(scale) == 1 else scale[part.first_row : part.first_row + part.rows]


def _convert(piece: _Piece, data: "Tensor", device: "torch.device | None") -> None:
    import torch

    dtype = getattr(torch, DTYPES[piece.part.dtype][0])
    values = data.view(dtype).view(len(piece.weight), -1)
    scale = piece.source_scale
    part, weight = piece.part, piece.weight
    store_rows(part, values, scale, weight, piece.row_scale, piece.group, device)
    # A cast to float8 without a scale makes a NaN of what is too large for the format.
    cast = weight.dtype == torch.float8_e4m3fn and piece.row_scale is None
    if cast and weight.float().isnan().any():
        raise ModelFileError(
            say(
                "{file}, tensor {name}: a value is too large for float8 without a scale. Choose "
                "float8_e4m3fn or int8 rotated.",
                file=part.file.path.name,
                name=part.name,
            )
        )


def store_rows(
    part: Part,
    values: "Tensor",
    scale: "Tensor | None",
    weight: "Tensor",
    row_scale: "Tensor | None",
    group: int,
    device: "torch.device | None" = None,
) -> None:
    """Write rows of `part` into rows of a weight, as `fill` describes.

    values: [rows, n] as the file holds them, scale: [rows] or [1] if it scales them; weight:
    [rows, n] in its dtype, row_scale: [rows] float32 if it has scales, group: columns that are
    rotated together in it. Raises ModelFileError for an infinity or a NaN.
    """
    import torch

    from ..engine.stored_linear import quantize_rows, rotate

    rotation = part.rotation or 0
    if row_scale is not None and values.dtype == weight.dtype and rotation == group:
        weight.copy_(values)
        row_scale.copy_(torch.ones(1) if scale is None else scale)
        return
    if scale is not None:
        values = rotate(values.to(torch.float32, copy=True).mul_(scale[:, None]), rotation)
    if row_scale is None:
        weight.copy_(values)
        return
    values = values.to(device)
    quantized = torch.empty(values.shape, dtype=weight.dtype, device=device)
    quantized_scale = torch.empty(len(values), device=device)
    try:
        quantize_rows(values, quantized, quantized_scale, group)
    except ValueError as error:
        raise ModelFileError(
            say(
                "{file}, tensor {name}: the weight holds an infinity or a NaN. The file is "
                "damaged; download it again.",
                file=part.file.path.name,
                name=part.name,
            )
        ) from error
    weight.copy_(quantized)
    row_scale.copy_(quantized_scale)
