"""Many pictures from one graph: rows, what is painted, and that nothing is lost or done twice."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from io import StringIO
from pathlib import Path
from threading import Event, Thread

import psutil
import pytest
from filelock import FileLock
from PIL import Image

from majicflux.batch import Batch, BatchError, driver, jobs
from majicflux.batch import worker as worker_module
from majicflux.batch.english import English
from majicflux.batch.jobs import Job, make_jobs
from majicflux.batch.manifest import NAME
from majicflux.batch.pictures import latents_name
from majicflux.batch.process import WorkerLost, WorkerProcess, _environment
from majicflux.batch.rows import read_rows
from majicflux.batch.worker import _own_card, answer
from majicflux.cli import main
from majicflux.engine.errors import OutOfVramError
from majicflux.host import standalone
from majicflux.host.image_nodes import image_nodes
from majicflux.loaders.demo_models import DIT_FILE
from majicflux.loaders.weight_cache import LOCK
from majicflux.messages import MajicFluxError
from majicflux.nodes import NODES

API = Path(__file__).parents[2] / "workflows" / "api"
SMALL = {"width": 32, "height": 32, "steps": 1}
Save = Callable[..., Path]


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A small text-to-image graph."""
    nodes = json.loads((API / "text_to_image.json").read_text(encoding="utf-8"))
    nodes["5"]["inputs"] |= SMALL
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(nodes), encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Save:
    """A function that writes a file of rows."""

    def save(text: str, name: str = "rows.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode("utf-8-sig" if name.endswith("csv") else "utf-8"))
        return path

    return save


def jobs_of(rows: Path, graph: Path, repeat: int = 1) -> list[Job]:
    classes = {node.define_schema().node_id: node for node in NODES}
    classes |= image_nodes(rows.parent, rows.parent, {})
    return make_jobs(read_rows(rows), json.loads(graph.read_text()), classes, repeat)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()]


def pictures(folder: Path) -> dict[str, str]:
    """The files beside the manifest, with their SHA-256; none is unfinished."""
    files = [path for path in folder.iterdir() if path.name != NAME]
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in files}


# Rows


def test_csv_jsonl_and_text_give_the_same_rows(rows: Save) -> None:
    csv = rows('id,prompt,5.steps\r\n,"a cat, and\r\na dog",2\r\nb,雪山,\r\n')
    first = {"prompt": "a cat, and\r\na dog", "5.steps": "2"}
    second = {"id": "b", "prompt": "雪山", "5.steps": None}
    jsonl = rows(f"{json.dumps(first)}\n\n{json.dumps(second)}\n", "rows.jsonl")
    assert read_rows(csv) == read_rows(jsonl)
    assert [(row.number, row.id) for row in read_rows(csv)] == [(0, None), (1, "b")]
    assert read_rows(csv)[1].values == {"prompt": "雪山"}
    text = read_rows(rows("a cat\n\n  a dog \n", "prompts.txt"))
    assert [row.values for row in text] == [{"prompt": "a cat"}, {"prompt": "a dog"}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.xlsx", b"", "a.xlsx: rows are read from .csv, .jsonl, .txt files."),
        ("a.txt", b"\n \n", "a.txt has no rows."),
        ("a.csv", b"prompt\n", "a.csv has no rows."),
        ("a.csv", "提示词".encode("gbk"), "a.csv is not in UTF-8"),
        ("a.csv", b"prompt\na,b\n", "line 2, cannot be read: it has more values than the header."),
        ("a.csv", b"a,b,a\n", "line 1, cannot be read: two columns are called a."),
        ("a.csv", b'prompt\n"a\n', "cannot be read: unexpected end of data."),
        ("a.jsonl", b'{}\n{"prompt": \n', "line 2, cannot be read: "),
        ("a.jsonl", b"[1]", "line 1, cannot be read: it is no object in braces."),
        ("gone.csv", None, "gone.csv cannot be opened: No such file or directory."),
    ],
)
def test_rows_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BatchError) as refused:
        read_rows(tmp_path / name)
    assert said in str(refused.value)


