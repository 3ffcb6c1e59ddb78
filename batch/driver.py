"""Hands out the jobs of a batch to workers, one a card, and writes down what they have painted."""

import json
import logging
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread

from ..host import standalone
from ..host.graph import Graph, read_graph
from ..host.image_nodes import image_nodes
from ..messages import say
from ..nodes import NODES
from .jobs import Job, make_jobs
from .manifest import Manifest, Record
from .process import Message, WorkerLost, WorkerProcess
from .rows import BatchError, Row, read_rows

log = logging.getLogger("majicflux")

MOST_TRIES = 3  # of a job whose worker ended
PARTS = ".unfinished"  # folder in that of the pictures, on the same disk

Outcome = tuple[Job, Message] | BaseException


class Batch:
    """Rows that are painted with a graph, into a folder; what is there already stays.

    jobs: all of them; waiting: those that will be painted. Iterate over it, once, to paint: it
    gives the record of each, as the manifest has it, in the order in which they are done.
    """

    def __init__(
        self,
        rows: Path | str | Sequence[Row],
        graph: Path | str | Graph,
        output: Path | str,
        *,
        models: Path | str | None = None,
        input_folder: Path | str = "input",
        gpus: Sequence[int] | None = None,
        workers: int | None = None,
        repeat: int = 1,
        retry_failed: bool = False,
        latents: bool = False,
    ):
        """rows, graph: as they are, or the files that they are read from. latents: keep those of
        each step, as a file beside the pictures.

        gpus: numbers of cards, by default all; workers: so many on the CPU instead.

        Raises BatchError or GraphError for what is wrong with all of it, before anything is
        painted.
        """
        if models is not None:
            standalone.models_folder = Path(models)
        self._cards = _cards(gpus, workers)
        self._output, self._input = Path(output), Path(input_folder)
        self._latents = latents
        self._graph: Graph = graph if isinstance(graph, dict) else read_graph(Path(graph))
        self._classes = {node.define_schema().node_id: node for node in NODES}
        self._classes |= image_nodes(self._output, self._input, {})
        rows = read_rows(Path(rows)) if isinstance(rows, (str, Path)) else rows
        self.jobs = make_jobs(rows, self._graph, self._classes, repeat)
        self._manifest = Manifest(self._output)
        known = {job.key: self._manifest.record(job.key) for job in self.jobs}
        self.waiting = [job for job in self.jobs if _is_open(known[job.key], retry_failed)]

    @property
    def manifest(self) -> Path:
        return self._manifest.path

    def record(self, key: str) -> Record:
        """Of the job with this key, which was painted or failed. Raises KeyError otherwise."""
        if (record := self._manifest.record(key)) is None:
            raise KeyError(key)
        return record

    @property
    def failed(self) -> int:
        """How many jobs could not be painted, in this run or an earlier one."""
        records = (self._manifest.record(job.key) for job in self.jobs)
        return sum(record is not None and record["error"] is not None for record in records)

    def __iter__(self) -> Iterator[Record]:
        """Raises BatchError when the batch cannot go on. What was painted until then stays."""
        parts = self._output / PARTS
        shutil.rmtree(parts, ignore_errors=True)  # of a run that was killed
        try:
            for job in self.waiting:
                if job.problem is not None:
                    yield self._written(job, {"problem": job.problem, "card": None, "tries": 0})
            yield from self._painted([job for job in self.waiting if job.problem is None], parts)
        finally:
            shutil.rmtree(parts, ignore_errors=True)
            self._manifest.close()

    def _painted(self, jobs: Sequence[Job], parts: Path) -> Iterator[Record]:
        parts.mkdir(exist_ok=True)
        setup = {
            "models": str(standalone.models_folder),
            "input": str(self._input),
            "output": str(self._output),
            "parts": str(parts),
            "shared": len(self._cards),
            "latents": self._latents,
        }
        crew = _Crew(jobs, self._graph, self._classes, setup, self._cards)
        try:
            for job, answer in crew.outcomes():
                yield self._written(job, answer)
                if answer.get("fatal"):
                    raise BatchError(answer["problem"])
        finally:
            crew.stop()

    def _written(self, job: Job, answer: Message) -> Record:
        record: Record = {
            "key": job.key,
            "id": job.id,
            "row": job.row,
            "seed": job.seed,
            "pictures": answer.get("pictures", {}),
            **({"latents": answer.get("latents", {})} if self._latents else {}),
            "seconds": answer.get("seconds"),
            "host": platform.node(),
            "card": answer["card"],
            "tries": answer["tries"],
            "error": answer.get("problem"),
            "report": answer.get("report"),
        }
        self._manifest.add(record)
        return record


