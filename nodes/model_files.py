"""What the loader nodes share: their combos over model files, and what they have loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from weakref import WeakValueDictionary

from ..downloads import model_folders
from ..host import current as host
from .sockets import Node

Handle = TypeVar("Handle")
_in_use: WeakValueDictionary[Any, Any] = WeakValueDictionary()


def options(category: str, *preferred: str) -> dict[str, Any]:
    """`options` and `default` of a combo over the models of `category`.

    Whole checkpoints, which hold a part of every kind, come last. The default is the first name
    with a preferred word in it.
    """
    names = model_folders.choices(category)
    names += [name for name in model_folders.names(model_folders.CHECKPOINTS) if name not in names]
    return combo(names, *preferred)


def combo(names: list[str], *preferred: str) -> dict[str, Any]:
    """The same over these names."""
    likely = [name for word in preferred for name in names if word in name.lower()]
    return {"options": names, "default": (likely or names or [None])[0]}


class FileNode(Node):
    """A node with the input `file`, a model of `folder`, from whose header `inspect` tells what is
    wrong with it."""

    folder: ClassVar[str]
    inspect: ClassVar[Callable[[Path], Any]]

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        return model_folders.problem(cls.folder, file, cls.inspect) or True

    @classmethod
    def fingerprint_inputs(cls, file: str, *others: Any, **named: Any) -> Any:
        return model_folders.fingerprint(cls.folder, file)


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
