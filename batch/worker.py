"""A process that paints rows for the driver of a batch; lines of JSON on its stdin and stdout.

First comes what it is set up with, then one job at a time, and each is answered. It writes pictures
under temporary names first, and nothing else. When its stdin ends, so does the process, whatever it
is doing: the driver has stopped, or was killed.
"""

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import mkdtemp
from threading import Thread
from typing import TYPE_CHECKING, Any, BinaryIO

from ..engine.errors import OutOfVramError, TooLittleVramError
from ..host import provenance, standalone
from ..host.graph import Graph, Kept, run_graph
from ..host.image_nodes import image_nodes
from ..host.schema import ComfyNode
from ..messages import MajicFluxError, say
from ..nodes import NODES
from .coming import prompts_to_come
from .pictures import FATAL, finish, latents_name, picture_name

if TYPE_CHECKING:
    from torch import Tensor

CPU = "CPU"  # among the names of cards

Message = dict[str, Any]


class Painter:
    """Paints jobs, and keeps what the next one can use: models first of all."""

    def __init__(self, setup: Message):
        """setup: `models`, `input` and `output` folders, `parts` for unfinished pictures, by how
        many processes the machine is `shared`, and whether `latents` are kept of each step."""
        standalone.models_folder = Path(setup["models"])
        standalone.pinned_share /= setup["shared"]
        self._input, self._output = Path(setup["input"]), Path(setup["output"])
        self._parts = Path(setup["parts"])
        self._classes = {node.define_schema().node_id: node for node in NODES}
        self._kept: Kept = {}
        self._keeps_latents: bool = setup["latents"]

    def paint(self, id: str, graph: Graph, coming: Sequence[Graph] = ()) -> Message:
        """coming: graphs that will follow. Returns the pictures and the file of their latents by
        name, as `_finished` gives them, the seconds and the memory report."""
        told: dict[str, Any] = {}
        ComfyNode.hidden.extra_pnginfo = told
        began = time.monotonic()
        folder = Path(mkdtemp(dir=self._parts))
        steps: list[Tensor] = []
        if self._keeps_latents:
            standalone.on_latents = partial(_keep_step, steps)
        try:
            # Not the report: it has times in it, and pictures are to be the same in each run.
            nodes = image_nodes(folder, self._input, {"prompt": graph})
            standalone.prompts_to_come = prompts_to_come(graph, coming, self._classes)
            shown = run_graph(graph, self._classes | nodes, self._kept)
            paths = [path for paths in shown for path in paths]
            latents = {latents_name(id): self._keep(id, steps, folder)} if steps else {}
            pictures = {
                picture_name(id, number): self._finished(path, picture_name(id, number))
                for number, path in enumerate(paths)
            }
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        seconds = round(time.monotonic() - began, 3)
        report = told.get(provenance.KEY)
        return {"pictures": pictures, "latents": latents, "seconds": seconds, "report": report}

    def _keep(self, id: str, steps: "Sequence[Tensor]", folder: Path) -> Any:
        """Write the latents of a run, by the numbers of its passes, and finish that file."""
        from safetensors.torch import save

        path = folder / latents_name(id)
        path.write_bytes(save({f"{number:03d}": step for number, step in enumerate(steps)}))
        return self._finished(path, path.name)

    def _finished(self, path: Path, name: str) -> Any:
        """Give a whole file its name; returns its SHA-256."""
        return finish(path, self._output / name)


def _keep_step(steps: "list[Tensor]", latents: "Tensor") -> None:
    """In float16, which is fine enough to compare them, and away from the card."""
    import torch

    steps.append(latents.to("cpu", torch.float16).contiguous())


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    replies, lines = _own_stdout(), _lines()
    painter = Painter(json.loads(next(lines)))
    _reply(replies, {"card": _own_card()})
    for line in lines:
        job = json.loads(line)
        message = answer(painter, **job)
        _reply(replies, message)
        if message.get("last"):
            return


def answer(painter: Painter, id: str, graph: Graph, coming: Sequence[Graph] = ()) -> Message:
    """What `painter` returns, or the problem: whether it is fatal to the batch, whether the picture
    may succeed `elsewhere`, and whether it is the last that this process should try."""
    try:
        return painter.paint(id, graph, coming)
    except (OutOfVramError, TooLittleVramError) as error:  # others have the card too, or it is less
        return {"problem": str(error), "fatal": False, "elsewhere": True}
    except (MajicFluxError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        return {"problem": str(error), "fatal": getattr(cause, "errno", None) in FATAL}
    except Exception as error:  # anything: the card may be lost to this process
        logging.getLogger("majicflux").exception("%s", id)
        return {"problem": f"{type(error).__name__}: {error}", "fatal": False, "last": True}


def _own_stdout() -> BinaryIO:
    """The driver's pipe; what libraries print goes to stderr from now on."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def _lines() -> Iterator[str]:
    """Those of stdin. They are waited for in a thread, so that their end is seen at once."""
    lines: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    Thread(target=read, daemon=True).start()
    return iter(lines.get, None)


def _reply(replies: BinaryIO, message: Message) -> None:
    replies.write(json.dumps(message).encode() + b"\n")
    replies.flush()


def card_name() -> str:
    """The name of what this process computes on."""
    import torch

    device = standalone.compute_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else CPU


def _own_card() -> str:
    """The same for a worker that was given a card, or none. Ends it where that card is lost: it
    would paint for hours on the CPU, and other bits."""
    name, given = card_name(), os.environ["CUDA_VISIBLE_DEVICES"]
    if given and name == CPU:
        sys.exit(say("PyTorch does not find the card {card}.", card=given))
    return name


if __name__ == "__main__":
    main()
