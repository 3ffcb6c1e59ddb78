"""Prompts in Chinese become English, ahead of the workers that are to paint them."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from threading import Event, Lock, Thread

from ..host.graph import Graph
from ..messages import MajicFluxError
from ..nodes.prompts import translate_prompts
from .process import WorkerLost

STOP_SECONDS = 3.0

Translate = Callable[[str], str]


class English:
    """translate: one prompt at a time, which may take seconds."""

    def __init__(self, translate: Translate):
        self._translate = translate
        self._known: dict[str, str] = {}
        self._turn = Lock()
        self._stopped = Event()
        self._ahead: Thread | None = None

    def put_into(self, graph: Graph) -> Graph:
        """Translate the prompts of a graph in place. Raises WorkerLost once stopped."""
        translate_prompts(graph, self._english_of)
        return graph

    def go_ahead(self, graphs: Iterable[Graph]) -> None:
        """Begin to translate what will be asked for, in a thread of its own."""

        def translate_all() -> None:
            for graph in graphs:
                if self._stopped.is_set():
                    return
                with suppress(MajicFluxError, WorkerLost):  # is told to whoever asks for it
                    self.put_into(graph)

        self._ahead = Thread(target=translate_all, daemon=True)
        self._ahead.start()

    def stop(self) -> None:
        """Waits for the prompt that is being translated: PyTorch ends a process whose interpreter
        ends while another thread computes."""
        self._stopped.set()
        if self._ahead is not None:
            self._ahead.join(STOP_SECONDS)

    def _english_of(self, prompt: str) -> str:
        if prompt not in self._known:  # else nobody waits for the one that is being translated
            with self._turn:
                if self._stopped.is_set():  # as several may have waited for their turn
                    raise WorkerLost
                if prompt not in self._known:  # which that one may have been
                    self._known[prompt] = self._translate(prompt)
        return self._known[prompt]
