"""The workers of a batch: how they start and end, and what they cannot do."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from batches import Save, records
from filelock import FileLock

from majicflux.batch import Batch, BatchError, driver, process
from majicflux.batch import worker as worker_module
from majicflux.batch.process import WorkerLost, WorkerProcess, _environment
from majicflux.batch.worker import _own_card, answer
from majicflux.engine.errors import OutOfVramError
from majicflux.loaders.demo_models import DIT_FILE
from majicflux.loaders.weight_cache import LOCK
from majicflux.messages import MajicFluxError


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerProcess]:
    """One whose process answers that it is there, and no more."""
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nread setup; echo \'{"card": "CPU"}\'; read job\n')
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    worker = WorkerProcess({"shared": 1}, None)
    assert worker.start()
    yield worker
    worker.end()


def test_ctrl_c_does_not_reach_a_worker(worker: WorkerProcess) -> None:
    """One that was still importing said where it was, below the batch's own word."""
    assert os.getpgid(worker._process.pid) != os.getpgid(0)


def test_a_worker_is_stopped_while_its_thread_ends_it(worker: WorkerProcess) -> None:
    class EndsMeanwhile(WorkerProcess):
        @property
        def _process(self) -> subprocess.Popen | None:
            return self.asked.pop()

        @_process.setter
        def _process(self, process: subprocess.Popen | None) -> None:
            self.asked = [None, process]

    ending = EndsMeanwhile({}, None)
    ending._process = worker._process
    ending.stop()
    assert worker._process.wait(1) == -signal.SIGKILL


