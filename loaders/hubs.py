"""ModelScope and Hugging Face. Nothing else in the pack opens a connection."""

import errno
import textwrap
from collections.abc import Iterator
from pathlib import Path

from ..messages import say
from .catalogue import HUB_NAMES, HUGGINGFACE, MODELSCOPE, Place

FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}


class DownloadError(ValueError):
    """A model file could not be downloaded. The message is for the user."""


def fetch(place: Place, folder: Path) -> Path:
    """Fetch a file into `folder`, going on from what an earlier call has left there.

    Returns where in `folder` it is, whole as far as the hub's own client can tell. Raises
    DownloadError, and leaves what has come so far.
    """
    client = {MODELSCOPE: _from_modelscope, HUGGINGFACE: _from_huggingface}[place.hub]
    while True:
        before = bytes_in(folder)
        try:
            return client(place, folder)
        except DownloadError:
            raise
        except Exception as error:  # the clients' errors have no common class, nor a stable one
            # ModelScope's client gives a file one hour. Whoever has a slow line needs several, so
            # an attempt that brought something is followed by another.
            if bytes_in(folder) <= before:
                raise DownloadError(_sentence(place, folder, error)) from error


def bytes_in(folder: Path) -> int:
    """Bytes of all files under `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


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
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

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


def _sentence(place: Place, folder: Path, error: Exception) -> str:
    values = {
        "hub": HUB_NAMES[place.hub],
        "other": next(key for key in HUB_NAMES if key != place.hub),
        "file": place.path,
        "repository": place.repository,
        "folder": folder,
    }
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
