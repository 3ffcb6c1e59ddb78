"""Prepared weights: a converted model on disk, laid out as its blocks are, and mapped from there.

The file is a header line of JSON, zeros up to HEADER_BYTES, then the buffer of each block, every
one beginning on a page. It is filled under another name, synced and renamed, so a file under its
own name is always whole. Mapped weights are file-backed: the system may drop their pages and read
them again, instead of swapping.
"""

import contextlib
import hashlib
import json
import logging
import mmap
import os
import shutil
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..messages import later, say
from .fill import MakeRoom, Progress
from .safetensors_file import ModelFileError

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.offload import OffloadedModule

log = logging.getLogger("majicflux")

SUFFIX = ".majicflux"
FORMAT = 4  # raise it when the layout of a block or the conversion changes
PAGE = 4096
HEADER_BYTES = 16 * PAGE
SAMPLES = 16  # pages of each block whose checksum is kept: damage is found without reading it all
SPARE_BYTES = 2**30  # of disk, to be left to the user
ABANDONED_SECONDS = 3600  # after which an unfinished file belongs to nobody
WRITE_OUT_SECONDS = 1.0
KEEPING = later("keeping {total:.1f} GB on disk")

Convert = Callable[[MakeRoom], None]  # fills the weights, asking for room for what it writes


def prepared_file(
    folder: Path, parts: list[Path], weights: "OffloadedModule", precision: str
) -> Path:
    """Where the weights made of the files `parts` in `precision` are kept.

    The name holds the identity of the source: each file's size, time and header, the precision
    and the layout of the blocks. A changed source therefore has another name.
    """
    identity: list[Any] = [FORMAT, precision, [b.nbytes for b in weights.all_blocks]]
    for part in parts:
        state = part.stat()
        with part.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = hashlib.sha256(file.read(length)).hexdigest()
        identity.append([state.st_size, state.st_mtime_ns, header])
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    return folder / f"{parts[0].stem}-{key}{SUFFIX}"


def keep(
    folder: Path,
    parts: list[Path],
    weights: "OffloadedModule",
    precision: str,
    convert: Convert,
    progress: Progress | None = None,
) -> bool:
    """Map the weights from where they are kept, after `convert` has filled them if they are not.

    False when they cannot be kept; the weights then have no memory.
    """
    path = prepared_file(folder, parts, weights, precision)
    return map_prepared(weights, path) or prepare(weights, path, convert, progress)


def prepare(
    weights: "OffloadedModule", path: Path, convert: Convert, progress: Progress | None = None
) -> bool:
    """Let `convert` fill the weights in a file, which becomes `path`, and map it from there.

    The weights are in the file's pages from the beginning, never in anonymous memory. False, with
    one warning, when that cannot be done; what `convert` raises passes through. Nothing is left in
    both cases, and the weights then have no memory.
    """
    _remove_abandoned(path.parent)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w+b") as file:
            _fill(weights, file, convert, progress)
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        weights.forget()
        with contextlib.suppress(OSError):
            partial.unlink()
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or error
        log.warning("Prepared weights were not kept in %s: %s.", path.parent, reason)
        return False
    return map_prepared(weights, path)


def map_prepared(weights: "OffloadedModule", path: Path) -> bool:
    """Let the weights live in the file, if it is there and whole; a damaged one is removed."""
    if not path.is_file():
        return False
    try:
        weights.live_in(_map(weights, path))
    except (OSError, ValueError) as error:
        log.warning("%s is damaged (%s); it is made again.", path.name, error)
        with contextlib.suppress(OSError):
            path.unlink()
        return False
    return True


