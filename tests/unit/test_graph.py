"""The runner of API graphs, and the two forms of the shipped workflows."""

import copy
import json
from pathlib import Path

import pytest
import torch

from majicflux.host import standalone
from majicflux.host.canvas import to_graph, with_values
from majicflux.host.graph import GraphError, run_graph, set_inputs
from majicflux.host.image_nodes import image_nodes
from majicflux.host.schema import ComfyNode, Schema, io
from majicflux.nodes import NODES
from majicflux.nodes.sample import CUSTOM
from majicflux.workflows import build

WORKFLOWS = Path(__file__).parents[2] / "workflows"
API_FILES = sorted((WORKFLOWS / "api").glob("*.json"))
TEXT_TO_IMAGE = WORKFLOWS / "api" / "1_text_to_image.json"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def node_classes(folder: Path) -> dict[str, type[ComfyNode]]:
    own = {node.define_schema().node_id: node for node in NODES}
    return own | image_nodes(folder, folder, {"prompt": {}})


class Constant(ComfyNode):
    runs = 0

    @classmethod
    def define_schema(cls) -> Schema:
        value = io.Int.Input("value", min=0, max=9)
        return Schema("Constant", "constant", "test", [value], [io.Int.Output("out")])

    @classmethod
    def execute(cls, value: int):
        Constant.runs += 1
        return io.NodeOutput(value)

    @classmethod
    def validate_inputs(cls, value: int) -> bool | str:
        return "seven is not liked" if value == 7 else True


class Add(ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        inputs = [io.Int.Input("a"), io.Int.Input("b"), io.Int.Input("c", optional=True)]
        return Schema("Add", "add", "test", inputs, [io.Int.Output("out")], is_output_node=True)

    @classmethod
    def execute(cls, a: int, b: int, c: int = 0):
        return io.NodeOutput(a + b + c, ui=a + b + c)


class Choice(ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        chosen = io.Combo.Input("chosen", options=["euler", "heun"])
        return Schema("Choice", "choice", "test", [chosen], is_output_node=True)

    @classmethod
    def execute(cls, chosen: str):
        return io.NodeOutput(ui=chosen)


CLASSES = {
    "Choice": Choice,
    "Constant": Constant,
    "Add": Add,
    "SaveImage": image_nodes(Path(), Path(), {})["SaveImage"],
}


def graph(**changes) -> dict:
    result = {
        "1": {"class_type": "Constant", "inputs": {"value": 3}},
        "2": {"class_type": "Add", "inputs": {"a": ["1", 0], "b": ["1", 0]}},
    }
    return {**result, **changes}


def test_each_node_runs_once_and_feeds_the_others() -> None:
    Constant.runs = 0
    assert run_graph(graph(), CLASSES) == [6]
    assert Constant.runs == 1


def test_numbers_may_be_text_as_in_comfyui() -> None:
    node = {"class_type": "Add", "inputs": {"a": "4", "b": 1, "c": 2}}
    assert run_graph({"1": node}, CLASSES) == [7]


def test_one_of_several_choices_is_taken() -> None:
    node = {"class_type": "Choice", "inputs": {"chosen": "heun"}}
    assert run_graph({"1": node}, CLASSES) == ["heun"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (
            {"1": {"class_type": "Choice", "inputs": {"chosen": "dpm"}}},
            "Node 1 (choice), chosen must be one of: euler, heun; not dpm.",
        ),
        ([], "not an API-format workflow"),
        ({"nodes": [], "links": []}, "Export (API)"),
        (graph(**{"3": {"class_type": "KSampler", "inputs": {}}}), "runs in ComfyUI only"),
        (graph(**{"1": {"class_type": "Constant", "inputs": {"value": 10}}}), "must be 0 to 9"),
        (graph(**{"1": {"class_type": "Constant", "inputs": {"value": "x"}}}), "must be a number"),
        (graph(**{"1": {"class_type": "Constant", "inputs": {"value": 7}}}), "seven is not liked"),
        (graph(**{"1": {"class_type": "Constant", "inputs": {}}}), "lacks the input value"),
        (
            graph(**{"1": {"class_type": "Constant", "inputs": {"value": 1, "x": 1}}}),
            "has no input x",
        ),
        (
            graph(**{"2": {"class_type": "Add", "inputs": {"a": ["9", 0], "b": 1}}}),
            "['9', 0], which is not there",
        ),
        (
            graph(**{"2": {"class_type": "Add", "inputs": {"a": ["1", 1], "b": 1}}}),
            "['1', 1], which is not there",
        ),
        (
            graph(**{"3": {"class_type": "SaveImage", "inputs": {
                "images": ["1", 0], "filename_prefix": "x"}}}),
            "takes IMAGE, but is linked to INT",
        ),
        (
            graph(**{"2": {"class_type": "Add", "inputs": {"a": ["2", 0], "b": 1}}}),
            "depends on its own output",
        ),
        ({"1": {"class_type": "Constant", "inputs": {"value": 3}}}, "no output node"),
    ],
)  # fmt: skip
def test_unsound_graphs_are_refused_before_anything_runs(bad, said: str) -> None:
    Constant.runs = 0
    with pytest.raises(GraphError) as caught:
        run_graph(copy.deepcopy(bad), CLASSES)
    assert said in str(caught.value)
    assert Constant.runs == 0


def test_inputs_are_set_by_node_or_by_name_alone() -> None:
    changed = graph()
    set_inputs(changed, ["1.value=5"])
    assert changed["1"]["inputs"]["value"] == 5
    set_inputs(changed, ["value=6"])
    assert changed["1"]["inputs"]["value"] == 6


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("False", False)])
def test_a_switch_is_set_by_its_word(text: str, value: bool) -> None:
    changed = {"1": {"class_type": "Constant", "inputs": {"keep": not value}}}
    set_inputs(changed, [f"keep={text}"])
    assert changed["1"]["inputs"]["keep"] is value
    with pytest.raises(GraphError, match="give true or false"):
        set_inputs(changed, ["keep=maybe"])


