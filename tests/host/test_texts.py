"""Translations and help pages as a real ComfyUI serves them to its frontend."""

import json
import urllib.request
from pathlib import Path

import pytest

from comfyui_server import Server

ROOT = Path(__file__).parents[2]
LANGUAGES = sorted(path.parent.name for path in (ROOT / "locales").glob("*/main.json"))


def ours(server: Server) -> dict[str, dict]:
    nodes = server.get("/object_info")
    return {name: info for name, info in nodes.items() if name.startswith("MajicFlux")}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_translations_are_served(server: Server, language: str) -> None:
    folder, served = ROOT / "locales" / language, server.get("/i18n")[language]
    for key, file in (("nodeDefs", "nodeDefs.json"), (None, "main.json")):
        expected = json.loads((folder / file).read_text(encoding="utf-8"))
        found = served[key] if key else served
        assert expected.items() <= found.items()


def test_every_socket_that_comfyui_shows_has_a_chinese_text(server: Server) -> None:
    texts = server.get("/i18n")["zh"]
    for name, info in ours(server).items():
        node = texts["nodeDefs"][name]
        shown = [socket for sockets in info["input_order"].values() for socket in sockets]
        for socket in shown:
            if socket not in info["input"].get("hidden", {}):
                assert node["inputs"][socket]["tooltip"]
        assert len(node["outputs"]) == len(info["output"])
        for output, (kind, output_name) in enumerate(
            zip(info["output"], info["output_name"], strict=True)
        ):
            assert kind != output_name, "or the type's name is shown instead of ours"
            assert node["outputs"][str(output)]["name"]
        for part in info["category"].split("/"):
            assert texts["nodeCategories"][part]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_help_pages_are_where_the_frontend_looks(server: Server, language: str) -> None:
    for name, info in ours(server).items():
        parent, folder = info["python_module"].split(".")
        assert parent == "custom_nodes"
        url = f"http://{server.address}/extensions/{folder}/docs/{name}/{language}.md"
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert "html" not in answer.headers["Content-Type"]  # or it is taken for no page
            page = ROOT / "web" / "docs" / name / f"{language}.md"
            assert answer.read() == page.read_bytes()
