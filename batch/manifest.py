"""What a batch has painted: a line of JSON for each row, written by one process only."""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..messages import say
from .rows import BatchError

NAME = "manifest.jsonl"
BEYOND = 2**30  # where the byte is that Windows locks, which nobody could read

Record = dict[str, Any]


class Manifest:
    """The manifest of a folder, held by this process until it is closed.

    A row that was tried in several runs has several lines, of which the last counts.
    """

    def __init__(self, folder: Path):
        """Raises BatchError when another process holds it or it cannot be written."""
        self.folder = folder
        self.path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error
        self._hold()
        self._records: dict[str, Record] = {}
        self._painter: dict[str, str] = {}  # key of the job that painted a file last, by its name
        for record in self._read():
            self._know(record)

    def close(self) -> None:
        self._file.close()

    def record(self, key: str) -> Record | None:
        """Of the job with this key; None if it was never tried, or what it painted is gone, which
        it is as well where a job of another key painted a file of that name since."""
        record = self._records.get(key)
        there = record is not None and all(
            self._painter[name.casefold()] == key and (self.folder / name).is_file()
            for name in _files(record)
        )
        return record if there else None

    def add(self, record: Record) -> None:
        """Raises BatchError when the disk is full."""
        self._know(record)
        line = json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._unwritable(error) from error

    def _know(self, record: Record) -> None:
        self._records[record["key"]] = record
        self._painter |= {name.casefold(): record["key"] for name in _files(record)}

    def _hold(self) -> None:
        """Until the file is closed, or its process ends in whatever way."""
        try:
            if sys.platform == "win32":
                import msvcrt

                self._file.seek(BEYOND)
                msvcrt.locking(self._file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._file.close()
            raise BatchError(
                say("Another batch is painting into {folder}.", folder=self.folder)
            ) from error
        except OSError:  # the disk of another machine, which may have no locks
            pass

    def _read(self) -> list[Record]:
        self._file.seek(0)
        content = self._file.read()
        if content and not content.endswith(b"\n"):  # its writer was killed, or the disk was full
            self._file.truncate(content.rfind(b"\n") + 1)
        lines = content[: content.rfind(b"\n") + 1].splitlines()
        return [*filter(None, map(_parsed, lines))]

    def _unwritable(self, error: OSError) -> BatchError:
        reason = error.strerror or os.strerror(error.errno or 0)
        return BatchError(say("{file} cannot be written: {reason}.", file=self.path, reason=reason))


def _files(record: Record) -> tuple[str, ...]:
    return (*record["pictures"], *record.get("latents", ()))


def _parsed(line: bytes) -> Record | None:
    """None for a line that is no record, such as a machine leaves that lost its power."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    good = isinstance(record, dict) and {"key", "pictures", "error"} <= {*record}
    return record if good else None
