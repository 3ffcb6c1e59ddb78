"""Many pictures from one graph: what is painted, and that nothing is lost or done twice."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from io import StringIO
from pathlib import Path

import psutil
import pytest
from batches import API, Save, records, small_graph
from PIL import Image

from majicflux.batch import Batch
from majicflux.batch.manifest import NAME
from majicflux.batch.process import WorkerProcess
from majicflux.cli import main

TABLE = """id,prompt,width,solver,steps
a,a cat,,,
b,a dog,48,,2
c,a cat,,nope,
d,a cat,,,many
e,,,,
f,x,,,
"""
GOOD = ["a.png", "b.png", "e.png", "f.png"]


def pictures(folder: Path) -> dict[str, str]:
    """The files beside the manifest, with their SHA-256; none is unfinished."""
    files = [path for path in folder.iterdir() if path.name != NAME]
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def by_one_worker(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that one worker has painted TABLE into."""
    folder = tmp_path_factory.mktemp("by-one")
    (folder / "graph.json").write_text(json.dumps(small_graph()))
    (folder / "rows.csv").write_text(TABLE)
    for record in Batch(folder / "rows.csv", folder / "graph.json", folder / "out", models=models,
                        workers=1):  # fmt: skip
        assert record["host"] or record["tries"] == 0
    return folder / "out"


def test_each_row_is_painted_or_its_problem_recorded(by_one_worker: Path) -> None:
    found = {record["id"]: record for record in records(by_one_worker)}
    assert sorted(pictures(by_one_worker)) == GOOD
    assert pictures(by_one_worker) == {
        name: digest for record in found.values() for name, digest in record["pictures"].items()
    }
    assert [found[id]["seed"] for id in "abcdef"] == [0, 1000, 2000, 3000, 4000, 5000]
    assert "(sample), solver must be one of: " in found["c"]["error"]
    assert found["d"]["error"] == "Row 4, steps must be a number, not 'many'."
    assert [found[id]["tries"] for id in "abcdef"] == [1, 1, 1, 0, 1, 1]
    assert {found[id]["card"] for id in "abcef"} == {"CPU"}
    phases = {id: [each["name"] for each in found[id]["report"]["phases"]] for id in "ab"}
    assert phases["a"] == ["text encoders", "denoising", "VAE decode"]
    assert phases["b"] == phases["a"][1:], "its prompt was encoded with the first"
    assert found["a"]["seconds"] > found["b"]["seconds"], "the models stay between rows"
    with Image.open(by_one_worker / "b.png") as picture:
        assert picture.size == (48, 32)
        assert json.loads(picture.text["prompt"])["5"]["inputs"]["seed"] == 1000


def test_a_picture_is_the_one_that_run_paints(
    by_one_worker: Path, graph: Path, models: Path, tmp_path: Path
) -> None:
    sets = ("--set=prompt=a dog", "--set=width=48", "--set=steps=2", "--set=seed=1000")
    command = [sys.executable, "-m", "majicflux.cli", "run", graph, "--models", models, *sets]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    paths = by_one_worker / "b.png", tmp_path / done.stdout.strip()
    with Image.open(paths[0]) as picture, Image.open(paths[1]) as own:
        assert picture.tobytes() == own.tobytes()


def test_the_same_command_paints_what_is_not_there_yet(
    by_one_worker: Path, graph: Path, rows: Save, tmp_path: Path
) -> None:
    shutil.copytree(by_one_worker, tmp_path / "out")
    given = (rows(TABLE), graph, tmp_path / "out")

    def waiting(**options: object) -> list[str]:
        batch = Batch(*given, workers=1, **options)
        assert batch.failed == 2
        batch._manifest.close()
        return [job.id for job in batch.waiting]

    assert waiting() == []
    assert waiting(retry_failed=True) == ["c", "d"]
    assert waiting(repeat=2) == ["a-2", "b-2", "c-2", "d-2", "e-2", "f-2"]
    (tmp_path / "out/e.png").unlink()
    assert waiting() == ["e"]
    rows(TABLE.replace("a dog", "a frog"))
    assert waiting() == ["b", "e"]


def test_a_killed_worker_costs_one_more_try(
    by_one_worker: Path, graph: Path, rows: Save, tmp_path: Path
) -> None:
    killed = False
    for record in Batch(rows(TABLE), graph, tmp_path / "out", workers=2):
        if record["pictures"] and not killed:
            children = psutil.Process().children()
            working = [child for child in children if "majicflux.batch.worker" in child.cmdline()]
            working[0].kill()
            killed = True
    assert pictures(tmp_path / "out") == pictures(by_one_worker)
    found = records(tmp_path / "out")
    assert sorted(record["id"] for record in found) == [*"abcdef"]
    assert sorted(record["tries"] for record in found) == [0, 1, 1, 1, 1, 2]
    assert not psutil.Process().children()


