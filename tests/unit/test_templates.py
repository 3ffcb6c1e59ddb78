"""The shipped workflows, in both their forms."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from graphs import node_classes

from majicflux.host import standalone
from majicflux.host.canvas import to_graph, with_values
from majicflux.host.graph import set_inputs
from majicflux.nodes.sample import CUSTOM
from majicflux.workflows import build

FOLDERS = (
    "diffusion_models", "loras", "text_encoders", "vae", "style_models", "clip_vision",
    "controlnet",
)  # fmt: skip
WORKFLOWS = Path(__file__).parents[2] / "workflows"
API_FILES = sorted((WORKFLOWS / "api").glob("*.json"))
TEXT_TO_IMAGE = WORKFLOWS / "api" / "text_to_image.json"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", API_FILES, ids=lambda path: path.stem)
def test_canvas_and_api_form_are_the_same_graph(path: Path) -> None:
    graph = to_graph(read(WORKFLOWS / path.name), build.schemas())
    for node in graph.values():
        if "size" in node["inputs"]:  # a preset, of which the graph has the numbers
            width, height = (node["inputs"][side] for side in ("width", "height"))
            assert node["inputs"]["size"].startswith(f"{width}x{height} (")
            node["inputs"]["size"] = CUSTOM
    assert graph == read(path)


def test_the_templates_are_what_the_node_definitions_give() -> None:
    built = build.files()
    assert built.keys() == {path.resolve() for path in (*WORKFLOWS.glob("*.json"), *API_FILES)}
    for path, text in built.items():
        assert path.read_text(encoding="utf-8") == text, "run `python dev.py templates`"


def test_a_template_that_does_not_fit_the_nodes_is_not_built() -> None:
    template = build.Template("test")
    vae = template.add("MajicFluxVAELoader", 0, file="ae.safetensors")
    with pytest.raises(ValueError, match="MajicFluxVAELoader has no files"):
        template.add("MajicFluxVAELoader", 0, files="ae.safetensors")
    with pytest.raises(ValueError, match="is MAJICFLUX_VAE, not MAJICFLUX_DIT"):
        template.add("MajicFluxPipeline", 1, dit=(vae, 0))


def test_every_template_has_its_preview() -> None:
    for path in API_FILES:
        preview = WORKFLOWS / f"{path.stem}.jpg"
        assert 0 < preview.stat().st_size < 150_000


def test_the_documented_graph_is_the_documented_one() -> None:
    nodes = {node["class_type"]: node["inputs"] for node in read(TEXT_TO_IMAGE).values()}
    assert nodes["MajicFluxDiTLoader"]["file"] == "majicflus_v1.safetensors"
    assert nodes["MajicFluxTextEncoders"]["clip_l"] == "clip_l.safetensors"
    assert nodes["MajicFluxTextEncoders"]["t5"] == "t5xxl_fp16.safetensors"
    assert nodes["MajicFluxVAELoader"]["file"] == "ae.safetensors"
    sample = nodes["MajicFluxSample"]
    assert sample["prompt"].startswith("A futuristic city street in cyberpunk style, a rainy night")
    assert [sample[n] for n in ("seed", "steps", "width", "height")] == [0, 20, 1024, 1024]
    nodes = read(WORKFLOWS / TEXT_TO_IMAGE.name)["nodes"]
    (note,) = (node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    assert "\n\n提示词请用英文，模型读不了中文。原文：赛博朋克风格的未来城市街道,雨夜," in note


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_a_template_begins_with_a_seed_that_changes_and_prompts_that_t5_reads(path: Path) -> None:
    """The first picture is of seed 0; Run again paints another one."""
    for node in read(path)["nodes"]:
        values = node.get("widgets_values") or []
        for seed, after in pairwise(values):
            assert after != "fixed"
            if after == "randomize":
                assert seed == 0
        if node["type"] not in ("MarkdownNote", "MajicFluxTranslate"):
            assert all(value.isascii() for value in values if isinstance(value, str))
    assert '"randomize"' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", API_FILES, ids=lambda path: path.stem)
def test_missing_models_can_be_downloaded_from_the_canvas(path: Path) -> None:
    """Each file choice has a model entry of its name, from a host that ComfyUI downloads from."""
    canvas = read(WORKFLOWS / path.name)
    wanted, offered = set(), set()
    for node in canvas["nodes"]:
        values = node["widgets_values"] if node["type"] != "MarkdownNote" else []
        wanted |= {v for v in values if str(v).endswith(".safetensors")}
        for model in node["properties"].get("models", []):
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith(".safetensors")
            assert model["directory"] in FOLDERS
            offered.add(model["name"])
    assert wanted == offered


@pytest.mark.parametrize("path", API_FILES, ids=lambda path: path.stem)
def test_the_app_view_shows_widgets_under_names_of_their_own_and_what_is_saved(path: Path) -> None:
    canvas, graph = read(WORKFLOWS / path.name), read(path)
    nodes = {node["id"]: node for node in canvas["nodes"]}
    app, labels = canvas["extra"]["linearData"], []
    for node, name in app["inputs"]:
        if name == "majicflux_text":  # what the node says
            assert nodes[node]["type"] == "MajicFluxTranslate"
            continue
        assert not isinstance(graph[str(node)]["inputs"][name], list)
        (socket,) = (i for i in nodes[node]["inputs"] if i["name"] == name)
        labels.append(socket.get("label", name))
    assert len(labels) == len(set(labels)) >= 2
    assert {nodes[node]["type"] for node in app["outputs"]} == {"SaveImage"}
    assert not canvas["extra"]["linearMode"]


def test_changed_values_reach_the_canvas_form(
    models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(standalone, "models_folder", models)
    classes = node_classes(tmp_path)
    schemas = {n: c.define_schema() for n, c in classes.items()}
    changed = read(TEXT_TO_IMAGE)
    set_inputs(changed, ["seed=42", "width=512"], classes)
    canvas = with_values(read(WORKFLOWS / "text_to_image.json"), changed, schemas)
    assert to_graph(canvas, schemas) == changed
