"""Every value of every template, against what a real ComfyUI says of its nodes and of ours."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageDraw, ImageOps

from comfyui_server import Server

API = sorted((Path(__file__).parents[2] / "workflows" / "api").glob("*.json"))
STANDS_IN = {"majicflus_v1.safetensors": "majicflus_v134.safetensors"}  # the one that is there


def problem(value: Any, kind: Any, options: dict[str, Any]) -> str | None:
    """Why a widget of this kind cannot hold the value; None when it can."""
    choices = kind if isinstance(kind, list) else options.get("options")
    if choices is not None:
        return None if value in choices else f"is none of {choices}"
    types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
    if kind not in types:
        return f"a {kind} needs a link"
    if not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        return f"is no {kind}"
    low, high = options.get("min"), options.get("max")
    inside = (low is None or value >= low) and (high is None or value <= high)
    return None if inside else f"is not in {low} to {high}"


@pytest.mark.parametrize("path", API, ids=lambda path: path.stem)
def test_every_value_is_one_that_its_widget_can_hold(server: Server, path: Path) -> None:
    nodes = server.get("/object_info")
    graph = json.loads(path.read_text(encoding="utf-8"))
    for node in graph.values():
        name, given = node["class_type"], node["inputs"]
        info = nodes[name]["input"]
        assert info["required"].keys() <= given.keys(), name
        sockets = {**info["required"], **info.get("optional", {})}
        for key, value in given.items():
            kind, options = (*sockets[key], {})[:2]
            if isinstance(value, list):
                source, output = value
                assert nodes[graph[source]["class_type"]]["output"][output] == kind, (name, key)
            elif (name, key) != ("MajicFluxTranslate", "model"):  # it passes through without one
                value = STANDS_IN.get(value, value)
                assert problem(value, kind, options) is None, (name, key, value)


SMALL = {"width": 64, "height": 64, "steps": 2, "left": 32, "right": 16, "top": 0, "bottom": 0}
TAKES_A_PICTURE = {  # and the size of what comes out
    "kontext_edit": (64, 64),
    "fill_inpainting": (64, 64),
    "fill_outpainting": (112, 64),
    "redux_variation": (64, 64),
    "depth_control_lora": (64, 64),
    "controlnet_union_canny": (64, 64),
}


@pytest.mark.parametrize("name", TAKES_A_PICTURE)
def test_the_picture_that_a_template_takes_is_seen(server: Server, name: str) -> None:
    graph = json.loads((API[0].parent / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        node["inputs"] |= {key: SMALL[key] for key in node["inputs"].keys() & SMALL.keys()}
    (loader,) = (n for n, node in graph.items() if node["class_type"] == "LoadImage")

    def painted(file: str) -> Image.Image:
        graph[loader]["inputs"]["image"] = file
        run = server.run(graph)
        assert not run.of("execution_error")
        (path,) = server.outputs(run)
        return Image.open(path).convert("RGB")

    folder = server.base / "input"
    with Image.open(folder / "example.png") as example:  # with the mask in its alpha
        mirrored = ImageOps.mirror(example)
    ImageDraw.Draw(mirrored).rectangle((8, 40, 40, 60), fill=(0, 0, 0, 255))  # it has edges now
    mirrored.save(folder / "mirrored.png")
    found, other = painted("example.png"), painted("mirrored.png")
    assert found.size == TAKES_A_PICTURE[name]
    assert ImageChops.difference(found, other).getbbox()


@pytest.mark.parametrize(("value", "kind", "options"), [
    ("c", ["a", "b"], {}), ("c", "COMBO", {"options": ["a"]}), (1.5, "INT", {}),
    (True, "INT", {}), (0, "INT", {"min": 1}), (9, "FLOAT", {"max": 8}), ("x", "IMAGE", {}),
])  # fmt: skip
def test_a_wrong_value_is_seen(value: Any, kind: Any, options: dict[str, Any]) -> None:
    assert problem(value, kind, options)
