"""The header of a safetensors file."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..messages import later, say

MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit

# safetensors name -> (torch name, bytes per element)
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}

MOST_DTYPE = 32  # characters of its name
FIRST_BYTES = 400  # of a file, that tell what it is if it is not safetensors
FIRST_LINE = 100  # characters of a text that are shown

ARCHIVE = later("{file} is an archive; unpack it and choose what is inside.")
# How the first bytes of other formats begin, and what to say about them.
OTHER_FORMATS = (
    (b"GGUF", later(
        "{file} is a GGUF file, which MajicFlux cannot read; use the bf16 or float8 .safetensors."
    )),
    (b"PK\x03\x04", later(
        "{file} is a PyTorch pickle, which can run code when opened; use the .safetensors."
    )),
    (b"\x80", later(
        "{file} is a Python pickle, which can run code when opened; use the .safetensors."
    )),
    (b"version https://git-lfs", later(
        "{file} is a Git LFS pointer, not the model; download the file itself."
    )),
    (b"<", later("{file} is a web page, not the model; download the file again.")),
    (b"7z\xbc\xaf", ARCHIVE),
    (b"Rar!", ARCHIVE),
    (b"\x1f\x8b", ARCHIVE),
)  # fmt: skip


class ModelFileError(ValueError):
    """A model file is missing, damaged or of the wrong kind. The message is for the user."""

    __module__ = "majicflux"  # ComfyUI shows it, and would show the path of the pack


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header: dtype as safetensors names it, bytes [start, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """A safetensors file whose header has been read and checked; nothing else is read yet.

    A tensor may have a dtype that nobody here can read: it is refused where it is needed.

    Raises ModelFileError when the file is not there, not safetensors, or shorter than its header
    says. Format: https://github.com/huggingface/safetensors#format
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.tensors, self.metadata = _read_header(file, path.name, size)
        except OSError as error:
            reason = error.strerror or error
            raise ModelFileError(
                say("{file} cannot be opened: {reason}.", file=path, reason=reason)
            ) from error

    def read(self, entry: TensorEntry, most: int | None = None) -> bytes:
        """The bytes of a small tensor, `most` of them."""
        length = entry.end - entry.start
        with self.path.open("rb") as file:
            file.seek(entry.start)
            return file.read(length if most is None else min(length, most))


def _read_header(
    file: Any, name: str, file_bytes: int
) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    """The tensors and what the writer says of them."""
    first = file.read(FIRST_BYTES)
    for magic, sentence in OTHER_FORMATS:
        # A safetensors file can begin with any byte, but its ninth is always the JSON's "{".
        if first.startswith(magic) and first[8:9] != b"{":
            raise ModelFileError(say(sentence, file=name))
    length = int.from_bytes(first[:8], "little")
    if len(first) < 10 or first[8:9] != b"{" or length > MAX_HEADER_BYTES:
        raise ModelFileError(_what_else(name, first))
    data_start = 8 + length
    if data_start > file_bytes:
        raise ModelFileError(
            say("{file} is cut off inside its header; download it again.", file=name)
        )
    file.seek(8)
    try:
        header = json.loads(file.read(length), object_pairs_hook=_refuse_duplicates)
        metadata = header.pop("__metadata__", None)
        entries = {key: _entry(key, raw, data_start) for key, raw in header.items()}
        end = _end(entries, data_start)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(
            say("{file} has a damaged header ({error}); download it again.", file=name, error=error)
        ) from error
    if end > file_bytes:
        raise ModelFileError(
            say(
                "{file} is cut off: {missing:,} of its {all:,} bytes are missing. Download it "
                "again.",
                file=name,
                missing=end - file_bytes,
                all=end,
            )
        )
    return entries, metadata if isinstance(metadata, dict) else {}


def _what_else(name: str, first: bytes) -> str:
    """The sentence about a file that begins so and is not safetensors."""
    if not first:
        return say("{file} is empty. Download it again.", file=name)
    if not any(first):
        return say(
            "{file} begins with zeros alone, as a download that was broken off. Download it again.",
            file=name,
        )
    text = first.decode("utf-8", "replace").rstrip("\ufffd")  # a character may be cut in two
    line = text.strip().partition("\n")[0].strip()
    if line and all(c.isprintable() or c.isspace() for c in text):
        return say(
            "{file} is a text, not the model: “{line}”. Download the file again.",
            file=name,
            line=line[:FIRST_LINE],
        )
    return say("{file} is not a safetensors file; download the .safetensors version.", file=name)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(say("a name appears twice"))
    return result


def _entry(name: str, raw: dict[str, Any], data_start: int) -> TensorEntry:
    dtype, shape = raw["dtype"], tuple(raw["shape"])
    start, end = raw["data_offsets"]
    if not isinstance(dtype, str) or len(dtype) > MOST_DTYPE:
        raise ValueError(say("{name}: the dtype must be a short text", name=name))
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(say("{name}: sizes and offsets must be whole numbers", name=name))
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype][1] != end - start:
        raise ValueError(say("{name}: shape and length disagree", name=name))
    return TensorEntry(dtype, shape, data_start + start, data_start + end)


def _end(entries: dict[str, TensorEntry], data_start: int) -> int:
    """Where the last tensor ends."""
    end = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start < end:
            raise ValueError(say("tensors overlap"))
        end = entry.end
    return end
