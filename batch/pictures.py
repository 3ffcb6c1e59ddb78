"""The files of pictures: how they are named, and that they are whole."""

import errno
import os
from hashlib import sha256
from pathlib import Path

FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no other row would fare better


def picture_name(id: str, number: int) -> str:
    """Of the pictures of a job, the first of which is number 0."""
    return f"{id}.{number + 1}.png" if number else f"{id}.png"


def latents_name(id: str) -> str:
    """Of the file with the latents of a job after each pass of the transformer."""
    return f"{id}.latents.safetensors"


def finish(path: Path, target: Path) -> str:
    """Give a whole file its name; returns its SHA-256. Raises OSError."""
    with path.open("r+b") as file:
        digest = sha256(file.read()).hexdigest()
        os.fsync(file.fileno())
    os.replace(path, target)
    return digest
