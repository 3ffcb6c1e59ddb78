"""Chinese prompts of a batch, translated before the workers get them."""

import time
from pathlib import Path
from threading import Event, Thread

import pytest
from batches import Save

from majicflux.batch import Batch, driver
from majicflux.batch.english import English
from majicflux.batch.process import WorkerLost, WorkerProcess
from majicflux.cli import main
from majicflux.messages import MajicFluxError


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
