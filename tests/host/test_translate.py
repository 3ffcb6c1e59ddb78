"""The node that translates prompts, in a real server."""

import json
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
from PIL import Image
from translators import write_marian

from comfyui_server import Refused, Server

API = Path(__file__).parents[2] / "workflows" / "api" / "text_to_image_translated.json"
Graph = dict[str, Any]
CHINESE, ENGLISH = "雨夜，一辆(红色:1.3)的汽车", "Rainy night, A (red:1.3) car"


@pytest.fixture
def graph() -> Graph:
    graph = json.loads(API.read_text(encoding="utf-8"))
    graph[key_of(graph, "Sample")]["inputs"].update(width=64, height=48, steps=1, seed=41)
    return graph


@pytest.fixture
def folder(server: Server) -> Iterator[Path]:
    folder = write_marian(server.base / "models" / "translation" / "opus-mt-zh-en")
    yield folder
    rmtree(folder)


def key_of(graph: Graph, kind: str) -> str:
    return next(key for key, node in graph.items() if node["class_type"] == f"MajicFlux{kind}")


def test_a_prompt_is_translated_shown_and_remembered(
    server: Server, folder: Path, graph: Graph
) -> None:
    translate, sample = key_of(graph, "Translate"), key_of(graph, "Sample")
    choices = server.get("/object_info/MajicFluxTranslate")["MajicFluxTranslate"]["input"]
    assert "opus-mt-zh-en" in json.dumps(choices["optional"]["model"])
    graph[translate]["inputs"]["prompt"] = CHINESE
    first = server.run(graph)
    assert not first.of("execution_error")
    assert first.texts[translate].startswith(f"{ENGLISH}\ntranslated by opus-mt-zh-en, ")
    graph[sample]["inputs"]["seed"] += 1
    second = server.run(graph)
    assert translate not in second.executed_nodes
    assert sample in second.executed_nodes
    english = {key: node for key, node in graph.items() if key != translate}
    english[sample]["inputs"]["prompt"] = ENGLISH
    (ours,), (theirs,) = server.outputs(second), server.outputs(server.run(english))
    with Image.open(ours) as one, Image.open(theirs) as other:
        assert one.tobytes() == other.tobytes()


def test_without_a_translator_it_paints_and_says_what_to_fetch(
    server: Server, graph: Graph
) -> None:
    run = server.run(graph)
    assert not run.of("execution_error")
    said = run.texts[key_of(graph, "Translate")]
    assert "the picture will follow it poorly" in said
    models = server.base / "models"
    assert f'majicflux" download translator --models "{models}"' in said


def test_a_bad_folder_is_refused_before_the_run(server: Server, folder: Path, graph: Graph) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(Refused, match="pickle, which can run code"):
        server.run(graph)
