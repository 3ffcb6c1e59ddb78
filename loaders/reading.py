"""Reads stretches of files in order, one thread ahead of the arithmetic, in bounded memory."""

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from ..messages import say
from .safetensors_file import ModelFileError

if TYPE_CHECKING:
    from torch import Tensor

BUFFER_BYTES = 16 * 2**20
BUFFERS = 3  # one being filled, one being used, one between them


@dataclass(frozen=True)
class Stretch:
    """Bytes [start, start + length) of a file; length is at most BUFFER_BYTES."""

    path: Path
    start: int
    length: int


def read_ahead(stretches: Sequence[Stretch]) -> Iterator["Tensor"]:
    """The bytes of each stretch as a uint8 tensor, which is valid until the next one is asked for.

    What has been read is dropped from the page cache, so that a model of 24 GB does not push the
    user's other programs out of memory. Raises ModelFileError when a file ends too early or
    cannot be read.
    """
    import torch

    free: queue.Queue[Tensor | None] = queue.Queue()
    filled: queue.Queue[Tensor | BaseException] = queue.Queue()
    for _ in range(BUFFERS):
        free.put(torch.empty(BUFFER_BYTES, dtype=torch.uint8))

    def read() -> None:
        try:
            _fill_buffers(stretches, free, filled)
        except BaseException as error:  # raised again by the consumer
            filled.put(error)

    reader = threading.Thread(target=read, name="majicflux-reader", daemon=True)
    reader.start()
    try:
        for stretch in stretches:
            buffer = filled.get()
            if isinstance(buffer, BaseException):
                raise buffer
            yield buffer[: stretch.length]
            free.put(buffer)
    finally:
        free.put(None)  # the consumer may have stopped early
        reader.join()


def _fill_buffers(
    stretches: Sequence[Stretch],
    free: "queue.Queue[Tensor | None]",
    filled: "queue.Queue[Tensor | BaseException]",
) -> None:
    file: FileIO | None = None
    path: Path | None = None
    try:
        for stretch in stretches:
            buffer = free.get()
            if buffer is None:
                return
            if stretch.path != path:
                if file is not None:
                    file.close()
                path = stretch.path
                file = FileIO(path)
            assert file is not None
            _read_exactly(file, stretch, memoryview(buffer.numpy().data)[: stretch.length])
            filled.put(buffer)
    except OSError as error:
        reason = error.strerror or error
        raise ModelFileError(
            say("{file} cannot be read: {reason}.", file=path, reason=reason)
        ) from error
    finally:
        if file is not None:
            file.close()


def _read_exactly(file: FileIO, stretch: Stretch, view: memoryview) -> None:
    file.seek(stretch.start)
    done = 0
    while done < stretch.length:
        count = file.readinto(view[done:])
        if not count:
            raise ModelFileError(
                say("{file} became shorter while it was read.", file=stretch.path.name)
            )
        done += count
    if hasattr(os, "posix_fadvise"):  # Linux
        os.posix_fadvise(file.fileno(), stretch.start, done, os.POSIX_FADV_DONTNEED)