@pytest.mark.parametrize("bad", ["value", "nothing=1", "2.value=1", "1.value=many", "2.a=1", "=1"])
def test_settings_that_do_not_fit_are_refused(bad: str) -> None:
    with pytest.raises(GraphError, match="--set"):
        set_inputs(graph(), [bad])


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
    canvas = read(WORKFLOWS / TEXT_TO_IMAGE.name)
    (note,) = (node for node in canvas["nodes"] if node["type"] == "MarkdownNote")
    assert "赛博朋克风格的未来城市街道,雨夜," in note["widgets_values"][0]
    assert [sample[n] for n in ("seed", "steps", "width", "height")] == [0, 20, 1024, 1024]


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
            assert model["directory"] in ("diffusion_models", "text_encoders", "vae")
            offered.add(model["name"])
    assert wanted == offered


@pytest.mark.parametrize("path", API_FILES, ids=lambda path: path.stem)
def test_the_app_view_shows_widgets_under_names_of_their_own_and_what_is_saved(path: Path) -> None:
    canvas, graph = read(WORKFLOWS / path.name), read(path)
    nodes = {node["id"]: node for node in canvas["nodes"]}
    app, labels = canvas["extra"]["linearData"], []
    for node, name in app["inputs"]:
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
    schemas = {n: c.define_schema() for n, c in node_classes(tmp_path).items()}
    changed = read(TEXT_TO_IMAGE)
    set_inputs(changed, ["seed=42", "width=512"])
    canvas = with_values(read(WORKFLOWS / "1_text_to_image.json"), changed, schemas)
    assert to_graph(canvas, schemas) == changed


def test_saved_pictures_are_numbered_and_load_again(tmp_path: Path) -> None:
    nodes = image_nodes(tmp_path, tmp_path, {"prompt": {"1": "猫"}})
    picture = torch.rand(2, 16, 24, 3)
    first = nodes["SaveImage"].execute(images=picture, filename_prefix="sub/cat").ui
    second = nodes["SaveImage"].execute(images=picture[:1], filename_prefix="sub/cat").ui
    assert [p.relative_to(tmp_path).as_posix() for p in first + second] == [
        f"sub/cat_{number:05d}_.png" for number in (1, 2, 3)
    ]
    image, mask = nodes["LoadImage"].execute(image="sub/cat_00001_.png").args
    assert (image[0] - picture[0]).abs().max() <= 1 / 255
    assert not mask.any()
    with pytest.raises(ValueError, match="leads out of the output folder"):
        nodes["SaveImage"].execute(images=picture, filename_prefix="../cat")