class _Crew:
    """A thread for each worker; each takes the next job when its last one is done."""

    def __init__(
        self,
        jobs: Sequence[Job],
        graph: Graph,
        classes: dict,
        setup: Message,
        cards: Sequence[int | None],
    ):
        self._base, self._classes = json.dumps(graph), classes
        self._count = len(jobs)
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        for job in jobs:
            self._jobs.put(job)
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._stopped = Event()
        # The first job prepares the weights; all others would do the same work at the same time.
        self._prepared = Event()
        self._workers = [WorkerProcess(setup, card) for card in cards[: len(jobs)]]
        self._threads = [
            Thread(target=self._work, args=(worker, worker is self._workers[0]), daemon=True)
            for worker in self._workers
        ]

    def outcomes(self) -> Iterator[tuple[Job, Message]]:
        """Each job with what became of it. Raises BatchError when no worker can be started."""
        for thread in self._threads:
            thread.start()
        for _ in range(self._count):
            outcome = self._next_outcome()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome

    def _next_outcome(self) -> Outcome:
        while True:
            with suppress(Empty):  # Windows hears Ctrl+C between two waits only
                return self._outcomes.get(timeout=0.5)

    def stop(self) -> None:
        """End all processes at once."""
        self._stopped.set()
        self._prepared.set()
        for worker in self._workers:
            worker.stop()
        for thread in self._threads:
            thread.join()

    def _work(self, worker: WorkerProcess, is_first: bool) -> None:
        try:
            if not is_first:
                self._prepared.wait()
            while not self._stopped.is_set():
                job = self._jobs.get_nowait()
                self._outcomes.put((job, self._done(job, worker)))
                self._prepared.set()
        except (Empty, WorkerLost):
            pass
        except BaseException as error:  # anything: it is raised where the outcomes are waited for
            self._outcomes.put(error)
        finally:
            worker.end()

    def _done(self, job: Job, worker: WorkerProcess) -> Message:
        """What became of it, after some tries if it must be. Raises WorkerLost once stopped."""
        graph = job.graph(self._base, self._classes)
        for tries in range(1, MOST_TRIES + 1):
            try:
                answer = worker.paint(job.id, graph)
                return {**answer, "card": worker.card, "tries": tries}
            except WorkerLost:
                if self._stopped.is_set():
                    raise
                log.warning("The worker that painted %s has ended (try %d).", job.id, tries)
        problem = say("Each worker that painted it ended, {tries} in all.", tries=MOST_TRIES)
        return {"problem": problem, "fatal": False, "card": worker.card, "tries": MOST_TRIES}


def _is_open(record: Record | None, retry_failed: bool) -> bool:
    return record is None or (record["error"] is not None and retry_failed)


def _cards(gpus: Sequence[int] | None, workers: int | None) -> list[int | None]:
    """One for each worker, None for the CPU. Raises BatchError for a card that is not there."""
    if workers is not None:
        return [None] * workers
    import torch

    count = torch.cuda.device_count()
    if gpus is None:
        return [*range(count)] or [None]
    for card in gpus:
        if card >= count:
            raise BatchError(
                say(
                    "There is no card {card}: this machine has {count}, counted from 0.",
                    card=card,
                    count=count,
                )
            )
    return [*gpus]
