"""The manifest of a batch: whole lines, one writer, and what its records still stand for."""

import errno
import os
import sys
from pathlib import Path

import pytest

from majicflux.batch import BatchError
from majicflux.batch.manifest import NAME, Manifest


def test_half_a_line_is_cut_off_and_the_last_line_of_a_key_counts(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    for problem in ("no", None):
        manifest.add({"key": "a", "pictures": {"a.png": ""}, "error": problem})
    manifest.close()
    with (tmp_path / NAME).open("ab") as file:
        file.write(b"\0\0\n" + b'{"key": "b", "pict')
    manifest = Manifest(tmp_path)
    manifest.add({"key": "c", "pictures": {}, "error": None})
    manifest.close()
    manifest = Manifest(tmp_path)
    assert manifest.record("b") is None
    assert manifest.record("c") is not None
    assert manifest.record("a") is None, "its picture is gone"
    (tmp_path / "a.png").touch()
    assert manifest.record("a")["error"] is None
    with pytest.raises(BatchError, match="Another batch is painting into"):
        Manifest(tmp_path)
    manifest.close()


def test_a_picture_that_another_row_painted_over_is_gone(tmp_path: Path) -> None:
    """A row that was changed and then set back; on some disks A.png is a.png."""
    manifest = Manifest(tmp_path)
    (tmp_path / "a.png").touch()
    manifest.add({"key": "before", "pictures": {"a.png": "1"}, "error": None})
    manifest.add({"key": "failed", "pictures": {}, "error": "no"})
    assert manifest.record("before") is not None
    manifest.add({"key": "after", "pictures": {"A.png": "2"}, "error": None})
    manifest.close()
    manifest = Manifest(tmp_path)
    assert manifest.record("before") is None
    manifest.add({"key": "before", "pictures": {"a.png": "1"}, "error": None})
    assert manifest.record("before") is not None
    assert manifest.record("after") is None
    manifest.close()


@pytest.mark.skipif(sys.platform == "win32", reason="which has it")
def test_windows_holds_a_manifest_by_a_byte_that_nobody_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    class Msvcrt:
        LK_NBLCK = 2

        def locking(self, file: int, mode: int, count: int) -> None:
            assert os.lseek(file, 0, os.SEEK_CUR) > 2**29
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise PermissionError(errno.EACCES, "Permission denied") from error

    monkeypatch.setitem(sys.modules, "msvcrt", Msvcrt())
    monkeypatch.setattr(sys, "platform", "win32")
    first = Manifest(tmp_path)
    first.add({"key": "a", "pictures": {}, "error": None})
    with pytest.raises(BatchError, match="Another batch is painting into"):
        Manifest(tmp_path)
    first.close()
    second = Manifest(tmp_path)
    assert second.record("a") is not None
    second.close()


def test_where_nothing_can_be_written_a_batch_does_not_begin(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BatchError, match=r"manifest\.jsonl cannot be written: "):
        Manifest(tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / NAME).symlink_to("/dev/full")
    manifest = Manifest.__new__(Manifest)
    manifest.path, manifest._records, manifest._painter = tmp_path / "full" / NAME, {}, {}
    manifest._file = manifest.path.open("wb", buffering=0)
    with pytest.raises(BatchError, match="cannot be written: No space left on device"):
        manifest.add({"key": "a", "pictures": {}, "error": None})
