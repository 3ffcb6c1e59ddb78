"""Reads spans of files, in several threads or one thread ahead of the arithmetic."""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from ..engine.torch_state import torch
from .safetensors_file import Identity, ModelFileError, changed, identity_of

BUFFER_BYTES = 16 * 2**20
BUFFERS = 3  # one being filled, one being used, one between them
# Bytes a second from which on reading at several places at once is no loss: more than SATA carries.
FAST = 0.6e9
JUDGED_BYTES = 2**20  # a span of fewer tells little of how fast they come


@dataclass(frozen=True)
class FileSpan:
    """Bytes [start, start + length) of a file; length is at most BUFFER_BYTES.

    identity: of the file that is meant, which is then told from another under its name.
    """

    path: Path
    start: int
    length: int
    identity: Identity | None = None


class Reader:
    """Reads spans for as many threads as ask, each file being opened once.

    While bytes come slowly, as from a disk that turns, one span is read after the other. What
    has been read is dropped from the page cache, so that a model of 24 GB does not push the user's
    other programs out of memory. A file that has been replaced or written to by the end raises
    ModelFileError there.
    """

    def __init__(self) -> None:
        self._files: dict[Path, tuple[FileIO, Identity | None]] = {}
        self._lock = threading.Lock()  # of what is in here
        self._alone = threading.Lock()  # of who reads from a slow disk
        self._slow = True
        self._readers = 0

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        try:
            for path in self._files if error is None else ():
                self._require_same(path)
        finally:
            for file, _identity in self._files.values():
                file.close()

    def read(self, span: FileSpan, buffer: "torch.Tensor") -> "torch.Tensor":
        """The bytes of the span, at the beginning of `buffer`.

        Raises ModelFileError when the file ends too early or cannot be read.
        """
        with self._alone if self._slow else nullcontext():
            with self._lock:
                self._readers += 1
                readers = self._readers
            start = time.perf_counter()
            try:
                self._read_exactly(span, memoryview(buffer.numpy().data)[: span.length])
            except OSError as error:
                raise ModelFileError(
                    "{file} cannot be read: {reason}.", file=span.path, reason=error
                ) from error
            finally:
                with self._lock:
                    self._readers -= 1
            if span.length >= JUDGED_BYTES:
                seconds = time.perf_counter() - start
                self._slow = readers * span.length < FAST * seconds
        return buffer[: span.length]

    def _read_exactly(self, span: FileSpan, view: memoryview) -> None:
        with self._lock:
            if span.path not in self._files:
                self._files[span.path] = FileIO(span.path), span.identity
                self._require_same(span.path)
            file = self._files[span.path][0]
        done = 0
        while done < span.length:
            count = self._read_at(file, span.start + done, view[done:])
            if not count:
                raise ModelFileError(
                    "{file} became shorter while it was read.", file=span.path.name
                )
            done += count
        if hasattr(os, "posix_fadvise"):  # Linux
            os.posix_fadvise(file.fileno(), span.start, done, os.POSIX_FADV_DONTNEED)

    def _require_same(self, path: Path) -> None:
        file, identity = self._files[path]
        if identity not in (None, identity_of(file)):
            raise changed(path)

    def _read_at(self, file: FileIO, start: int, view: memoryview) -> int | None:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [view], start)
        with self._lock:  # Windows: the place in the file is the file's, not the thread's
            file.seek(start)
            return file.readinto(view)


def read_ahead(spans: Sequence[FileSpan]) -> Iterator["torch.Tensor"]:
    """The bytes of each span as a uint8 tensor, which is valid until the next one is asked for.

    Raises ModelFileError when a file ends too early or cannot be read.
    """
    buffers = [torch.empty(BUFFER_BYTES, dtype=torch.uint8) for _ in range(BUFFERS)]
    jobs: deque[Future[torch.Tensor]] = deque()
    with Reader() as reader, ThreadPoolExecutor(1, "majicflux-reader") as pool:
        for index, span in enumerate(spans):
            jobs.append(pool.submit(reader.read, span, buffers[index % BUFFERS]))
            if len(jobs) == BUFFERS:
                yield jobs.popleft().result()
        while jobs:
            yield jobs.popleft().result()
