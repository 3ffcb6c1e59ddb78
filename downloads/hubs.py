"""ModelScope and Hugging Face. Nothing else in the pack opens a connection."""

import errno
import logging
import re
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path

from ..messages import MajicFluxError, say
from .catalogue import HUB_NAMES, HUGGINGFACE, MODELSCOPE, Place

log = logging.getLogger("majicflux")

FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
BUSY = (429, 503)  # that may come with how long to wait
WRITTEN_AT_ONCE = 2**14  # by Hugging Face's client; what is less is lost when the line breaks
THREAD = "majicflux-download"
LOOK_SECONDS = 0.2
TELL_SECONDS = 30  # without news, until it is said what is waited for
# Fewer bytes in that time, and the line is given up: 24 GB would take years.
LEAST_BYTES, PATIENCE_SECONDS = 2**16, 300


class DownloadError(MajicFluxError):
    """A model file could not be downloaded."""


def fetch(place: Place, folder: Path, least: int, most: int) -> Path:
    """Fetch a file into `folder`, going on from what an earlier call has left there.

    least, most: bytes that it can have. Returns where in `folder` it is, whole as far as the hub's
    own client can tell. Raises DownloadError, and leaves what has come so far.
    """
    result: Future[Path] = Future()

    def work() -> None:
        try:
            result.set_result(_attempts(place, folder))
        except BaseException as error:
            result.set_exception(error)

    for path, size in _files_in(folder):
        if size > most:
            path.unlink()  # of another version of the file
    # The clients wait where nothing can wake them, so it is watched from outside what they do.
    # Whoever gives up on them ends the program, which does not wait for such a thread.
    threading.Thread(target=work, name=THREAD, daemon=True).start()
    got, since, told_at = bytes_in(folder), time.monotonic(), time.monotonic()
    while not wait([result], LOOK_SECONDS).done:
        now = time.monotonic()
        if any(size > most for _, size in _files_in(folder)):
            raise DownloadError(
                say(
                    "{hub} sends more of {file} than the {size:,} bytes that it should have. Try "
                    "--from {other}.",
                    size=most,
                    **_values(place, folder),
                )
            )
        if bytes_in(folder) - got >= LEAST_BYTES:
            got, since, told_at = bytes_in(folder), now, now
        elif bytes_in(folder) >= least > 0:
            continue  # a client puts parts together, or takes the hash, which may take long
        elif now - since >= PATIENCE_SECONDS:
            raise DownloadError(
                say(
                    "{hub} has sent next to nothing of {file} for {seconds} s. {got:,} bytes are "
                    "there; run the same command again, it goes on from them, or try --from "
                    "{other}.",
                    seconds=PATIENCE_SECONDS,
                    got=bytes_in(folder),
                    **_values(place, folder),
                )
            )
        elif now - told_at >= TELL_SECONDS:
            log.info(
                say(
                    "waiting for {hub}: next to nothing of {file} has come for {seconds:.0f} s",
                    seconds=now - since,
                    **_values(place, folder),
                )
            )
            told_at = now
    return result.result()


def _attempts(place: Place, folder: Path) -> Path:
    client = {MODELSCOPE: _from_modelscope, HUGGINGFACE: _from_huggingface}[place.hub]
    while True:
        before = bytes_in(folder)
        try:
            return client(place, folder)
        except DownloadError:
            raise
        except Exception as error:  # the clients' errors have no common class, nor a stable one
            seconds = _wished_pause(error)
            if seconds is not None and seconds < PATIENCE_SECONDS:
                log.info(
                    say(
                        "{hub} asks to wait {seconds} s before it sends {file}",
                        seconds=seconds,
                        **_values(place, folder),
                    )
                )
                time.sleep(seconds)
            # ModelScope's client gives a file one hour. Whoever has a slow line needs several, so
            # an attempt that brought something is followed by another.
            elif bytes_in(folder) <= before:
                raise DownloadError(_sentence(place, folder, error)) from error


def bytes_in(folder: Path) -> int:
    """Bytes of all files under `folder`."""
    return sum(size for _, size in _files_in(folder))


def _files_in(folder: Path) -> Iterator[tuple[Path, int]]:
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # it has just been renamed
            if path.is_file():
                yield path, path.stat().st_size


