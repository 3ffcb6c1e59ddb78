"""The rows of a batch: how they are read, which jobs they become, and what is wrong with them."""

import json
import shutil
from pathlib import Path

import pytest
from batches import API, Save
from PIL import Image

from majicflux.batch import BatchError, jobs
from majicflux.batch.jobs import Job, make_jobs
from majicflux.batch.pictures import latents_name
from majicflux.batch.rows import read_rows
from majicflux.host import standalone
from majicflux.host.image_nodes import image_nodes
from majicflux.nodes import NODES


def jobs_of(rows: Path, graph: Path, repeat: int = 1) -> list[Job]:
    classes = {node.define_schema().node_id: node for node in NODES}
    classes |= image_nodes(rows.parent, rows.parent, {})
    return make_jobs(read_rows(rows), json.loads(graph.read_text()), classes, repeat)


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
