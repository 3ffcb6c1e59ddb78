"""The cache of converted weights, which users know as prepared weights: files that are mapped.

One is a header line of JSON, zeros up to HEADER_BYTES, then the buffer of each block, every
one beginning on a page. It is filled under another name, synced and renamed, so a file under its
own name is always whole, and nothing of ours ever writes to it. Mapped weights are file-backed: the
system may drop their pages and read them again, instead of swapping. What it cannot read again,
because another program has made the file shorter, ends the process, as with any mapped model: Linux
has no lock against that, and Windows does not let it happen.
"""

import contextlib
import hashlib
import json
import mmap
import os
import re
import secrets
import shutil
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..engine.torch_state import torch
from ..messages import later, log
from .convert import LARGEST, MakeRoom, Progress
from .safetensors_file import ModelFileError, SafetensorsFile

try:
    import fcntl
except ImportError:  # Windows, which does not remove a file that is open
    fcntl = None

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.offload.offloaded_module import OffloadedModule


SUFFIX = ".majicflux"
OURS = re.compile(r".+\.majicflux(\.\w+\.part)?")
FORMAT = 4  # raise it when the layout of a block or the conversion changes
PAGE = 4096
HEADER_BYTES = 16 * PAGE
NAME_BYTES = 64  # of the sources' names: with what follows it, less than any file system allows
SAMPLES = 16  # pages of each block whose checksum is kept: damage is found without reading it all
SPARE_BYTES = 2**30  # of disk, to be left to the user
ABANDONED_SECONDS = 3600  # after which an unfinished file belongs to nobody, if locks do not tell
WRITE_OUT_SECONDS = 1.0
KEEPING = later("keeping {total:.1f} GB on disk")
LOCK = "majicflux.lock"  # in the folder of the cache; it stays there, empty, until all is cleared
WAIT_SECONDS = 0.2
WAITING = later("waiting for another process that prepares weights")

# Fills the weights, asking for room for what it writes if there is somebody to ask.
Convert = Callable[[MakeRoom | None], None]
Baked = Sequence[tuple[SafetensorsFile, float]]  # LoRAs in the weights, with their strengths


def cache_path(
    folder: Path,
    files: list[SafetensorsFile],
    weights: "OffloadedModule",
    precision: str,
    baked: Baked = (),
) -> Path:
    """Where the weights made of `files` in `precision` are kept.

    The name tells the model and what is baked into it, and holds the identity of the source: each
    file's size, time and header, the strengths, the precision and the layout of the blocks. A
    changed source therefore has another name.
    """
    identity: list[Any] = [FORMAT, precision, [b.nbytes for b in weights.all_blocks]]
    identity += [file.identity for file in files]
    identity += [[file.identity, strength] for file, strength in baked]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    names = [(files[0].path.stem, ""), *((f.path.stem, f"@{s:g}") for f, s in baked)]
    room = (NAME_BYTES + 1) // len(names) - 1  # beside a plus between two
    name = "+".join(_cut(stem, room - len(end)) + end for stem, end in names)
    return folder / f"{_cut(name, NAME_BYTES)}-{key}{SUFFIX}"


def map_or_convert(
    folder: Path | None,
    files: list[SafetensorsFile],
    weights: "OffloadedModule",
    precision: str,
    convert: Convert,
    progress: Progress | None = None,
    baked: Baked = (),
) -> bool:
    """Map the weights from where they are kept, after `convert` has filled them if they are not.

    False where they are not to be kept (no folder) or cannot be; it fills memory of theirs then.
    """
    if folder is not None:
        path = cache_path(folder, files, weights, precision, baked)
        if map_cached(weights, path):
            return True
        with _alone_in(folder, progress):
            if map_cached(weights, path) or convert_into_cache(weights, path, convert, progress):
                return True
    weights.allocate()
    convert(None)
    return False


def convert_into_cache(
    weights: "OffloadedModule", path: Path, convert: Convert, progress: Progress | None = None
) -> bool:
    """Let `convert` fill the weights in a file, which becomes `path`, and map it from there.

    The weights are in the file's pages from the beginning, never in anonymous memory. False, with
    one warning, when that cannot be done; what `convert` raises passes through. Nothing is left in
    both cases, and the weights then have no memory.
    """
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        with _new_partial(path) as file:
            partial = Path(file.name)
            _fill(weights, file, convert, progress)
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows does not rename a file that is open either
            partial.replace(path)
    except BaseException as error:
        weights.forget()
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink()
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or error
        log.warning("Prepared weights were not kept in %s: %s.", path.parent, reason)
        return False
    return map_cached(weights, path)


