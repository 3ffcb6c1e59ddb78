"""The header of a safetensors file."""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..messages import MajicFluxError, later, say

FORMAT_HEADER_BYTES = 100 * 2**20  # the format's own limit
# Ours: headers are read while the server answers nobody else. Those of Flux.1 models have 2,000
# tensors in 0.3 MB; quantized ones and whole checkpoints some times that.
MAX_HEADER_BYTES = 10 * 2**20
MAX_TENSORS = 10_000
MAX_NAME = 256  # letters
MAX_ENTRY = 1000  # letters between a tensor's name and the next
MAX_AXES = 8
MAX_NUMBER = 2**63
MOST_DECLARED = 2**20  # characters of what another program has written into the metadata
MAX_SMALL_BYTES = 2**20  # of a tensor that is read at once: a scale for every row, a marker

METADATA = "__metadata__"
SPACE = re.compile(r"[ \t\n\r]*")
DTYPE = re.compile(r"\w{1,32}")

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

FIRST_BYTES = 400  # of a file, that tell what it is if it is not safetensors
NAMING_BYTES = 2**18  # of a pickle, among which are the names in it
FIRST_LINE = 100  # characters of a text that are shown

ARCHIVE = later("{file} is an archive; unpack it and choose what is inside.")
PICKLES = TORCH_PICKLE, PYTHON_PICKLE = b"PK\x03\x04", b"\x80"
# How the first bytes of other formats begin, and what to say about them.
OTHER_FORMATS = (
    (b"GGUF", later(
        "{file} is a GGUF file, which MajicFlux cannot read; use the bf16 or float8 .safetensors."
    )),
    (TORCH_PICKLE, later(
        "{file} is a PyTorch pickle, which can run code when opened; use the .safetensors."
    )),
    (PYTHON_PICKLE, later(
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
# Names in pickles of what there is in no other format, and what to say instead.
PICKLED = (
    (b"to_k_ip.weight", later(
        "{file} is an IP-Adapter, which MajicFlux cannot apply, in a pickle, which can run code "
        "when opened. To paint by a picture use FLUX.1-Redux with ComfyUI's Apply Style Model."
    )),
    (b"image_proj", later(
        "{file} is a part of InfiniteYou or of an IP-Adapter, which MajicFlux cannot apply, in a "
        "pickle, which can run code when opened. Choose another file."
    )),
)  # fmt: skip


class ModelFileError(MajicFluxError):
    """A model file is missing, damaged or of the wrong kind."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header: dtype as safetensors names it, bytes [start, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Identity(NamedTuple):
    """What tells a file from another under the same name, now or later."""

    size: int
    mtime_ns: int
    header: str  # SHA-256 of it


class SafetensorsFile:
    """A safetensors file whose header has been read and checked; nothing else is read yet.

    A tensor may have a dtype that nobody here can read: it is refused where it is needed.

    Raises ModelFileError when the file is not there, not safetensors, shorter than its header
    says, or when its header is larger than that of any model. Within a second, whatever the file
    holds. Format: https://github.com/huggingface/safetensors#format
    """

    def __init__(self, path: Path):
        self.path = path
        with _opened(path) as file:
            self.identity = identity_of(file)  # first: what changes later is then seen
            self.tensors, self.metadata = _read_header(file, path.name, self.identity.size)

    def declared(self, key: str) -> dict[str, Any]:
        """The JSON object in the metadata under this key; empty where there is none."""
        try:
            text = self.metadata[key]
            return {**json.loads(text)} if len(text) <= MOST_DECLARED else {}
        except (ValueError, KeyError, TypeError, RecursionError):
            return {}

    def read(self, entry: TensorEntry, most: int | None = None) -> bytes:
        """The bytes of a small tensor, `most` of them. Raises ModelFileError when they are more
        than a small one has."""
        size = entry.end - entry.start
        size = size if most is None else min(size, most)
        if size > MAX_SMALL_BYTES:
            raise ModelFileError(
                "{file} has a damaged header ({error}); download it again.",
                file=self.path.name,
                error=say("a scale or a marker of {size:,} bytes", size=size),
            )
        return bytes(self.read_span(entry.start, size))

    def read_span(self, start: int, size: int) -> bytearray:
        """So many bytes of the file. Raises ModelFileError when it is no longer the same."""
        with _opened(self.path) as file:
            state = os.fstat(file.fileno())
            if (state.st_size, state.st_mtime_ns) != self.identity[:2]:
                raise changed(self.path)
            file.seek(start)
            return bytearray(file.read(size))


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Raises ModelFileError when that cannot be done, or reading fails."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise ModelFileError("{file} is not a file.", file=path)
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise ModelFileError(
            "{file} cannot be opened: {reason}.", file=path, reason=error
        ) from error


def identity_at(path: Path) -> Identity:
    """The identity of the file there. Raises ModelFileError when it cannot be read."""
    with _opened(path) as file:
        return identity_of(file)


def identity_of(file: Any) -> Identity:
    """The identity of an open file; its place is then anywhere."""
    state = os.fstat(file.fileno())
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    header = file.read(min(length, MAX_HEADER_BYTES, state.st_size))
    return Identity(state.st_size, state.st_mtime_ns, hashlib.sha256(header).hexdigest())


def changed(path: Path) -> ModelFileError:
    """The error of a file that is another than the one whose header was read."""
    return ModelFileError(
        "{file} was changed while it was being read. Run it again.", file=path.name
    )


def _read_header(
    file: Any, name: str, file_bytes: int
) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    """Tensors and metadata."""
    file.seek(0)
    first = file.read(FIRST_BYTES)
    for magic, sentence in OTHER_FORMATS:
        # A safetensors file can begin with any byte, but its ninth is always the JSON's "{".
        if first.startswith(magic) and first[8:9] != b"{":
            if magic in PICKLES:
                names = first + file.read(NAMING_BYTES)
                sentence = next((said for part, said in PICKLED if part in names), sentence)
            raise ModelFileError(sentence, file=name)
    length = int.from_bytes(first[:8], "little")
    if len(first) < 10 or first[8:9] != b"{" or length > FORMAT_HEADER_BYTES:
        raise ModelFileError(_what_else(name, first))
    data_start = 8 + length
    if data_start > file_bytes:
        raise ModelFileError("{file} is cut off inside its header; download it again.", file=name)
    if length > MAX_HEADER_BYTES:
        raise ModelFileError(
            "{file} has a header of {size:.0f} MB; no Flux.1 model needs more than {most:.0f}. "
            "Choose another file.",
            file=name,
            size=length / 2**20,
            most=MAX_HEADER_BYTES / 2**20,
        )
    file.seek(8)
    try:
        raw, metadata = _Scanner(file.read(length).decode()).header()
        entries = {key: _entry(key, value, data_start) for key, value in raw.items()}
        end = _end(entries, data_start)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(
            "{file} has a damaged header ({error}); download it again.", file=name, error=error
        ) from error
    if end > file_bytes:
        raise ModelFileError(
            "{file} is cut off: {missing:,} of its {all:,} bytes are missing. Download it again.",
            file=name,
            missing=end - file_bytes,
            all=end,
        )
    return entries, metadata


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


class _Scanner:
    """Reads the JSON of a header name by name, so that each value is bounded before it is built.

    Some megabytes of brackets would become some hundred of lists.
    """

    _decode = json.JSONDecoder(object_pairs_hook=_refuse_duplicates).raw_decode

    def __init__(self, text: str):
        self._text, self._at = text, 0

    def header(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The entries of the tensors, unchecked, and the metadata."""
        entries: dict[str, Any] = {}
        for name in self._names():
            if name in entries:
                raise ValueError(say("a name appears twice"))
            if len(name) > MAX_NAME or not name.isprintable():  # it may be shown
                raise ValueError(
                    say("a name has more than {most} letters, or odd ones", most=MAX_NAME)
                )
            if name == METADATA and self._sign() == "{":
                entries[name] = {key: self._value() for key in self._names()}
            else:
                entries[name] = self._value()
        if self._sign():
            raise ValueError(say("it does not end where it should"))
        return entries, entries.pop(METADATA, None) or {}

    def _names(self) -> Iterator[str]:
        """The names in the object that begins here; each value is to be taken before the next."""
        self._take("{")
        if self._sign() == "}":
            self._take("}")
            return
        for _ in range(MAX_TENSORS):
            name = self._value()
            if not isinstance(name, str):
                break
            self._take(":")
            yield name
            if self._sign() == "}":
                self._take("}")
                return
            self._take(",")
        raise ValueError(say("it has more than {most:,} names", most=MAX_TENSORS))

    def _value(self) -> Any:
        if self._sign() == '"':  # a text may be as long as the header
            value, self._at = self._decode(self._text, self._at)
            return value
        some = self._text[self._at : self._at + MAX_ENTRY]
        try:
            value, length = self._decode(some)
        except json.JSONDecodeError as error:
            if len(some) < MAX_ENTRY:
                raise
            raise ValueError(
                say("an entry has more than {most:,} letters", most=MAX_ENTRY)
            ) from error
        self._at += length
        return value

    def _take(self, sign: str) -> None:
        if self._sign() != sign:
            raise ValueError(say("letter {at:,} is not {sign}", at=self._at, sign=sign))
        self._at += 1

    def _sign(self) -> str:
        """The next letter that is no space; nothing at the end."""
        self._at = SPACE.match(self._text, self._at).end()  # pyright: ignore
        return self._text[self._at : self._at + 1]


def _entry(name: str, raw: dict[str, Any], data_start: int) -> TensorEntry:
    dtype, shape = raw["dtype"], tuple(raw["shape"])
    start, end = raw["data_offsets"]
    if not isinstance(dtype, str) or not DTYPE.fullmatch(dtype):
        raise ValueError(say("{name}: the dtype must be a short text", name=name))
    if len(shape) > MAX_AXES:
        raise ValueError(say("{name}: more than {most} axes", name=name, most=MAX_AXES))
    if not all(type(n) is int and 0 <= n < MAX_NUMBER for n in (*shape, start, end)):
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
