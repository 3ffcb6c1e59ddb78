"""Every text of the canvas in every language, against the node definitions."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from majicflux.downloads import model_folders
from majicflux.host import current as host
from majicflux.nodes import NODES

LOCALES = Path(__file__).parents[2] / "locales"
TRANSLATED = ["ja", "zh", "zh-TW"]
CONTROL = "control_after_generate"  # ComfyUI's own widget below a seed
FILES = ["main.json", "nodeDefs.json"]
SCHEMAS = [node.define_schema() for node in NODES]
HAN = re.compile("[\u4e00-\u9fff]")
KANA = re.compile("[\u3040-\u30ff]")
SAME_EVERYWHERE = {"DiT", "VAE", "CFG", "Latent", "MajicFlux"}
# What must not be lost in a translation: figures, and what is typed or chosen as it stands.
FIGURE = re.compile(r"\d+(?:\.\d+)?")
LITERAL = re.compile(r"[\w./-]*\w[_/]\w[\w./-]*")


def english() -> Any:
    spec = importlib.util.spec_from_file_location("english", LOCALES / "english.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.texts()


def read(language: str, file: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / file).read_text(encoding="utf-8"))


def leaves(texts: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(texts, dict) and texts:
        for key, value in texts.items():
            yield from leaves(value, *path, key)
    else:
        yield path, texts


def test_english_is_what_the_nodes_say() -> None:
    hint = "run python dev.py locales, then bring the other languages up to date"
    assert {file: read("en", file) for file in FILES} == english(), hint


def test_english_has_every_node_input_and_output() -> None:
    found = english()["nodeDefs.json"]
    assert found.keys() == {schema.node_id for schema in SCHEMAS}
    for schema in SCHEMAS:
        node = found[schema.node_id]
        inputs = [key for key in node.get("inputs", {}) if key != CONTROL]
        assert inputs == [socket.id for socket in schema.inputs]
        assert list(node.get("outputs", {})) == [str(i) for i in range(len(schema.outputs))]
        for socket in schema.outputs:  # ComfyUI translates the name only where it differs
            assert socket.options["display_name"] != socket.io_type
    for _, text in leaves(found):
        assert text
    for key in [*found, *(i.id for schema in SCHEMAS for i in schema.inputs)]:
        assert re.fullmatch(r"\w+", key), "a dot would have to be escaped"


def test_every_choice_has_a_label_but_the_names_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "model_names", lambda category: ["model.safetensors"])
    folders = {"model.safetensors": Path()}
    monkeypatch.setattr(model_folders, "whole_folders", lambda category: folders)
    for node in NODES:
        schema = node.define_schema()
        texts = english()["nodeDefs.json"][schema.node_id].get("inputs", {})
        labels = {name: list(text["options"]) for name, text in texts.items() if "options" in text}
        choices = {
            socket.id: socket.options["options"]
            for socket in schema.inputs
            if socket.io_type == "COMBO" and socket.options["options"] != ["model.safetensors"]
        }
        switches = [socket.id for socket in schema.inputs if socket.io_type == "BOOLEAN"]
        choices |= {name: ["true", "false"] for name in switches}
        if any(socket.options.get(CONTROL) for socket in schema.inputs):
            choices[CONTROL] = ["fixed", "increment", "decrement", "randomize"]
        assert labels == choices


@pytest.mark.parametrize("language", TRANSLATED)
@pytest.mark.parametrize("file", FILES)
def test_a_language_has_these_texts_and_no_others(language: str, file: str) -> None:
    ours, theirs = dict(leaves(read(language, file))), dict(leaves(read("en", file)))
    assert sorted(ours) == sorted(theirs)
    assert list(read(language, file)) == list(read("en", file)), "in the same order"
    for path, text in ours.items():
        assert isinstance(text, str), path
        assert text.strip(), path
        # vue-i18n would read them as a variable, a link or a plural.
        assert not set("{}@|") & set(text), path
        if text not in SAME_EVERYWHERE:
            assert HAN.search(text) or (language == "ja" and KANA.search(text)), path


@pytest.mark.parametrize("language", TRANSLATED)
def test_no_figure_and_no_name_is_lost_in_translation(language: str) -> None:
    ours = dict(leaves(read(language, "nodeDefs.json")))
    options = {
        (schema.node_id, socket.id): socket.options["options"]
        for schema in SCHEMAS
        for socket in schema.inputs
        if "options" in socket.options
    }
    for path, text in leaves(read("en", "nodeDefs.json")):
        if path[-1] == "name":  # of an input: an identifier
            continue
        kept = {*FIGURE.findall(text), *LITERAL.findall(text)}
        if path[1] == "inputs":
            kept |= {o for o in options.get((path[0], path[2]), ()) if f"{o}:" in text}
        lost = {word for word in kept if word.strip("./") not in ours[path]}
        assert not lost, path


def test_there_are_no_other_languages_and_files() -> None:
    found = {path.relative_to(LOCALES).as_posix() for path in LOCALES.rglob("*.json")}
    files = {f"{language}/{file}" for language in ["en", *TRANSLATED] for file in FILES}
    assert found == files | {f"{language}/messages.json" for language in TRANSLATED}