def map_cached(weights: "OffloadedModule", path: Path) -> bool:
    """Let the weights live in the file, if it is there and whole; a damaged one is removed."""
    if not path.is_file():
        return False
    try:
        weights.live_in(_map(weights, path))
        _require_scales(weights)
    except (OSError, ValueError) as error:
        weights.forget()
        log.warning("%s is damaged (%s); it is made again.", path.name, error)
        with contextlib.suppress(OSError):
            path.unlink()
        return False
    return True


def cached_files(folder: Path) -> list[Path]:
    """The files of the cache in a folder, unfinished ones included; it may hold others too."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if OURS.fullmatch(p.name) and p.is_file())


def clear_cache(folder: Path) -> int:
    """Remove all cached weights but those that are just being made; returns the bytes freed.

    Raises ModelFileError when some are in use, once the others are gone.
    """
    freed, failed = 0, None
    for path in cached_files(folder):
        try:
            size = path.stat().st_size
            if _removed(path):
                freed += size
        except FileNotFoundError:  # somebody else removed it
            continue
        except OSError as error:  # Windows does not remove a file that is mapped
            failed = failed or (path, error)
    if failed is not None:
        path, error = failed
        raise ModelFileError(
            "{file} cannot be removed: {reason}. Close ComfyUI and try again.",
            file=path.name,
            reason=error,
        ) from error
    if not cached_files(folder):
        with contextlib.suppress(OSError):  # Windows does not remove one that is held
            (folder / LOCK).unlink()
    return freed


@contextmanager
def _alone_in(folder: Path, progress: Progress | None) -> Iterator[None]:
    """No other process prepares weights in the folder: it would make what this one makes, or read
    the same disk. Where nothing can be locked, others may.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=WAIT_SECONDS)
                break
            if progress is not None:
                progress(0, 1, WAITING)
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        lock.release()


def _cut(name: str, size: int) -> str:
    """As much of the name as so many bytes hold."""
    return os.fsencode(name)[: max(0, size)].decode("utf-8", "ignore")


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
    homes = [block.host_buffer for block in weights.all_blocks if block.host_buffer is not None]
    header = _header(homes)
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
        if os.fstat(file.fileno()).st_size != HEADER_BYTES + sum(map(_page_end, sizes)):
            raise ValueError("its size is wrong")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    buffers = _buffers(mapped, sizes)
    if line != _header(buffers):
        raise ValueError("its contents have changed")
    return buffers


def _require_scales(weights: "OffloadedModule") -> None:
    """Raise ValueError for a scale that is none: one of them spoils every picture."""
    for name, parameter in weights.module.named_parameters():
        if name.endswith(".scale") and not (parameter.abs() <= LARGEST).all():
            raise ValueError("a scale is not finite")


def _buffers(mapped: mmap.mmap, sizes: list[int]) -> list["Tensor"]:
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


def _header(buffers: list["Tensor"]) -> bytes:
    sums = [zlib.crc32(b"".join(_samples(buffer))) for buffer in buffers]
    header = {"majicflux": FORMAT, "blocks": [len(b) for b in buffers], "crc32": sums}
    return json.dumps(header).encode() + b"\n"


def _samples(buffer: "Tensor") -> Iterator[bytes]:
    """Pages spread over the buffer, its first and last among them."""
    last = max(0, len(buffer) - PAGE)
    for index in range(SAMPLES):
        start = last * index // (SAMPLES - 1)
        yield buffer[start : start + PAGE].numpy().tobytes()


def _page_end(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _new_partial(path: Path) -> BinaryIO:
    """A new file beside `path`, which is locked for as long as its maker lives.

    Never one that is there: another process, of another container perhaps, may have it mapped, or
    it may be a link to somewhere else.
    """
    while True:
        file = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part").open("x+b")
        if _locked(file) is not False and os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # it was taken for abandoned before it was locked


def _locked(file: BinaryIO) -> bool | None:
    """Whether the file could be locked for as long as it is open; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the disk of another machine
        return None
    return True


def _removed(path: Path) -> bool:
    """Remove the file, but not an unfinished one whose maker lives. Raises OSError."""
    if path.suffix != SUFFIX and fcntl is not None:  # Windows does not remove what is open
        with path.open("r+b") as file:
            locked = _locked(file)
            age = time.time() - os.fstat(file.fileno()).st_mtime
            if locked or (locked is None and age > ABANDONED_SECONDS):
                path.unlink()
                return True
            return False
    path.unlink()
    return True


def _remove_abandoned(folder: Path) -> None:
    for path in cached_files(folder):
        if path.suffix != SUFFIX:
            with contextlib.suppress(OSError):
                _removed(path)
