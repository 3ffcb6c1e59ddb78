"""Hands out the jobs of a batch to workers, and takes them back from those that are lost."""

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from queue import Empty, SimpleQueue
from threading import Condition, Thread
from typing import Protocol

from ..host.graph import Graph
from ..messages import MajicFluxError, say
from .jobs import Job
from .process import MachineRefused, Message, WorkerLost

log = logging.getLogger("majicflux")

MOST_TRIES = 3  # of a job whose worker ended, or had no memory for it
HAND = 16  # jobs that a worker takes at most: their prompts are encoded together
LISTEN_SECONDS = 0.5  # Windows hears Ctrl+C between two waits only
HIRE_SECONDS = 2.0  # after which a machine that came is seen

Outcome = tuple[Job, Message] | BaseException


class Worker(Protocol):
    """Paints one job at a time. machine, card: their names, once it has started."""

    machine: str
    card: str

    def start(self) -> bool:
        """Have it ready to paint, if it is not; False: it never will be. Raises WorkerLost once
        stopped."""
        ...

    def paint(self, id: str, graph: Graph, coming: Sequence[Graph]) -> Message:
        """coming: graphs that follow. Raises WorkerLost when it ends meanwhile."""
        ...

    def end(self) -> None:
        """For the thread that paints."""
        ...

    def stop(self) -> None:
        """For another thread: whoever waits for the worker gets a WorkerLost at once."""
        ...


class Staff(Protocol):
    """Where workers come from."""

    def newcomers(self, wanted: int) -> Sequence[Worker]:
        """Those that have not been given before, so many at most."""
        ...

    def require_hope(self) -> None:
        """Raise BatchError when no worker is left, and none will come."""
        ...

    def close(self) -> None: ...