def _from_modelscope(place: Place, folder: Path) -> Path:
    from modelscope.hub.errors import FileIntegrityError
    from modelscope.hub.file_download import model_file_download

    try:
        path = model_file_download(
            place.repository,
            place.path,
            revision=place.revision,
            local_dir=str(folder),
            cache_dir=str(folder),  # for its lock, which would go to the home directory
        )
    except FileIntegrityError as error:
        raise DownloadError(
            say(
                "{file} did not arrive as ModelScope published it ({error}), and was removed. Run "
                "the same command again.",
                file=place.path,
                error=error,
            )
        ) from error
    return Path(path)


def _from_huggingface(place: Place, folder: Path) -> Path:
    # hf_hub_download would throw away on every failure what it has got; http_get can go on.
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    constants.DOWNLOAD_CHUNK_SIZE = min(constants.DOWNLOAD_CHUNK_SIZE, WRITTEN_AT_ONCE)
    url = hf_hub_url(place.repository, place.path, revision=place.revision)
    size = get_hf_file_metadata(url).size
    path = folder / Path(place.path).name
    partial = path.with_name(path.name + ".part")
    if partial.exists() and size is not None and partial.stat().st_size > size:
        partial.unlink()  # of another version of the file
    if not path.exists():
        with partial.open("ab") as file:
            http_get(
                url,
                file,
                resume_size=file.tell(),
                headers=build_hf_headers(),
                expected_size=size,
                displayed_filename=path.name,
            )
        partial.replace(path)
    return path


def _values(place: Place, folder: Path) -> dict[str, object]:
    return {
        "hub": HUB_NAMES[place.hub],
        "other": next(key for key in HUB_NAMES if key != place.hub),
        "file": place.path,
        "repository": place.repository,
        "folder": folder,
    }


def _sentence(place: Place, folder: Path, error: Exception) -> str:
    values = _values(place, folder)
    status, codes = _status(error), {getattr(e, "errno", None) for e in _chain(error)}
    if codes & FULL_DISK:
        return say(
            "No space is left in {folder} for {file}. Free some and run the same command again, "
            "it goes on where it stopped.",
            **values,
        )
    if codes & UNWRITABLE:
        return say(
            "{folder} cannot be written to. Change its permissions, or choose another --models.",
            **values,
        )
    if status == 404:
        return say(
            "{hub} has no {file} in {repository} (404). Try --from {other}, or look for it on the "
            "repository's page.",
            **values,
        )
    if status in (401, 403):
        return say(
            "{hub} does not give {file} of {repository} to everyone ({status}). Accept its licence "
            "on the repository's page and log in, or try --from {other}.",
            status=status,
            **values,
        )
    pause = _wished_pause(error)
    if pause is not None:
        return say(
            "{hub} asks to wait {seconds} s. Run the same command again then, or try --from "
            "{other}.",
            seconds=pause,
            **values,
        )
    if status == 429:
        return say(
            "{hub} takes no more requests from here for now (429). Run the same command again "
            "later, or try --from {other}.",
            **values,
        )
    reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
    got = bytes_in(folder)
    if not got:
        return say(
            "{hub} could not be reached for {file} ({reason}). Check the network and run the same "
            "command again, or try --from {other}.",
            reason=reason,
            **values,
        )
    return say(
        "{hub} broke off after {got:,} bytes of {file} ({reason}). Run the same command again, it "
        "goes on where it stopped.",
        got=got,
        reason=reason,
        **values,
    )


def _wished_pause(error: Exception) -> int | None:
    """Seconds after which the hub wants to be asked again, if it says so."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if getattr(response, "status_code", None) in BUSY:
            wished = str(getattr(response, "headers", {}).get("Retry-After", ""))
            return max(1, int(wished)) if re.fullmatch("[0-9]{1,9}", wished) else None
    return None


def _status(error: Exception) -> int | None:
    """The HTTP status that an error stands for, if it does."""
    for link in _chain(error):
        for holder in (link, getattr(link, "response", None)):
            status = getattr(holder, "status_code", None)
            if isinstance(status, int):
                return status
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:  # ModelScope's client can chain them in a ring
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__
