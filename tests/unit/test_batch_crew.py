"""Jobs of a batch and workers in this process, which come, fail and go."""

import math
import time
from threading import Event, Thread

import pytest

from majicflux.batch import BatchError, crew
from majicflux.batch.crew import HAND, Crew
from majicflux.batch.jobs import Job
from majicflux.batch.process import WorkerLost


class Hired:
    """A worker in this process: it paints until `lasts` jobs are done, then it is lost."""

    machine, card = "a machine", "a card"

    def __init__(self, painted: dict[str, list[str]], name: str, lasts: float = math.inf):
        self.painted, self.name, self.left = painted, name, lasts

    def start(self) -> bool:
        return self.left >= 0

    def paint(self, id: str, graph: object, coming: list) -> dict:
        self.left -= 1
        if self.left < 0:
            raise WorkerLost
        self.painted.setdefault(self.name, []).append(id)
        time.sleep(0.01)
        return {"coming": len(coming)}

    def end(self) -> None: ...

    def stop(self) -> None: ...


class Agency:
    """Gives these workers, one more each time that it is asked."""

    def __init__(self, *workers: Hired):
        self.workers = [*workers]

    def newcomers(self, wanted: int) -> list[Hired]:
        return [self.workers.pop(0)] if self.workers and wanted > 0 else []

    def require_hope(self) -> None:
        raise BatchError("nobody is left")

    def close(self) -> None: ...


@pytest.fixture
def forty() -> list[Job]:
    return [Job(str(number), number, {}, str(number)) for number in range(40)]


def test_jobs_of_a_lost_worker_are_painted_by_one_that_comes_later(
    forty: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "HIRE_SECONDS", 0.0)
    painted: dict[str, list[str]] = {}
    staff = Agency(Hired(painted, "first", 5), Hired(painted, "second", 7), Hired(painted, "third"))
    found = [
        (job.id, answer["tries"]) for job, answer in Crew(forty, lambda _: {}, staff).outcomes()
    ]
    assert sorted(int(id) for id, _ in found) == [*range(40)]
    assert sorted(int(id) for ids in painted.values() for id in ids) == [*range(40)]
    assert [len(painted[name]) for name in ("first", "second", "third")] == [5, 7, 28]
    assert sorted(tries for _, tries in found)[-3:] == [1, 2, 2]


class Full(Hired):
    """A worker whose card others have filled."""

    def paint(self, id: str, graph: object, coming: list) -> dict:
        self.painted.setdefault(self.name, []).append(id)
        return {"problem": f"{self.name} is full", "elsewhere": True}


class Broken(Full):
    """One that ends whatever it paints."""

    def paint(self, id: str, graph: object, coming: list) -> dict:
        super().paint(id, graph, coming)
        raise WorkerLost


@pytest.mark.parametrize(
    ("kinds", "tries", "problem"),
    [
        ((Full,), 1, "0 is full"),
        ((Full, Full), 2, "{last} is full"),
        ((Full,) * 5, 3, "{last} is full"),
        ((Full, Full, Hired), None, None),
        ((Broken, Hired), None, None),
        ((Full, Broken, Hired), None, None),
    ],
)
def test_what_a_full_or_broken_card_cannot_paint_is_tried_on_others(
    forty: list[Job], kinds: tuple[type[Hired], ...], tries: int | None, problem: str | None
) -> None:
    painted: dict[str, list[str]] = {}
    workers = [kind(painted, str(number)) for number, kind in enumerate(kinds)]
    some = forty[:10]
    painting = Crew(some, lambda _: {}, Agency())
    painting._workers.extend(workers)
    painting._ready.update(workers)
    threads = [Thread(target=painting._work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    found = [painting._outcomes.get() for _ in some]
    for thread in threads:
        thread.join()
    for job, told in found:
        names = [name for name, ids in painted.items() if job.id in ids]
        assert told["tries"] == len(names) == (tries or told["tries"]) <= 3
        assert told.get("problem") in [problem and problem.format(last=name) for name in names]


def test_a_batch_ends_when_nobody_is_left(forty: list[Job]) -> None:
    painting = Crew(forty, lambda _: {}, Agency(Hired({}, "first", 5)))
    with pytest.raises(BatchError, match="nobody is left"):
        list(painting.outcomes())


def test_a_worker_knows_the_next_jobs_and_gets_fewer_towards_the_end(forty: list[Job]) -> None:
    jobs = Crew(forty, lambda _: {}, Agency(Hired({}, "only"))).outcomes()
    coming = [answer["coming"] for _, answer in jobs]
    assert coming[:HAND] == [*range(HAND - 1, -1, -1)]
    assert coming[HAND:][:12] == [*range(11, -1, -1)]
    assert coming[-4:] == [0, 0, 0, 0]


def test_a_batch_that_is_stopped_makes_no_more_graphs(forty: list[Job]) -> None:
    """Their prompts may have to be translated, which takes seconds."""
    made: list[Job] = []
    begun = Event()

    def graph_of(job: Job) -> dict:
        made.append(job)
        begun.set()
        time.sleep(0.02)
        return {}

    painting = Crew(forty, graph_of, Agency(Hired({}, "only")))
    painting._hire()
    begun.wait()
    painting.stop()
    assert len(made) < HAND