def test_seeds_are_a_thousand_apart_unless_given_and_one_apart_when_repeated(
    graph: Path, rows: Save
) -> None:
    table = rows("id,prompt,seed\na,x,\nb,x,7\nc,x,-1\n")
    found = {job.id: job.seed for job in jobs_of(table, graph, repeat=2)}
    assert found == {"a": 0, "a-2": 1, "b": 7, "b-2": 8, "c": 2000, "c-2": 2001}
    job = jobs_of(table, graph)[1]
    assert job.graph(graph.read_text(), {})["5"]["inputs"]["seed"] == 7


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("propmt\na\n", "The column propmt is no input of the graph that can be set. Give id, or "
         "NODE.INPUT with one of 1.file"),
        ("5.pipeline\na\n", "The column 5.pipeline is no input"),
        ("file\na\n", "The column file is no input"),  # of two nodes
        ("id\na\nA\n", "Rows 1 and 2 would both be named A. "),
        ("id\na\na-2\n", "Rows 1 and 2 would both be named a-2. "),
        ("id\n../a\n", "Row 1: the id ../a cannot name a file. "),
        ("id,prompt\n a\tb,x\n", "Row 1: the id a\tb cannot name a file. "),
        ("id\nCon\n", "Row 1: the id Con cannot name a file. "),
        ("id\nlpt9\n", "Row 1: the id lpt9 cannot name a file. "),
        ("id\n.\n", "Row 1: the id . cannot name a file. "),
        ("id\na.\n", "Row 1: the id a. cannot name a file. "),
        (f"id\n{74 * '猫'}\n", f"Row 1: the id {74 * '猫'} cannot name a file. Use at most 55 "),
        (f"id\n{101 * 'a'}\n", f"Row 1: the id {101 * 'a'} cannot name a file. Use at most 100 "),
        ("prompt,5.prompt\n,\nx,y\n", "The columns prompt and 5.prompt are the same input. "),
    ],
)  # fmt: skip
def test_what_is_wrong_with_columns_and_names_is_said_before_anything_is_painted(
    graph: Path, rows: Save, table: str, said: str
) -> None:
    with pytest.raises(BatchError) as refused:
        jobs_of(rows(table), graph, repeat=2)
    assert str(refused.value).startswith(said)


def test_the_longest_names_and_those_like_names_of_devices_can_be_files(
    graph: Path, rows: Save, tmp_path: Path
) -> None:
    ids = [73 * "猫", 55 * "𠀀", 100 * "a", 60 * "猫" + 40 * "a", "console", "com", "con-2"]
    for job in jobs_of(rows("".join(f"{id}\n" for id in ["id", *ids])), graph, repeat=2):
        (tmp_path / latents_name(f"{job.id}-1000000")).touch()


def test_a_key_is_of_all_that_a_picture_comes_from(
    graph: Path, rows: Save, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standalone, "models_folder", models)
    nodes = json.loads((API / "image_to_image.json").read_text(encoding="utf-8"))
    graph.write_text(json.dumps(nodes))
    Image.new("RGB", (32, 32)).save(tmp_path / "example.png")

    def key(table: str = "id\na\n") -> str:
        return jobs_of(rows(table), graph)[0].key

    first = key()
    assert key() == first
    assert key("id\nb\n") != first, "its picture has another name"
    assert key("id,seed\na,1\n") != first
    Image.new("RGB", (48, 32)).save(tmp_path / "example.png")
    assert key() != first
    nodes["6"]["inputs"]["steps"] = 3
    graph.write_text(json.dumps(nodes))
    Image.new("RGB", (32, 32)).save(tmp_path / "example.png")
    assert key() != first


