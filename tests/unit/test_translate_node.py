"""The node that translates, `run --translate`, and `download translator`."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MarianConfig, MarianMTModel
from translators import write_marian

import majicflux
from majicflux import cli
from majicflux.commands.demo import DEMO_WORKFLOW
from majicflux.downloads import download
from majicflux.downloads.catalogue import (
    HUGGINGFACE,
    MODELSCOPE,
    OPUS_MT_ZH_EN,
    TRANSLATION,
    TRANSLATOR,
)
from majicflux.engine.errors import TooManyCharactersError
from majicflux.engine.flux.prompts import MOST_CHARACTERS
from majicflux.host import standalone
from majicflux.loaders.safetensors_file import ModelFileError
from majicflux.nodes import translate as node
from majicflux.nodes.translate import Translate

CHINESE, ENGLISH = "雨夜，一辆(红色:1.3)的汽车", "Rainy night, A (red:1.3) car"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with a translator."""
    models = tmp_path_factory.mktemp("models")
    write_marian(models / TRANSLATION / TRANSLATOR)
    return models


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    node._translator.cache_clear()


@pytest.fixture
def with_translator(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(standalone, "models_folder", made)
    return made


@pytest.fixture
def without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(standalone, "models_folder", tmp_path)
    return tmp_path


def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(node.host, "node_text", lambda given: lines.extend(given))
    return lines


def english(prompt: str, model: str = TRANSLATOR) -> str:
    return Translate.execute(prompt, model).args[0]


def test_a_prompt_becomes_english_and_is_shown(with_translator: Path, monkeypatch) -> None:
    lines = shown(monkeypatch)
    assert english(CHINESE) == ENGLISH == lines[0]
    assert lines[1].startswith(f"translated by {TRANSLATOR}, ")


def test_the_model_is_read_once_until_a_file_changes(with_translator: Path, monkeypatch) -> None:
    real, read = MarianMTModel.from_pretrained, []

    def from_pretrained(*given: Any, **named: Any) -> Any:
        read.append(given)
        return real(*given, **named)

    monkeypatch.setattr(MarianMTModel, "from_pretrained", from_pretrained)
    before = Translate.fingerprint_inputs(model=TRANSLATOR)
    assert [english(prompt) for prompt in ("雨夜", "下雪")] == ["Rainy night", "falling snow"]
    assert len(read) == 1
    assert Translate.fingerprint_inputs(model=TRANSLATOR) == before
    (with_translator / TRANSLATION / TRANSLATOR / "note.txt").write_text("new")
    assert Translate.fingerprint_inputs(model=TRANSLATOR) != before
    assert english("雨夜") == "Rainy night"
    assert len(read) == 2


def test_english_needs_no_model(without_one: Path, monkeypatch, caplog) -> None:
    lines = shown(monkeypatch)
    prompt = " a cat,\r\n(b:1.2) it's "
    assert english(prompt, "") == prompt == lines[0]
    assert english("a cat，（b：1.2）", "") == "a cat, (b:1.2)"
    assert not caplog.text


@pytest.mark.parametrize("model", ["", TRANSLATOR, "../opus", "Qwen3-0.6B"])
def test_without_a_model_the_text_passes_and_it_is_said(
    without_one: Path, monkeypatch, caplog: pytest.LogCaptureFixture, model: str
) -> None:
    lines = shown(monkeypatch)
    assert Translate.validate_inputs(model) is True
    with caplog.at_level(logging.WARNING):
        assert english(CHINESE, model) == CHINESE
    said = "\n".join(lines)
    assert "the picture will follow it poorly" in said
    pack = Path(majicflux.__file__).parent
    assert f'python "{pack}" download translator --models "{without_one}"' in said
    assert " ".join(lines) in caplog.text


def test_the_small_translator_is_chosen_and_folders_are_found(without_one: Path) -> None:
    for name in ("Qwen/Qwen3-0.6B", "a-model", TRANSLATOR, ".trash", "empty"):
        (without_one / TRANSLATION / name).mkdir(parents=True)
        if name != "empty":
            (without_one / TRANSLATION / name / "config.json").write_text("{}")
    _, model = Translate.define_schema().inputs
    assert model.options["options"] == [str(Path("Qwen/Qwen3-0.6B")), "a-model", TRANSLATOR]
    assert model.options["default"] == TRANSLATOR
    assert "does not say which model" in Translate.validate_inputs("a-model")
    with pytest.raises(ModelFileError, match="does not say which model"):
        english("猫", "a-model")


def test_a_prompt_that_is_too_long_is_refused(with_translator: Path) -> None:
    with pytest.raises(TooManyCharactersError):
        english("猫" * (MOST_CHARACTERS + 1))


@pytest.fixture
def graph(tmp_path: Path, models: Path, made: Path) -> Path:
    """The template's graph with prompts in Chinese, and models for it with the translator."""
    shutil.copytree(made / TRANSLATION, tmp_path / "models" / TRANSLATION)
    for folder in models.iterdir():
        (tmp_path / "models" / folder.name).symlink_to(folder)
    content = json.loads(DEMO_WORKFLOW.read_text(encoding="utf-8"))
    (sample,) = [n for n in content.values() if n["class_type"] == "MajicFluxSample"]
    sample["inputs"] |= {"width": 32, "height": 32, "steps": 1, "seed": 1}
    sample["inputs"] |= {"prompt": CHINESE, "negative_prompt": "下雪", "cfg": 2.0}
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def run(graph: Path, *arguments: str) -> int:
    place = graph.parent
    return cli.main(
        ["run", str(graph), "--models", str(place / "models"), "--output", str(place), *arguments]
    )


def test_a_graph_runs_with_its_prompts_in_english(graph: Path, capsys) -> None:
    from PIL import Image

    assert run(graph, "--translate", "--set", "negative_prompt=雨夜") == 0
    *told, picture = capsys.readouterr().out.splitlines()
    assert told == [ENGLISH, "Rainy night"]
    prompt = json.loads(Image.open(picture).info["prompt"])
    (sample,) = [n["inputs"] for n in prompt.values() if n["class_type"] == "MajicFluxSample"]
    assert (sample["prompt"], sample["negative_prompt"]) == (ENGLISH, "Rainy night")


def test_a_graph_is_not_run_without_the_translator(graph: Path, capsys) -> None:
    assert run(graph, "--translate", "Qwen3-0.6B") == 1
    assert "No translator Qwen3-0.6B is in models/translation" in capsys.readouterr().err


@pytest.mark.parametrize("hub", [MODELSCOPE, HUGGINGFACE])
def test_the_translator_is_downloaded_and_converted(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, hub: str
) -> None:
    source = made / TRANSLATION / TRANSLATOR
    torch.save(MarianMTModel.from_pretrained(source).state_dict(), tmp_path / "pytorch_model.bin")

    def fetch(place: Any, folder: Path, *_: int) -> Path:
        here = tmp_path if place.path.endswith(".bin") else source
        return Path(shutil.copy(here / place.path, folder))

    monkeypatch.setattr(download, "fetch", fetch)
    for file in OPUS_MT_ZH_EN:  # the real ones are larger
        monkeypatch.setitem(file.__dict__, "least_size", 2)
    models = tmp_path / "models"
    assert cli.main(["download", "translator", "--from", hub, "--models", str(models)]) == 0
    folder = models / TRANSLATION / TRANSLATOR
    assert str(folder / "model.safetensors") in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(standalone, "models_folder", models)
    assert english(CHINESE) == ENGLISH
    monkeypatch.setattr(download, "fetch", lambda *_: pytest.fail("all of it is there"))
    assert cli.main(["download", "translator", "--models", str(models)]) == 0


def test_a_page_in_place_of_a_file_is_not_taken(tmp_path: Path, monkeypatch) -> None:
    for content, said in [
        (b"<html>" + b" " * 10**5, "a web page or a pointer"),
        (b"version https://git-lfs.github.com/spec/v1", "a web page or a pointer"),
        (b'"text"', "no JSON object"),
    ]:

        def fetch(place: Any, folder: Path, *_: int, content: bytes = content) -> Path:
            path = folder / place.path
            path.write_bytes(content)
            return path

        monkeypatch.setattr(download, "fetch", fetch)
        with pytest.raises(download.DownloadError, match=said):
            download.download(OPUS_MT_ZH_EN[0], MODELSCOPE, tmp_path)
        assert not (tmp_path / TRANSLATION / TRANSLATOR / "config.json").exists()


def test_the_weights_are_at_least_those_of_the_published_sizes() -> None:
    with torch.device("meta"):
        model = MarianMTModel(MarianConfig(
            vocab_size=65001, d_model=512, encoder_layers=6, decoder_layers=6,
            encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=2048,
            decoder_ffn_dim=2048, max_position_embeddings=512, pad_token_id=65000,
        ))  # fmt: skip
    learnt = 4 * sum(p.numel() for n, p in model.named_parameters() if "positions" not in n)
    assert 0 <= learnt - OPUS_MT_ZH_EN[-1].least_size < 1e6