def begun(rows: Path, graph: Path, out: Path, models: Path) -> subprocess.Popen:
    """A batch of two workers that has painted at least one picture."""
    command = [sys.executable, "-m", "majicflux.cli", "batch", rows, "--graph", graph,
               "--out", out, "--models", models, "--workers", "2"]  # fmt: skip
    process = subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As a terminal starts it, though these tests may run where Ctrl+C is ignored.
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    next(line for line in process.stdout if ".png: " in line)
    return process


def test_a_killed_driver_takes_its_workers_along_and_the_next_one_goes_on(
    by_one_worker: Path, graph: Path, rows: Save, models: Path, tmp_path: Path
) -> None:
    given = (rows(TABLE), graph, tmp_path / "out")
    driver = begun(*given, models)
    workers = psutil.Process(driver.pid).children()
    assert workers
    driver.kill()
    driver.communicate()
    assert psutil.wait_procs(workers, timeout=5)[1] == []
    assert 1 <= len([record for record in records(tmp_path / "out") if record["pictures"]]) < 4
    for _ in Batch(*given, workers=1):
        pass
    assert pictures(tmp_path / "out") == pictures(by_one_worker)
    assert sorted(record["id"] for record in records(tmp_path / "out")) == [*"abcdef"]


def test_ctrl_c_ends_a_batch_at_once(graph: Path, rows: Save, models: Path, tmp_path: Path) -> None:
    many = rows("a cat\n" * 50, "prompts.txt")
    process = begun(many, graph, tmp_path / "out", models)
    workers = psutil.Process(process.pid).children()
    os.killpg(process.pid, signal.SIGINT)
    began = time.monotonic()
    _, said = process.communicate()
    assert time.monotonic() - began < 5
    assert (process.returncode, said) == (130, "stopped\n")
    assert psutil.wait_procs(workers, timeout=1)[1] == []
    painted = {name for record in records(tmp_path / "out") for name in record["pictures"]}
    assert painted <= {*pictures(tmp_path / "out")}
    left = Batch(many, graph, tmp_path / "out", workers=1)
    left._manifest.close()
    assert len(left.waiting) == 50 - len(painted) < 50


def test_the_command_says_what_was_painted_and_what_was_not(
    by_one_worker: Path, graph: Path, rows: Save, models: Path, tmp_path: Path
) -> None:
    shutil.copytree(by_one_worker, tmp_path / "out")
    (tmp_path / "out/f.png").unlink()
    command = [sys.executable, "-m", "majicflux.cli", "batch", rows(TABLE), "--graph", graph,
               "--out", "out", "--models", models, "--workers", "1"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first == "5 of 6 were done before."
    assert second.startswith("6/6 f.png: ")
    assert (done.returncode, done.stderr) == (
        1,
        "error: 2 of 6 could not be painted; out/manifest.jsonl says why. --retry-failed tries "
        "them again.\n",
    )


def test_a_terminal_shows_rate_and_remaining_time(
    graph: Path, rows: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    def paint(worker: WorkerProcess, id: str, graph: object, coming: object) -> dict:
        time.sleep(0.2)
        return {"problem": "no"} if id == "a" else {"pictures": {f"{id}.png": ""}, "seconds": 0.2}

    monkeypatch.setattr(WorkerProcess, "start", lambda _: True)
    monkeypatch.setattr(WorkerProcess, "paint", paint)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(sys, "stdout", out := StringIO())
    out_folder = str(tmp_path / "out")
    table = rows("id\na\nb\nc\nd\n")
    assert main(["batch", str(table), "--graph", str(graph), "--out", out_folder,
                 "--workers", "1"]) == 1  # fmt: skip
    assert re.search(r"3/4 \[00:0\d<00:0\d, +[\d.]+(it)?/s\]", terminal.getvalue())
    assert out.getvalue() == "a: no\n"


def test_three_lines_of_python(by_one_worker: Path, graph: Path, rows: Save, models: Path) -> None:
    """Those of docs/batch.md, as they stand."""
    page = (API.parents[1] / "docs" / "batch.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.+?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 3
    rows("id,prompt\na,a cat\n")
    (graph.parent / "ComfyUI").mkdir()
    (graph.parent / "ComfyUI/models").symlink_to(models)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=graph.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout == "a None\n"
    assert pictures(graph.parent / "out") == {"a.png": pictures(by_one_worker)["a.png"]}
