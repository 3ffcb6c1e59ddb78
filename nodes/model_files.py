"""File choices of the loader nodes: what is offered, where it is, and why it cannot be used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from ..host import current as host
from ..loaders.catalogue import GROUPS
from ..loaders.safetensors_file import ModelFileError
from ..loaders.shards import SHARD, hidden, model_parts
from ..messages import say

CHECKPOINTS = "checkpoints"
MAJICFLUS = [file.name for file in GROUPS["majicflus"]]

Handle = TypeVar("Handle")
_in_use: WeakValueDictionary[Any, Any] = WeakValueDictionary()


def options(category: str, *preferred: str) -> dict[str, Any]:
    """`options` and `default` of a combo over the models of `category`.

    Whole checkpoints, which hold a part of every kind, come last. The default is the first name
    with a preferred word in it.
    """
    names = choices(category)
    names += [name for name in _names(CHECKPOINTS) if name not in names]
    likely = [name for word in preferred for name in names if word in name.lower()]
    return {"options": names, "default": (likely or names or [None])[0]}


def choices(category: str) -> list[str]:
    """The models of `category`; a folder of shards is one."""
    return sorted({_folder_of_shard(name) or name for name in _names(category)})


def _names(category: str) -> list[str]:
    return [name for name in host.model_names(category) if not hidden(name)]


def resolve(category: str, name: str) -> Path:
    """The file, or the folder of shards, that a choice stands for.

    Of majicflus each hub has another file: the one that is there stands in for the other.
    Raises ModelFileError when none is in the host's folders.
    """
    for other in (name, *(MAJICFLUS if name in MAJICFLUS else ())):
        path = host.model_path(category, other) or host.model_path(CHECKPOINTS, other)
        if path is not None:
            return path
    for shard in _names(category):
        if _folder_of_shard(shard) == name:
            path = host.model_path(category, shard)
            if path is not None:
                return path.parent
    said = say(
        "{file} is not in models/{folder}. Put it there and press R, or choose another file.",
        file=name,
        folder=category,
    )
    raise ModelFileError("\n".join([said, *_long_form(category, name)]))


def _long_form(category: str, name: str) -> list[str]:
    """Where the file is published, and where it was looked for."""
    known = [file for file in GROUPS["all"] if file.name == name]
    pages = [place.page for file in known for place in file.places]
    folders = [str(path) for path in host.model_folders(category)]
    if pages and folders:
        models = Path(folders[0]).parent
        command = f'python -m majicflux.cli download all --models "{models}"'
        fetch = say("Or run {command} in ComfyUI's custom_nodes.", command=command)
        pages = [say("It is published at:"), *pages, fetch]
    return [*pages, say("It was looked for in:"), *folders]


def problem(category: str, name: Any, inspect: Callable[[Path], Any]) -> str | None:
    """Why the choice cannot be used, told from the header alone; None when it can.

    A name of None is one that will come over a link, and is looked for when it has come.
    """
    if name is None:
        return None
    try:
        inspect(resolve(category, str(name)))
    except ModelFileError as error:
        return str(error)
    return None


def fingerprint(category: str, name: str | None) -> list[tuple[str, int, int]] | None:
    """Changes when the file behind a choice is replaced: path, bytes and time of each part.

    None for a name that will come over a link.
    """
    if name is None:
        return None
    parts = model_parts(resolve(category, name))
    return [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in parts]


def shared(load: Callable[[], Handle], *identity: Any) -> Handle:
    """The handle that was loaded for this identity and is still in use, or a new one.

    ComfyUI keeps no outputs under --cache-none, and two loader nodes are two nodes: both would
    otherwise hold the same weights twice. Nothing is kept here beyond its last user. While the
    first one reads, the kernels that will compute with its weights are tried.
    """
    key = (load.__qualname__, repr(identity))
    handle = _in_use.get(key)
    if handle is None:
        from ..engine.kernels import dispatch

        dispatch.try_ahead(host.compute_device())
        handle = _in_use[key] = load()
    return handle


def _folder_of_shard(name: str) -> str | None:
    path = Path(name)
    return str(path.parent) if SHARD.match(path.name) and len(path.parts) > 1 else None
