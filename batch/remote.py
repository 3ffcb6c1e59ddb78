"""What a worker is on a machine of a cluster. Ray calls it, and nothing here knows Ray."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..host.graph import Graph
from ..host.image_nodes import image_nodes, picture_path
from ..messages import MajicFluxError
from .identity import Identity, differences, of_models, of_software
from .worker import Message, Painter, answer, card_name


class RemotePainter(Painter):
    """Paints with the models of its own machine; pictures come and go as bytes of files."""

    def __init__(self, setup: Message):
        self._place = TemporaryDirectory(prefix="majicflux-")
        folders = {name: Path(self._place.name, name) for name in ("input", "output", "parts")}
        for folder in folders.values():
            folder.mkdir()
        super().__init__(setup | folders)
        self._classes |= image_nodes(folders["output"], folders["input"], {})

    def begin(self) -> Message:
        """Returns its names, and what it paints with."""
        return {"machine": platform.node(), "card": card_name(), "software": of_software()}

    def answer(
        self,
        id: str,
        graph: Graph,
        coming: Sequence[Graph],
        models: Identity,
        pictures: Mapping[str, bytes],
    ) -> Message:
        """As `worker.answer`, or which models are here where they `differ` from the driver's.

        pictures: that the graph begins from, by the names that it has for them.
        """
        for name, content in pictures.items():
            _place(picture_path(self._input, self._output, name), content)
        try:
            found = of_models(graph, self._classes)
        except (MajicFluxError, OSError):  # some are not there
            found = {}
        if differences(models, found):
            return {"differ": found}
        return answer(self, id, graph, coming)

    def _finished(self, path: Path, name: str) -> Any:
        return path.read_bytes()


def _place(path: Path, content: bytes) -> None:
    """Write it where it is not: what was made of a file is kept for as long as it stays."""
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
