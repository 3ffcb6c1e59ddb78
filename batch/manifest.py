"""What a batch has painted: a line of JSON for each row, written by one process only."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from ..messages import say
from .rows import BatchError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "manifest.jsonl"

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
        self._records = self._read()

    def close(self) -> None:
        self._file.close()

    def record(self, key: str) -> Record | None:
        """Of the job with this key; None if it was never tried, or what it painted is gone."""
        record = self._records.get(key)
        if record is None:
            return None
        files = (*record["pictures"], *record.get("latents", ()))
        there = all((self.folder / name).is_file() for name in files)
        return record if there else None

    def add(self, record: Record) -> None:
        """Raises BatchError when the disk is full."""
        self._records[record["key"]] = record
        line = json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._unwritable(error) from error

    def _hold(self) -> None:
        """Until the file is closed, or its process ends in whatever way."""
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise BatchError(
                say("Another batch is painting into {folder}.", folder=self.folder)
            ) from error
        except OSError:  # the disk of another machine, which may have no locks
            pass

    def _read(self) -> dict[str, Record]:
        self._file.seek(0)
        content = self._file.read()
        if content and not content.endswith(b"\n"):  # its writer was killed, or the disk was full
            self._file.truncate(content.rfind(b"\n") + 1)
        lines = content[: content.rfind(b"\n") + 1].splitlines()
        return {record["key"]: record for record in filter(None, map(_parsed, lines))}

    def _unwritable(self, error: OSError) -> BatchError:
        reason = error.strerror or os.strerror(error.errno or 0)
        return BatchError(say("{file} cannot be written: {reason}.", file=self.path, reason=reason))


def _parsed(line: bytes) -> Record | None:
    """None for a line that is no record, such as a machine leaves that lost its power."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    good = isinstance(record, dict) and {"key", "pictures", "error"} <= {*record}
    return record if good else None