def prepared_files(folder: Path) -> list[Path]:
    """The prepared weights in a folder, unfinished ones included."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix == SUFFIX or p.suffix == ".part")


def clear_prepared(folder: Path) -> int:
    """Remove all prepared weights; returns the bytes freed. Raises ModelFileError when in use."""
    freed = 0
    for path in prepared_files(folder):
        size = path.stat().st_size
        try:
            path.unlink()
        except OSError as error:  # Windows does not remove a file that is mapped
            raise ModelFileError(
                say(
                    "{file} cannot be removed: {reason}. Close ComfyUI and try again.",
                    file=path.name,
                    reason=error.strerror,
                )
            ) from error
        freed += size
    return freed


def _fill(
    weights: "OffloadedModule", file: BinaryIO, convert: Convert, progress: Progress | None
) -> None:
    sizes = [block.nbytes for block in weights.all_blocks]
    length = HEADER_BYTES + sum(map(_page_end, sizes))
    if shutil.disk_usage(Path(file.name).parent).free < length + SPARE_BYTES:
        raise OSError("the disk is too full")
    file.truncate(length)
    mapped = mmap.mmap(file.fileno(), length)
    weights.live_in(_buffers(mapped, sizes))
    with _written_out_meanwhile(file):
        convert(_room_in(file, mapped))
    homes = [block.home for block in weights.all_blocks if block.home is not None]
    header = json.dumps(_header(homes)).encode() + b"\n"
    if len(header) > HEADER_BYTES:
        raise ValueError(f"{len(homes)} blocks are more than a header of prepared weights can hold")
    mapped[: len(header)] = header
    if progress is not None:
        progress(length, length, KEEPING)
    mapped.flush()
    del homes
    weights.forget()
    with contextlib.suppress(BufferError):  # somebody still looks at the weights
        mapped.close()  # Windows does not rename a file that is mapped


def _room_in(file: BinaryIO, mapped: mmap.mmap) -> MakeRoom:
    """A function that has the disk set room aside for a tensor in the mapped file.

    Without, a disk that fills up kills the process as it writes. Tensor by tensor, because a disk
    in memory (tmpfs) takes seconds for the whole file, in which nothing would be read.
    """
    import torch

    start = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()

    def make_room(rows: "Tensor") -> None:
        if rows.nbytes:
            os.posix_fallocate(file.fileno(), rows.data_ptr() - start, rows.nbytes)

    if not hasattr(os, "posix_fallocate"):  # where the length that a file was given is its own
        return lambda _: None
    os.posix_fallocate(file.fileno(), 0, HEADER_BYTES)
    return make_room


@contextmanager
def _written_out_meanwhile(file: BinaryIO) -> Iterator[None]:
    """What is in the file's pages goes to the disk from time to time, so that the last sync, in
    which nothing can be done besides, is short. Raises OSError when the disk does."""
    over = threading.Event()

    def write_out() -> None:
        while not over.wait(WRITE_OUT_SECONDS):
            os.fdatasync(file.fileno())

    if not hasattr(os, "fdatasync"):
        yield
        return
    with ThreadPoolExecutor(1, "majicflux-write-out") as pool:
        writing = pool.submit(write_out)
        try:
            yield
        finally:
            over.set()
    writing.result()  # an error is told once, here and not to the last sync


def _map(weights: "OffloadedModule", path: Path) -> list["Tensor"]:
    sizes = [block.nbytes for block in weights.all_blocks]
    with path.open("rb") as file:
        line = file.readline(HEADER_BYTES)
        if path.stat().st_size != HEADER_BYTES + sum(map(_page_end, sizes)):
            raise ValueError("its size is wrong")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    buffers = _buffers(mapped, sizes)
    if json.loads(line) != _header(buffers):
        raise ValueError("its contents have changed")
    return buffers


def _buffers(mapped: mmap.mmap, sizes: list[int]) -> list["Tensor"]:
    import torch

    buffers, start = [], HEADER_BYTES
    for size in sizes:
        if not size:
            buffers.append(torch.empty(0, dtype=torch.uint8))
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            buffers.append(torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=start))
        start += _page_end(size)
    return buffers


def _header(buffers: list["Tensor"]) -> dict[str, Any]:
    sums = [zlib.crc32(b"".join(_samples(buffer))) for buffer in buffers]
    return {"majicflux": FORMAT, "blocks": [len(b) for b in buffers], "crc32": sums}


def _samples(buffer: "Tensor") -> Iterator[bytes]:
    """Pages spread over the buffer, its first and last among them."""
    last = max(0, len(buffer) - PAGE)
    for index in range(SAMPLES):
        start = last * index // (SAMPLES - 1)
        yield buffer[start : start + PAGE].numpy().tobytes()


def _page_end(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _remove_abandoned(folder: Path) -> None:
    """Unfinished files of processes that were killed."""
    for path in prepared_files(folder):
        if path.suffix == ".part":
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()
