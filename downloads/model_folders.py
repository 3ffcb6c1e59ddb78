"""Models in the host's folders: which there are, where one is, and why it cannot be used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..host import current as host
from ..loaders.safetensors_file import ModelFileError
from ..loaders.shards import SHARD, hidden, model_parts
from ..messages import command_line, say
from .catalogue import KNOWN_FILES, SISTERS, group_of

CHECKPOINTS = "checkpoints"
STAND_INS = {file.name: [other.name for other in files] for files in SISTERS for file in files}


def choices(category: str) -> list[str]:
    """The models of `category`; a folder of shards is one."""
    return sorted({_folder_of_shard(name) or name for name in names(category)})


def names(category: str) -> list[str]:
    return [name for name in host.model_names(category) if not hidden(name)]


def whole_folders(category: str) -> dict[str, Path]:
    """The models of `category` that are folders with a config.json, by name."""
    found: dict[str, Path] = {}
    for place in host.model_folders(category):
        for config in sorted([*place.glob("*/config.json"), *place.glob("*/*/config.json")]):
            name = str(config.parent.relative_to(place))
            if not hidden(name):
                found.setdefault(name, config.parent)
    return found


def resolve(category: str, name: str) -> Path:
    """The file, or the folder of shards, that a choice stands for.

    Of majicflus and Kontext each hub has another file: the one that is there stands in for the
    other.
    Raises ModelFileError when none is in the host's folders.
    """
    for other in (name, *STAND_INS.get(name, ())):
        path = host.model_path(category, other) or host.model_path(CHECKPOINTS, other)
        if path is not None:
            return path
    for shard in names(category):
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
    known = [file for file in KNOWN_FILES if file.name == name]
    pages = [place.page for file in known for place in file.places]
    folders = [str(path) for path in host.model_folders(category)]
    if pages and folders:
        command = download_command(category, group_of(known[0]))
        fetch = say("Or run {command} with ComfyUI's own Python.", command=command)
        pages = [say("It is published at:"), *pages, fetch]
    return [*pages, say("It was looked for in:"), *folders]


def download_command(category: str, group: str) -> str:
    """What fetches a group of files into the host's models folder."""
    models = host.model_folders(category)[0].parent
    return command_line(f'download {group} --models "{models}"')


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
    return state_of(resolve(category, name))


def state_of(path: Path) -> list[tuple[str, int, int]]:
    """Path, bytes and time of each part of a model."""
    parts = model_parts(path)
    return [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in parts]


def _folder_of_shard(name: str) -> str | None:
    path = Path(name)
    return str(path.parent) if SHARD.match(path.name) and len(path.parts) > 1 else None
