"""Weights that are published as a pickle alone become safetensors, at the user's command."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..loaders.safetensors_file import ModelFileError
from ..messages import say

PICKLED, CONVERTED = "pytorch_model.bin", "model.safetensors"


def convert_pickled(folder: Path) -> Iterator[Path]:
    """Write model.safetensors beside each pytorch_model.bin below `folder` that has none.

    No code of a pickle is run, and no file is there before it is whole. Raises ModelFileError for
    one that is damaged, or holds anything but tensors.
    """
    for path in sorted(folder.rglob(PICKLED)):
        if not any(path.parent.glob("*.safetensors")):
            yield _converted(path)


def _converted(path: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        once = _each_once(tensors)
    except Exception as error:  # anything: a pickle can be damaged in any way
        raise ModelFileError(
            say(
                "{file} is damaged, or holds more than tensors, and was not converted. Remove it "
                "and run the same command again.",
                file=path,
            )
        ) from error
    target = path.with_name(CONVERTED)
    partial = target.with_suffix(".part")
    try:
        save_file(once, partial, metadata={"format": "pt"})
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ModelFileError(
            say("{file} cannot be written: {reason}.", file=target, reason=error)
        ) from error
    return target


def _each_once(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors by name; of names for the same memory the last, which is the shared one's own.

    The class of the model ties the others to it again.
    """
    places = {(t.data_ptr(), t.shape, t.stride()): name for name, t in sorted(tensors.items())}
    return {name: tensors[name].clone().contiguous() for name in places.values()}
