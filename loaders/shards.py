"""Models that are stored in several files, NAME-00001-of-00002.safetensors and so on."""

import re
from itertools import filterfalse
from pathlib import Path

from .safetensors_file import ModelFileError, SafetensorsFile

MAX_SHARDS = 1000
SHARD = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<total>\d{5})\.safetensors$")


def hidden(name: str) -> bool:
    """Whether a file in a models folder was put there by the system: macOS's `._` files, trash."""
    return any(part.startswith(".") for part in Path(name).parts)


def files_at(path: Path) -> tuple[list[SafetensorsFile], list[str]]:
    """The files of the model there, as of `model_parts`, and the names of all their tensors."""
    files = [SafetensorsFile(part) for part in model_parts(path)]
    return files, [name for file in files for name in file.tensors]


def model_parts(path: Path) -> list[Path]:
    """The files of the model at `path`: one file, one of several shards, or the folder of them.

    Raises ModelFileError when a shard is missing, when a folder holds none, or too many to be one
    model.
    """
    if not path.is_dir() and not SHARD.match(path.name):
        return [path]
    folder = path if path.is_dir() else path.parent
    names = sorted(p.name for p in folder.iterdir()) if path.is_dir() else [path.name]
    first = next(filter(None, map(SHARD.match, filterfalse(hidden, names))), None)
    if first is None:
        raise ModelFileError(
            "The folder {folder} holds no model parts named NAME-00001-of-00002.safetensors.",
            folder=folder.name,
        )
    total = int(first["total"])
    if not 0 < total <= MAX_SHARDS:
        raise ModelFileError(
            "{file} is one of {total:,} parts; no model has as many. Choose another file.",
            file=first[0],
            total=total,
        )
    parts = [
        folder / f"{first['stem']}-{index:05d}-of-{total:05d}.safetensors"
        for index in range(1, total + 1)
    ]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ModelFileError(
            "The folder {folder} lacks {missing}. Download it into that folder.",
            folder=folder.name,
            missing=", ".join(missing[:3]) + (" ..." if missing[3:] else ""),
        )
    return parts
