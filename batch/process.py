"""The driver's end of a worker: a process that is started when it is needed, and once more when it
has ended."""

import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..host.graph import Graph
from ..messages import say
from .rows import BatchError

log = logging.getLogger("majicflux")

MOST_THREADS = 4  # of a worker that computes on a card; a picture took no longer than with 32
MOST_STARTS = 3  # of a process that ends before it can paint
# As `-m` does, also where that looks for packages in Python's own folders alone.
PACKAGES = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
AS_MODULE = f"""import runpy, sys
sys.path.append({PACKAGES!r})
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)"""

Message = dict[str, Any]


class WorkerLost(Exception):
    """The process ended while it painted: it was killed, or the card or the memory failed it."""


class MachineRefused(WorkerLost):
    """It cannot paint the picture that others paint."""


class LocalStaff:
    """A process for each of these cards of this machine; None: on the CPU."""

    def __init__(self, setup: Message, cards: Sequence[int | None]):
        self._workers = [WorkerProcess(setup, card) for card in cards]

    def newcomers(self, wanted: int) -> "list[WorkerProcess]":
        wanted = max(wanted, 0)
        came, self._workers = self._workers[:wanted], self._workers[wanted:]
        return came

    def require_hope(self) -> None:
        raise BatchError(say("A worker ended before it painted anything; above is what it said."))

    def close(self) -> None: ...


class WorkerProcess:
    """card: the number of the card that it has to itself, as nvidia-smi counts or, where
    CUDA_VISIBLE_DEVICES is set, in that list; None: it computes on the CPU."""

    def __init__(self, setup: Message, card: int | None):
        self._setup, self._number = setup, card
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False
        self.machine, self.card = platform.node(), ""

    def start(self) -> bool:
        """False when it ends before it can paint, time after time; others may fare better."""
        if self._process is not None:
            return True
        for _ in range(MOST_STARTS):
            try:
                name = self._started()
            except WorkerLost:
                self.end()
                if self._stopped:
                    raise
                continue
            self.card = name if self._number is None else f"{self._number}: {name}"
            return True
        where = "the CPU" if self._number is None else f"card {self._number}"
        log.warning("The worker on %s ended as it started, %d times.", where, MOST_STARTS)
        return False

    def paint(self, id: str, graph: Graph, coming: Sequence[Graph]) -> Message:
        try:
            answer = self._ask({"id": id, "graph": graph, "coming": coming})
        except WorkerLost:
            self.end()
            raise
        if answer.get("last"):
            self.end()
        return answer

    def end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with suppress(OSError), process:  # which closes the pipes and waits
            pass

    def stop(self) -> None:
        self._stopped = True
        process = self._process  # once, for its own thread may end it meanwhile
        if process is not None:
            process.kill()

    def _started(self) -> str:
        """Returns the name of what it computes on. Raises WorkerLost."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", AS_MODULE, f"{__package__}.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(self._number, self._setup["shared"]),
            # Ctrl+C is not for it: while it still imports it would die of that, and say so.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        if self._stopped:
            self._process.kill()
        return self._ask(self._setup)["card"]

    def _ask(self, message: Message) -> Message:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise WorkerLost
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError as error:
            raise WorkerLost from error
        if not line.endswith("\n"):
            raise WorkerLost
        return json.loads(line)


def _environment(card: int | None, shared: int) -> dict[str, str]:
    """That of one of so many workers of this machine. Only its card can be seen, and bars of its
    own would be many at once."""
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if card is None:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif visible:
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[card]
    else:
        environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(card)}
    if card is not None:
        # OpenMP's threads turn in place for a while when they have nothing to do. With one for each
        # core in each worker they take the cores from those that start kernels, and two workers
        # are as fast as 1.3. A worker on the CPU needs them, and their number may change its bits.
        threads = max(1, min(MOST_THREADS, _cores() // (2 * shared)))
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    return environment


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
