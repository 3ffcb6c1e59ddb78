"""A known model file into the models folder: fetched, checked, and only then under its name."""

import errno
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..loaders.safetensors_file import FORMAT_HEADER_BYTES, ModelFileError, SafetensorsFile
from ..messages import say
from .catalogue import HUB_NAMES, KnownFile
from .hubs import DownloadError, bytes_in, fetch

log = logging.getLogger("majicflux")

PARTIAL_FOLDER = ".majicflux-download"
HASH_CHUNK = 2**22
LFS_POINTER = b"version https://git-lfs"
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


def download(file: KnownFile, hub: str, models: Path) -> Path:
    """Fetch `file` from `hub` into its folder under `models`, and return its path.

    A file that is there already is checked and left alone. What a call that was stopped has left
    is gone on with. Raises DownloadError; there is never part of a file under the final name.
    """
    target = target_of(file, models)
    if target.exists():
        _check_existing(file, target)
        log.info("%s is there already", target)
        return target
    place = file.place(hub)
    if place is None:
        raise DownloadError(
            say(
                "{hub} does not have {file}; choose the other source.",
                hub=HUB_NAMES[hub],
                file=file.name,
            )
        )
    start = time.perf_counter()
    try:
        require_space([file], hub, models)
        partial = _partial_folder(file, hub, models)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(partial):
            most = file.size or file.least_size + FORMAT_HEADER_BYTES
            fetched = fetch(place, partial, file.size or file.least_size, most)
            try:
                _check(file, fetched)
            except (DownloadError, ModelFileError) as error:
                shutil.rmtree(partial)
                raise DownloadError(
                    say(
                        "{file} from {hub} is not the file that was expected: {error} It was "
                        "removed; run the same command again, or take the other source.",
                        file=file.name,
                        hub=HUB_NAMES[hub],
                        error=error,
                    )
                ) from error
            if target.exists():  # put there in the meantime, which may be hours
                raise DownloadError(
                    say(
                        "{target} came from elsewhere during the download and was not replaced. "
                        "Move it away and run the same command again, or keep it.",
                        target=target,
                    )
                )
            os.replace(fetched, target)
            shutil.rmtree(partial)
    except OSError as error:
        raise DownloadError(
            say(
                "{file} cannot be written into {folder}: {reason}. Mend that and run the same "
                "command again, it goes on where it stopped.",
                file=file.name,
                folder=target.parent,
                reason=error,
            )
        ) from error
    log.info(
        "%s: %.2f GB from %s, %.1f s",
        target,
        target.stat().st_size / 1e9,
        HUB_NAMES[hub],
        time.perf_counter() - start,
    )
    return target


def target_of(file: KnownFile, models: Path) -> Path:
    """The path of `file` under the models folder, where ComfyUI looks for it."""
    return models / file.folder / file.name


def require_space(files: Iterable[KnownFile], hub: str, models: Path) -> None:
    """Raise DownloadError unless what is still missing of `files` fits on their disks.

    Counted in bytes, disk by disk; a file of unknown size counts with the size of its tensors.
    """
    missing: dict[int, int] = {}
    disks: dict[int, Path] = {}
    for file in files:
        target = target_of(file, models)
        if target.exists():
            continue
        nearest = _nearest_existing(target.parent)
        disk = nearest.stat().st_dev
        disks[disk] = nearest
        left = (file.size or file.least_size) - bytes_in(_partial_folder(file, hub, models))
        missing[disk] = missing.get(disk, 0) + max(left, 0)
    for disk, needed in missing.items():
        free = shutil.disk_usage(disks[disk]).free
        if needed > free:
            raise DownloadError(
                say(
                    "{needed:.1f} GB are still to come and {free:.1f} GB are free in {folder}. "
                    "Free some space, or choose another folder with --models.",
                    needed=needed / 1e9,
                    free=free / 1e9,
                    folder=disks[disk],
                )
            )


def _partial_folder(file: KnownFile, hub: str, models: Path) -> Path:
    """Where a download is until it is whole: on the disk of its target, and not in ComfyUI's list.

    Only where a model folder is a disk of its own must it be inside that folder.
    """
    target = target_of(file, models).parent
    disks = {_nearest_existing(folder).stat().st_dev for folder in (target, models)}
    return (models if len(disks) == 1 else target) / PARTIAL_FOLDER / hub / file.name


@contextmanager
def _alone_in(partial: Path) -> Iterator[None]:
    """Make the folder and keep others out of it; leave it behind only if something is in it."""
    from filelock import FileLock, Timeout

    partial.mkdir(parents=True, exist_ok=True)
    path = partial.with_name(partial.name + ".lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DownloadError(
            say(
                "{file} is being downloaded by another command. Wait until it is done.",
                file=partial.name,
            )
        ) from error
    except (NotImplementedError, OSError) as error:  # as on disks of other machines
        if not isinstance(error, NotImplementedError) and error.errno not in NO_LOCKS:
            raise
        log.info("%s has no locks: %s", partial.parent, error)
    try:
        yield
    finally:
        if bytes_in(partial) == 0:
            shutil.rmtree(partial, ignore_errors=True)
        lock.release()
        path.unlink(missing_ok=True)  # on Linux the lock itself would leave it
        with suppress(OSError):  # another download has its files there
            partial.parent.rmdir()
            partial.parent.parent.rmdir()


def _nearest_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _check_existing(file: KnownFile, target: Path) -> None:
    try:
        _check(file, target, with_hash=False)  # reading 24 GB again each time would be too slow
    except (DownloadError, ModelFileError) as error:
        raise DownloadError(
            say(
                "{target} is there already, but is not the file that was expected: {error} Move it "
                "away and run the same command again, or keep it and leave this one out.",
                target=target,
                error=error,
            )
        ) from error


def _check(file: KnownFile, path: Path, with_hash: bool = True) -> None:
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        values = {"size": size, "expected": file.size}
        raise DownloadError(say("it has {size:,} bytes instead of {expected:,}.", **values))
    if size < file.least_size:
        values = {"size": size, "least": file.least_size}
        raise DownloadError(say("it has {size:,} bytes instead of at least {least:,}.", **values))
    if with_hash and file.sha256 is not None and _sha256(path) != file.sha256:
        raise DownloadError(say("its SHA-256 is another one."))
    if path.suffix == ".safetensors":
        SafetensorsFile(path)
    else:
        _check_begin(path)


def _check_begin(path: Path) -> None:
    """Raise DownloadError for a page, or a text, in place of a file of another format."""
    with path.open("rb") as file:
        begin = file.read(len(LFS_POINTER)).lstrip()
    if begin.startswith(b"<") or begin == LFS_POINTER:
        raise DownloadError(say("it is a web page or a pointer, not the file itself."))
    if path.suffix == ".json" and not begin.startswith(b"{"):
        raise DownloadError(say("it is no JSON object."))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
