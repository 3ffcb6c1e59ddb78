"""DiffSynth's files for Flux, without what `import diffsynth` brings along.

DiffSynth's own `__init__` imports ModelScope, PyTorch's compiler and much of Transformers, which
takes seconds. This module is a package in DiffSynth's folder: the files run under names of ours,
and `diffsynth` itself stays as it is for others in the process.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..messages import say

_found = find_spec("diffsynth")  # runs nothing of it
__path__ = list((_found and _found.submodule_search_locations) or [])


def diffsynth_module(name: str) -> Any:
    """DiffSynth's module of that name, such as `models.flux_dit`.

    Raises ModuleNotFoundError where DiffSynth is not installed.
    """
    if not __path__:
        raise ModuleNotFoundError(
            say(
                "DiffSynth-Studio is not installed. Run `pip install -r requirements.txt` in the "
                "folder of MajicFlux, with the Python that runs it."
            )
        )
    return import_module(f"{__name__}.{name}")