class Crew:
    """A thread for each worker, which takes some jobs whenever it is through with its last ones."""

    def __init__(self, jobs: Sequence[Job], graph_of: Callable[[Job], Graph], staff: Staff):
        self._waiting = deque(jobs)
        self._open = len(jobs)  # that have no outcome yet
        self._failed: dict[str, list[Worker]] = defaultdict(list)  # by the job they failed with
        self._ready: set[Worker] = set()  # those that have started
        self._graph_of, self._staff = graph_of, staff
        self._changed = Condition()  # guards all of the above
        self._stopped = False
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._workers: list[Worker] = []
        self._threads: list[Thread] = []

    def outcomes(self) -> Iterator[tuple[Job, Message]]:
        """Each job with what became of it. Raises BatchError when it cannot go on."""
        for _ in range(self._open):
            outcome = self._next_outcome()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome

    def stop(self) -> None:
        """End all workers at once."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.stop()
        for thread in self._threads:
            thread.join()

    def _next_outcome(self) -> Outcome:
        waited = HIRE_SECONDS
        while True:
            if waited >= HIRE_SECONDS or not self._working():
                self._hire()
                waited = 0.0
            with suppress(Empty):
                return self._outcomes.get(timeout=LISTEN_SECONDS)
            waited += LISTEN_SECONDS

    def _hire(self) -> None:
        """Have the workers begin that have come since."""
        working = self._working()
        came = self._staff.newcomers(self._open - working)
        if not came and not working and self._outcomes.empty():
            self._staff.require_hope()
        for worker in came:
            thread = Thread(target=self._work, args=(worker,), daemon=True)
            self._workers.append(worker)
            thread.start()
            self._threads.append(thread)  # not before: what never began cannot be joined

    def _working(self) -> int:
        return sum(thread.is_alive() for thread in self._threads)

    def _work(self, worker: Worker) -> None:
        try:
            while worker.start() and (jobs := self._take(worker)):
                self._paint(jobs, worker)
        except WorkerLost:
            pass
        except BaseException as error:  # anything: it is raised where the outcomes are waited for
            self._outcomes.put(error)
        finally:
            worker.end()
            self._leave(worker)

    def _leave(self, worker: Worker) -> None:
        with self._changed:
            self._ready.discard(worker)
            self._changed.notify_all()

    def _take(self, worker: Worker) -> list[Job]:
        """The next jobs for a worker, fewer towards the end so that all end together; none when
        all are done. Waits while those of others may come back."""
        with self._changed:
            self._ready.add(worker)
            while not self._stopped and self._open:
                count = min(max(len(self._waiting) // (2 * len(self._workers)), 1), HAND)
                good = (job for job in self._waiting if self._is_for(worker, job))
                if jobs := [*islice(good, count)]:
                    for job in jobs:
                        self._waiting.remove(job)
                    return jobs
                self._changed.wait()
            return []

    def _is_for(self, worker: Worker, job: Job) -> bool:
        """Not where it failed with that job and others have not: a card that is full or broken
        would be through with all jobs before the cards that paint."""
        failed = self._failed.get(job.id, ())
        return worker not in failed or self._ready.issubset(failed)

    def _paint(self, jobs: Sequence[Job], worker: Worker) -> None:
        """Paint them one by one, as far as the worker lasts. Raises WorkerLost once stopped."""
        graphs = self._graphs(jobs, worker)
        while graphs:
            job, graph = graphs[0]
            try:
                answer = worker.paint(job.id, graph, [coming for _, coming in graphs[1:]])
            except WorkerLost as error:
                left = [job for job, _ in graphs]
                self._give_back(left, not isinstance(error, MachineRefused), worker)
                return
            graphs.pop(0)
            again = answer.get("elsewhere") or answer.get("last")
            if not (again and self._passed_on(job, worker)):
                self._done(job, answer, worker)
            if answer.get("last"):
                self._give_back([job for job, _ in graphs], False, worker)
                return

    def _graphs(self, jobs: Sequence[Job], worker: Worker) -> list[tuple[Job, Graph]]:
        """Those that can be made; what is wrong with the others is their outcome. Raises WorkerLost
        once stopped, for a translation takes seconds."""
        found = []
        for job in jobs:
            if self._stopped:
                raise WorkerLost
            try:
                found.append((job, self._graph_of(job)))
            except MajicFluxError as error:
                self._done(job, {"problem": str(error)}, worker)
        return found

    def _passed_on(self, job: Job, worker: Worker) -> bool:
        """Give a job that failed to another worker, if there is one that has not tried it."""
        with self._changed:
            failed = [*self._failed[job.id], worker]
            if len(failed) == MOST_TRIES or self._ready.issubset(failed):
                return False
            self._failed[job.id] = failed
            self._waiting.appendleft(job)
            self._changed.notify_all()
            return True

    def _give_back(self, jobs: Sequence[Job], counts: bool, worker: Worker) -> None:
        """For other workers, as this one has ended. counts: whether the first job may be why."""
        self._leave(worker)
        with self._changed:
            if self._stopped:
                raise WorkerLost
            lost = jobs[0] if jobs and counts else None
            if lost is not None:
                self._failed[lost.id].append(worker)
                tries = len(self._failed[lost.id])
                log.warning("The worker that painted %s has ended (try %d).", lost.id, tries)
            ended = lost is not None and len(self._failed[lost.id]) == MOST_TRIES
            self._waiting.extendleft(reversed(jobs[1:] if ended else jobs))
            self._changed.notify_all()
        if lost is not None and ended:
            problem = say("Each worker that painted it ended, {tries} in all.", tries=MOST_TRIES)
            self._done(lost, {"problem": problem, "fatal": False}, worker, MOST_TRIES)

    def _done(self, job: Job, answer: Message, worker: Worker, tries: int | None = None) -> None:
        told = {"host": worker.machine, "card": worker.card}
        tries = tries or len(self._failed.get(job.id, ())) + 1
        with self._changed:
            self._open -= 1
            self._changed.notify_all()
        self._outcomes.put((job, {**answer, **told, "tries": tries}))
