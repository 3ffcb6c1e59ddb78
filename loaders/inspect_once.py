"""What the headers of a model have told, for as long as its files stay the same."""

from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import TypeVar

from .safetensors_file import Identity, changed, identity_at
from .shards import model_parts

MODELS = 4  # of each kind that are remembered; one takes a megabyte or two

Result = TypeVar("Result")


def inspect_once(inspect: Callable[[Path], Result]) -> Callable[[Path], Result]:
    """`inspect` with a memory. The results are shared, so nobody may change them.

    Before a run each header is asked for by the validation, then by the load. Errors are not
    remembered.
    """

    @lru_cache(MODELS)
    def inspected(path: Path, identities: tuple[Identity, ...]) -> Result:
        result = inspect(path)
        if _identities(path) != identities:
            raise changed(path)
        return result

    return wraps(inspect)(lambda path: inspected(path, _identities(path)))


def _identities(path: Path) -> tuple[Identity, ...]:
    return tuple(map(identity_at, model_parts(path)))
