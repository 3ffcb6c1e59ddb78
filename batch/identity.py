"""What a picture comes from besides its graph: the pack, its libraries, and the files of models."""

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from ..host.graph import Graph, fingerprint
from .jobs import NodeClasses

ROOMS = ("batch", "engine", "host", "loaders", "nodes")  # of the pack, that pixels come from
LIBRARIES = ("diffsynth", "tokenizers", "torch", "transformers")
SAMPLES = 64  # of a file, spread over it, its beginning and its end among them
SAMPLE_BYTES = 2**16

Identity = dict[str, str]  # by the names that users know


def of_software() -> Identity:
    """The versions of the pack, by its sources, and of the libraries that compute."""
    root = Path(__file__).parents[1]
    digest = sha256()
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        digest.update(path.read_bytes())
    versions = {name: metadata.version(name) for name in LIBRARIES}
    return {"majicflux": digest.hexdigest()[:12], **versions}


def of_models(graph: Graph, classes: NodeClasses) -> Identity:
    """Of each model file that the graph names. Raises MajicFluxError when one is not there.

    It is told by its length and by samples: to read all of it would take minutes.
    """
    found: Identity = {}
    for path, *state in _files([fingerprint(node, classes) for node in graph.values()]):
        name = Path(path).name  # which files in two folders may have
        found[name] = found.get(name, "") + _sampled(path, *state)
    return found


def differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The names of what is another, or not there."""
    return sorted(name for name in wanted if wanted[name] != found.get(name))


def _files(state: Any) -> Iterator[tuple[str, int, int]]:
    """Path, bytes and time of each file in what nodes give as their fingerprints."""
    if not isinstance(state, (list, tuple)):
        return
    if len(state) == 3 and isinstance(state[0], str):
        if os.path.isabs(state[0]):
            yield tuple(state)
        return
    for part in state:
        yield from _files(part)


@lru_cache(maxsize=256)
def _sampled(path: str, length: int, time: int) -> str:
    """time: of the file, which another has not."""
    digest = sha256(str(length).encode())
    last = max(0, length - SAMPLE_BYTES)
    with open(path, "rb") as file:
        for number in range(SAMPLES):
            file.seek(last * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:24]