def test_files_that_all_rows_share_are_looked_for_once(
    graph: Path, rows: Save, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of the time of 10,000 rows went there."""
    asked: list[str] = []

    def fingerprint(node: dict, classes: dict) -> object:
        asked.append(node["class_type"])
        return own(node, classes)

    own = jobs.fingerprint
    monkeypatch.setattr(jobs, "fingerprint", fingerprint)
    shutil.copy(API / "image_to_image.json", graph)
    for name in "abc":
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    jobs_of(rows("5.image\na.png\nb.png\nc.png\n"), graph)
    assert asked.count("LoadImage") == 3
    assert asked.count("MajicFluxDiTLoader") == asked.count("MajicFluxVAELoader") == 1


def test_a_picture_that_is_missing_is_the_problem_of_its_row(
    graph: Path, rows: Save, tmp_path: Path
) -> None:
    graph.write_text((API / "image_to_image.json").read_text(encoding="utf-8"))
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    there, gone = jobs_of(rows("5.image\na.png\ngone.png\n"), graph)
    assert there.problem is None
    assert gone.problem == f"There is no picture {tmp_path / 'gone.png'}."


# Painting

TABLE = """id,prompt,width,solver,steps
a,a cat,,,
b,a dog,48,,2
c,a cat,,nope,
d,a cat,,,many
e,,,,
f,x,,,
"""
GOOD = ["a.png", "b.png", "e.png", "f.png"]


@pytest.fixture(autouse=True)
def folder_of_models(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standalone, "models_folder", models)


@pytest.fixture(scope="module")
def by_one_worker(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that one worker has painted TABLE into."""
    folder = tmp_path_factory.mktemp("by-one")
    nodes = json.loads((API / "text_to_image.json").read_text(encoding="utf-8"))
    nodes["5"]["inputs"] |= SMALL
    (folder / "graph.json").write_text(json.dumps(nodes))
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
        start_new_session=True,  # as a terminal starts it
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


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerProcess]:
    """One whose process answers that it is there, and no more."""
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nread setup; echo \'{"card": "CPU"}\'; read job\n')
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    worker = WorkerProcess({}, None)
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


def test_no_translation_goes_on_when_a_batch_has_stopped() -> None:
    """The interpreter would end below it."""
    begun, ended = Event(), Event()

    def translate(prompt: str) -> str:
        begun.set()
        time.sleep(0.05)
        ended.set()
        return "a cat"

    english = English(translate)
    graph = {"5": {"class_type": "MajicFluxSample", "inputs": {"prompt": "猫"}}}
    english.go_ahead([graph] * 100)
    begun.wait()
    english.stop()
    assert ended.is_set()


def test_a_prompt_is_translated_once_though_two_wait_for_it() -> None:
    asked: list[str] = []

    def translate(prompt: str) -> str:
        asked.append(prompt)
        time.sleep(0.02)
        return "a cat"

    english = English(translate)
    threads = [Thread(target=english._english_of, args=("猫",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == ["猫"]
    english.stop()
    with pytest.raises(WorkerLost):
        english._english_of("雨夜")
    assert asked == ["猫"]


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


def test_chinese_prompts_are_translated_for_the_workers(
    graph: Path, rows: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    english = {"雨夜": "rainy night", "猫": "a cat"}
    asked: list[str] = []
    painted: dict[str, str] = {}

    def translate(prompt: str) -> str:
        asked.append(prompt)
        if prompt not in english:
            raise MajicFluxError("The prompt is too long.")
        return english[prompt]

    def paint(worker: WorkerProcess, id: str, graph: dict, coming: object) -> dict:
        painted[id] = graph["5"]["inputs"]["prompt"]
        return {"seconds": 0.1}

    monkeypatch.setattr(driver, "translator_of", lambda model: translate)
    monkeypatch.setattr(WorkerProcess, "start", lambda _: True)
    monkeypatch.setattr(WorkerProcess, "paint", paint)
    table = rows("id,prompt\na,雨夜\nb,猫\nc,a (dog:1.2)\nd,雨夜\ne,很长\n")
    given = (table, graph, tmp_path / "out")
    batch = Batch(*given, workers=1, translate="opus-mt-zh-en")
    problems = {record["id"]: record["error"] for record in batch}
    assert painted == {"a": "rainy night", "b": "a cat", "c": "a (dog:1.2)", "d": "rainy night"}
    assert problems == dict.fromkeys("abcd") | {"e": "The prompt is too long."}
    assert asked.count("雨夜") == asked.count("猫") == 1
    again = Batch(*given, workers=1, translate="opus-mt-zh-en")
    again._manifest.close()
    assert again.waiting == []
    untranslated = Batch(*given, workers=1)
    untranslated._manifest.close()
    assert len(untranslated.waiting) == 5


def test_a_translator_that_is_not_there_is_told(
    graph: Path, rows: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--graph", str(graph), "--out", str(tmp_path / "out"), "--translate"]
    assert main(["batch", str(rows("a cat\n", "rows.txt")), *options]) == 1
    assert "No translator opus-mt-zh-en is in models/translation." in capsys.readouterr().err


# What cannot go on


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
    worker = WorkerProcess({}, 1)
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
    assert _environment(card)["CUDA_VISIBLE_DEVICES"] == seen