def test_a_row_that_ends_each_worker_fails_and_the_others_go_on(
    graph: Path, rows: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def paint(worker: WorkerProcess, id: str, graph: object, coming: object) -> dict:
        if id == "a":
            raise WorkerLost
        return {"pictures": {}, "seconds": 1.0, "report": None}

    monkeypatch.setattr(WorkerProcess, "start", lambda _: True)
    monkeypatch.setattr(WorkerProcess, "paint", paint)
    a, b = Batch(rows("id\na\nb\n"), graph, tmp_path / "out", workers=1)
    assert (a["error"], a["tries"]) == ("Each worker that painted it ended, 3 in all.", 3)
    assert (b["error"], b["tries"]) == (None, 1)


def test_a_full_disk_ends_the_batch(
    graph: Path, rows: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def paint(self, id: str, graph: object, coming: object) -> dict:
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise MajicFluxError("a.png cannot be written.") from error

    monkeypatch.setattr(WorkerProcess, "start", lambda _: True)
    monkeypatch.setattr(WorkerProcess, "paint", lambda _, *job: answer(Full(), *job))
    with pytest.raises(BatchError, match=r"^a\.png cannot be written\.$"):
        list(Batch(rows("id\na\nb\nc\n"), graph, tmp_path / "out", workers=2))
    assert len(records(tmp_path / "out")) == 1


def test_a_worker_that_fails_in_an_unknown_way_is_replaced() -> None:
    class Broken:
        def paint(self, id: str, graph: object, coming: object) -> dict:
            raise RuntimeError("CUDA error")

    expected = {"problem": "RuntimeError: CUDA error", "fatal": False, "last": True}
    assert answer(Broken(), "a", {}) == expected


def test_workers_that_cannot_start_are_told(
    graph: Path, rows: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(BatchError, match="A worker ended before it painted anything"):
        list(Batch(rows("id\na\n"), graph, tmp_path / "out", workers=2))
    assert records(tmp_path / "out") == []


def test_a_worker_that_cannot_start_leaves_the_rows_to_others(
    graph: Path, rows: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(worker: WorkerProcess) -> str:
        if worker._number == 0:
            raise WorkerLost
        return "a card"

    monkeypatch.setattr(driver, "_cards", lambda *_: [0, 1])
    monkeypatch.setattr(WorkerProcess, "_started", started)
    monkeypatch.setattr(WorkerProcess, "_ask", lambda *_: {"seconds": 1.0})
    for table in ("id\na\n", "id\nb\nc\nd\n"):
        painted = [*Batch(rows(table), graph, tmp_path / "out")]
        assert {(record["card"], record["error"]) for record in painted} == {("1: a card", None)}


def test_a_batch_without_workers_ends(
    graph: Path, rows: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BatchError):
        list(Batch(rows("id\na\n"), graph, tmp_path / "out", workers=0))


def test_a_worker_that_has_lost_its_card_paints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU it would paint for hours, and other bits."""
    monkeypatch.setattr(worker_module, "card_name", lambda: "CPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(SystemExit, match=r"^PyTorch does not find the card 3\.$"):
        _own_card()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert _own_card() == "CPU"


def test_a_picture_that_no_memory_is_left_for_may_succeed_elsewhere() -> None:
    class Crowded:
        def paint(self, id: str, graph: object, coming: object) -> dict:
            raise OutOfVramError(phase="denoising", smallest=7.0)

    told = answer(Crowded(), "a", {})
    assert told["elsewhere"]
    assert told["problem"].startswith("The card ran out of memory")


def test_a_batch_that_is_done_asks_for_no_worker(
    graph: Path, rows: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "Cluster", None)
    given = (rows("id,steps\na,many\n"), graph, tmp_path / "out")
    assert [record["tries"] for record in Batch(*given, ray="192.168.1.10:6379")] == [0]
    assert list(Batch(*given, ray="192.168.1.10:6379")) == []


def test_a_worker_that_ends_as_it_starts_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = iter(["", "", "a card"])

    def started(worker: WorkerProcess) -> str:
        card = next(cards)
        if not card:
            raise WorkerLost
        return card

    monkeypatch.setattr(WorkerProcess, "_started", started)
    monkeypatch.setattr(WorkerProcess, "_ask", lambda *_: {"seconds": 1.0})
    worker = WorkerProcess({"shared": 1}, 1)
    assert worker.start()
    assert worker.paint("a", {}, []) == {"seconds": 1.0}
    assert worker.card == "1: a card"


def test_weights_are_prepared_by_one_process_while_others_wait(
    models: Path, tmp_path: Path
) -> None:
    """Both would make the same file, and read the same disk."""
    code = (
        "import sys; from pathlib import Path; from majicflux.loaders import flux_dit as f;"
        "from majicflux.engine.quant.formats import PRECISIONS; own = f.convert_into;"
        "f.convert_into = lambda *given: print('converts') or own(*given); sys.stdin.read(1);"
        "f.load_flux_dit(Path(sys.argv[1]), PRECISIONS['float8_e4m3fn'],"
        " cache_folder=Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, models / DIT_FILE, tmp_path]
    lock = FileLock(tmp_path / LOCK)
    with lock:
        two = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(2)]
        for process in two:
            process.stdin.write("\n")
            process.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            two[0].wait(4)
        assert not [*tmp_path.glob("*.part")]
    assert sorted(process.communicate()[0] for process in two) == ["", "converts\n"]


def test_cards_that_are_not_there_are_refused(graph: Path, rows: Save, tmp_path: Path) -> None:
    for card in (99, -1):
        with pytest.raises(BatchError, match=f"There is no card {card}: this machine has"):
            Batch(rows("id\na\n"), graph, tmp_path / "out", gpus=[card])
    with pytest.raises(BatchError, match="Cards are chosen with --gpus, machines with --ray"):
        Batch(rows("id\na\n"), graph, tmp_path / "out", gpus=[0], ray="local")


@pytest.mark.parametrize(
    ("visible", "card", "seen"),
    [(None, 1, "1"), ("4,6", 1, "6"), ("", 0, "0"), ("4,6", None, ""), (None, None, "")],
)
def test_a_worker_sees_its_card_only(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, card: int | None, seen: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _environment(card, 1)["CUDA_VISIBLE_DEVICES"] == seen


@pytest.mark.parametrize(
    ("card", "shared", "cores", "threads"),
    [(0, 1, 32, "4"), (1, 2, 8, "2"), (0, 8, 4, "1"), (None, 2, 32, None)],
)
def test_workers_on_cards_leave_each_other_the_cores(
    monkeypatch: pytest.MonkeyPatch, card: int | None, shared: int, cores: int, threads: str | None
) -> None:
    """Unless the user says how many threads; on the CPU they are what computes."""
    monkeypatch.setattr(process, "_cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert _environment(card, shared).get("OMP_NUM_THREADS") == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert _environment(card, shared)["OMP_NUM_THREADS"] == "7"
