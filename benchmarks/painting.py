"""Prompts of a running ComfyUI, each followed to its end and written down."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from .card_counter import Counter, peak_of
from .comfyui import ComfyUI, Refused
from .flux_graphs import Graph

PROMPT_SECONDS = 180  # after which a prompt counts as lost
MAPPED = (".safetensors", ".majicflux")  # weights
Held = tuple[float, float, float]
ENDS = {
    "execution_success": "success",
    "execution_error": "error",
    "execution_interrupted": "interrupted",
}


@dataclass(frozen=True)
class Painting:
    """One prompt. where: of the card and the server's flags; what: the side and its budget.

    number: 1 for the first of its kind in its server. status: one of ENDS, or "refused", or "lost".
    seconds: by ComfyUI's own clock, of the whole prompt. peak: of the card's own counter, GiB above
    what was in use before the server began, None without a card.
    """

    where: str
    what: str
    number: int
    status: str
    seconds: float = 0.0
    peak: float | None = None
    error: str = ""
    picture: Path | None = None
    budget: float = 0.0  # GB of ours, 0 for none

    @property
    def pixels(self) -> bytes:
        """Of the first picture that was saved, empty if none was."""
        if self.picture is None:
            return b""
        with Image.open(self.picture) as picture:
            return picture.tobytes()

    def away_from(self, other: "Painting") -> str:
        """How far the values of two pictures of one size are apart."""
        if not (self.pixels and len(self.pixels) == len(other.pixels)):
            return "there is no picture"
        pairs = zip(self.pixels, other.pixels, strict=True)
        away = [abs(a - b) for a, b in pairs]
        share = sum(difference > 0 for difference in away) / len(away)
        return f"{share:.2%} of the values are others, by {max(away)} of 255 at most"

    @property
    def report(self) -> list[dict[str, Any]]:
        """Of each phase of ours, from the picture."""
        if self.picture is None:
            return []
        with Image.open(self.picture) as picture:
            return json.loads(picture.info.get("majicflux", "{}")).get("phases", [])

    @property
    def phases(self) -> list[tuple[str, float]]:
        """Name and seconds of each."""
        return [(phase["name"], phase["seconds"]) for phase in self.report]


class Session:
    """A server, and what was painted with it. `note` is called with every painting."""

    def __init__(
        self,
        server: ComfyUI,
        where: str,
        note: Callable[[Painting], None],
        counter: Counter | None = None,
        before: float = 0.0,
    ):
        self.server, self.where, self.note = server, where, note
        self.counter, self.before = counter, before

    def paint(self, graph: Graph, what: str, number: int = 1, budget: float = 0.0) -> Painting:
        """Queue a graph and wait for its end."""
        for node in graph.values():
            if "seed" in node["inputs"]:  # an input that nobody reads, or a repetition were cached
                node["inputs"]["asked at"] = time.time()
        with peak_of(self.counter) as highest:
            found = self._follow(graph)
        peak = round(highest[0] - self.before, 2) if highest else None
        painting = Painting(self.where, what, number, peak=peak, budget=budget, **found)
        self.note(painting)
        return painting

    def _follow(self, graph: Graph) -> dict[str, Any]:
        extra = {"extra_pnginfo": {"workflow": {"nodes": []}}}  # so that pictures carry reports
        end = time.monotonic() + PROMPT_SECONDS
        try:
            queued = self.server.post("/prompt", {"prompt": graph, "extra_data": extra})
            prompt_id = queued["prompt_id"]
            while (ended := self.server.ended(prompt_id)) is None:
                if time.monotonic() > end:
                    self.server.post("/interrupt", {})
                    return {"status": "lost", "error": f"not done in {PROMPT_SECONDS} s"}
                time.sleep(0.03)
            pictures = self.server.pictures(prompt_id, "output").values()
        except Refused as refused:
            return {"status": "refused", "error": str(refused.errors)}
        except OSError as error:
            return {"status": "lost", "error": f"{error}\n{self.server.log()[-2000:]}"}
        messages = dict(ended["status"]["messages"])
        (kind,) = ENDS.keys() & messages.keys()
        error, begun = messages[kind], messages["execution_start"]["timestamp"]
        said = f"{error['exception_type']}: {error['exception_message']}" if "error" in kind else ""
        return {
            "status": ENDS[kind],
            "seconds": (messages[kind]["timestamp"] - begun) / 1000,
            "error": said.strip(),
            "picture": next((path for paths in pictures for path in paths), None),
        }

    def free(self, forget: bool = False) -> None:
        """Weights leave the card; forget: and results are dropped. Waits until they have."""
        if self.server.process.poll() is not None:
            return  # the next prompt will say so
        self.server.post("/free", {"unload_models": True, "free_memory": forget})
        last, end = (-1.0, -1.0, -1.0), time.monotonic() + 15
        while time.monotonic() < end:
            time.sleep(0.7)
            now = self.held()
            if max(abs(a - b) for a, b in zip(now, last, strict=True)) < 0.01:
                return
            last = now

    def held_idle(self) -> Held:
        """`held` by a server that has forgotten all that it can."""
        self.free(forget=True)
        return self.held()

    def held(self) -> Held:
        """GiB of the card in use above what was before, of the server's resident memory, and of
        this but for mapped weights, whose pages the system may drop."""
        card = self.counter() - self.before if self.counter else 0.0
        server = psutil.Process(self.server.process.pid)
        mapped = sum(part.rss for part in server.memory_maps() if part.path.endswith(MAPPED))
        resident = server.memory_info().rss
        return card, resident / 2**30, (resident - mapped) / 2**30
