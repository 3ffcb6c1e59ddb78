"""The runner of API graphs, and the two forms of the shipped workflows."""

import copy
import json
import os
import re
import struct
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from majicflux.host import standalone
from majicflux.host.canvas import to_graph, with_values
from majicflux.host.graph import GraphError, run_graph, set_inputs
from majicflux.host.image_nodes import image_nodes
from majicflux.host.schema import ComfyNode, Schema, io
from majicflux.nodes import NODES
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


class Kinds(ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        inputs = [
            io.Boolean.Input("keep", optional=True),
            io.Float.Input("strength", optional=True),
            io.String.Input("text", optional=True),
        ]
        return Schema("Kinds", "kinds", "test", inputs, is_output_node=True)

    @classmethod
    def execute(cls, **inputs):
        return io.NodeOutput(ui=inputs)


CLASSES = {
    "Choice": Choice,
    "Kinds": Kinds,
    "Constant": Constant,
    "Add": Add,
    **image_nodes(Path(), Path(), {}),
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


def test_what_is_fed_the_same_as_in_the_run_before_is_not_run_again() -> None:
    kept: dict = {}
    Constant.runs = 0
    assert [run_graph(graph(), CLASSES, kept) for _ in range(2)] == [[6], [6]]
    assert Constant.runs == 1
    other = {"class_type": "Constant", "inputs": {"value": 4}}
    assert run_graph(graph(**{"1": other}), CLASSES, kept) == [8]
    assert run_graph(graph(), CLASSES, kept) == [6]
    assert Constant.runs == 3
    lone = {"2": {"class_type": "Add", "inputs": {"a": 1, "b": 2}}}
    assert run_graph(lone, CLASSES, kept) == [3]
    assert [*kept] == ["2"]


def test_a_picture_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    classes, kept = node_classes(tmp_path), {}
    load = {"class_type": "LoadImage", "inputs": {"image": "a.png"}}
    save = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8 if colour == "red" else 16), colour).save(tmp_path / "a.png")
        ((path,),) = run_graph({"1": load, "2": save}, classes, kept)
        with Image.open(path) as picture, Image.open(tmp_path / "a.png") as source:
            assert picture.tobytes() == source.tobytes()


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
            "Node 1 (choice), chosen must be one of: euler, heun; not 'dpm'.",
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
    set_inputs(changed, ["1.value=5"], CLASSES)
    assert changed["1"]["inputs"]["value"] == 5
    set_inputs(changed, ["value=6"], CLASSES)
    assert changed["1"]["inputs"]["value"] == 6


@pytest.mark.parametrize(
    ("old", "setting", "value"),
    [
        ({"keep": False}, "keep=true", True),
        ({"keep": True}, "keep=False", False),
        ({"keep": 1}, "keep=false", False),
        ({"strength": 1}, "strength=1.5", 1.5),  # as JavaScript writes 1.0
        ({"strength": None}, "strength=2", 2.0),
        ({"text": 5}, "text=07", "07"),
        ({"text": "a"}, "text=a=b", "a=b"),
    ],
)
def test_a_setting_has_the_type_that_its_node_declares(old: dict, setting: str, value) -> None:
    changed = {"1": {"class_type": "Kinds", "inputs": old}}
    set_inputs(changed, [setting], CLASSES)
    found = next(iter(changed["1"]["inputs"].values()))
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("setting", ["keep=maybe", "keep=", "strength=inf", "strength=nan"])
def test_a_setting_of_another_type_is_refused(setting: str) -> None:
    changed = {"1": {"class_type": "Kinds", "inputs": {"keep": True, "strength": 1}}}
    with pytest.raises(GraphError, match=r"^--set (keep|strength) must be "):
        set_inputs(changed, [setting], CLASSES)


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ({"text": 5}, {"text": "5"}),
        ({"text": 1.5}, {"text": "1.5"}),
        ({"strength": "0.5"}, {"strength": 0.5}),
        ({"strength": 1}, {"strength": 1.0}),
        ({"keep": 1}, {"keep": True}),
    ],
)
def test_a_value_is_converted_as_comfyui_does(given: dict, right: dict) -> None:
    (found,) = run_graph({"1": {"class_type": "Kinds", "inputs": given}}, CLASSES)
    assert found == right
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in right.items()
    }


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    ["\ud800", None, {}, {"a": 1}, [], [1, 2, 3], ["1"], [1, 0], ["1", "0"], ["1", 0.5], [["1"], 0],
     nested(500), ["1", nested(500)]],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
@pytest.mark.parametrize(
    ("kind", "name"),
    [("Kinds", "keep"), ("Kinds", "strength"), ("Kinds", "text"), ("Constant", "value"),
     ("Choice", "chosen"), ("LoadImage", "image")],
)  # fmt: skip
def test_a_value_of_another_shape_is_said_in_a_line(kind: str, name: str, value) -> None:
    bad = graph(**{"3": {"class_type": kind, "inputs": {name: value}}})
    with pytest.raises(GraphError, match=f"Node 3 .*{name}.*(must be|is linked to)") as caught:
        run_graph(bad, CLASSES)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", ["1e400", 1e400, -1e400, float("nan"), 10**400, "x" * 10**6])
@pytest.mark.parametrize(("kind", "name"), [("Kinds", "strength"), ("Constant", "value")])
def test_what_is_no_finite_number_is_said(kind: str, name: str, value) -> None:
    bad = graph(**{"3": {"class_type": kind, "inputs": {name: value}}})
    with pytest.raises(GraphError, match=f"Node 3 .*{name} must be a number") as caught:
        run_graph(bad, CLASSES)
    assert len(str(caught.value)) < 200


def test_a_class_that_is_no_name_is_not_an_api_graph() -> None:
    with pytest.raises(GraphError, match="not an API-format workflow"):
        run_graph({"1": {"class_type": ["Add"], "inputs": {}}}, CLASSES)


def test_thousands_of_nodes_in_a_row_run_and_a_ring_of_them_is_told() -> None:
    count = 5000
    long = {"0": {"class_type": "Constant", "inputs": {"value": 1}}} | {
        str(n): {"class_type": "Add", "inputs": {"a": [str(n - 1), 0], "b": 1}}
        for n in reversed(range(1, count))
    }
    assert max(run_graph(long, CLASSES)) == count
    long["1"]["inputs"]["a"] = [str(count - 1), 0]
    with pytest.raises(GraphError, match="depends on its own output"):
        run_graph(long, CLASSES)


@pytest.mark.parametrize("bad", ["value", "nothing=1", "2.value=1", "1.value=many", "2.a=1", "=1"])
def test_settings_that_do_not_fit_are_refused(bad: str) -> None:
    with pytest.raises(GraphError, match="--set"):
        set_inputs(graph(), [bad], CLASSES)


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


def saved(folder: Path, prefix: str, count: int = 1) -> list[str]:
    save = image_nodes(folder, folder, {})["SaveImage"]
    assert save.validate_inputs(filename_prefix=prefix) is True
    paths = save.execute(images=torch.rand(count, 8, 8, 3), filename_prefix=prefix).ui
    return [path.relative_to(folder).as_posix() for path in paths]


@pytest.mark.parametrize("prefix", ["cat", "cat[1]", "c*t?", "猫 [a-z]", "%猫%", "a.b"])
def test_no_picture_is_ever_overwritten(tmp_path: Path, prefix: str) -> None:
    first = saved(tmp_path, prefix, 2)
    before = [(tmp_path / name).read_bytes() for name in first]
    assert first == [f"{prefix}_00001_.png", f"{prefix}_00002_.png"]
    assert saved(tmp_path, f"{prefix}/") == [f"{prefix}_00003_.png"]
    assert [(tmp_path / name).read_bytes() for name in first] == before


@pytest.mark.parametrize(
    ("there", "number"),
    [
        (["cat_final_.png"], 1),
        (["cat_00004_.png", "cat_final_.png"], 5),
        (["cat_00004_.jpg"], 5),  # ComfyUI counts every kind of file
        (["cat_00004.png", "cat_7"], 8),
        (["cat_00004_copy_.png"], 5),
        (["cats_00009_.png", "acat_00009_.png", "cat.png", "cat_"], 1),
        (["cat_123456_.png"], 123457),
    ],
)
def test_pictures_are_counted_as_in_comfyui(tmp_path: Path, there: list, number: int) -> None:
    for name in there:
        (tmp_path / name).touch()
    assert saved(tmp_path, "cat") == [f"cat_{number:05d}_.png"]


def test_a_picture_of_another_run_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made between the count and the writing; a link that leads nowhere is one too."""
    (tmp_path / "cat_00001_.png").write_bytes(b"another's")
    os.symlink(tmp_path / "nowhere", tmp_path / "cat_00002_.png")
    monkeypatch.setattr("majicflux.host.image_nodes.os.listdir", lambda _: [])
    assert saved(tmp_path, "cat") == ["cat_00003_.png"]
    assert (tmp_path / "cat_00001_.png").read_bytes() == b"another's"
    assert not (tmp_path / "nowhere").exists()


def test_the_size_the_day_and_the_number_are_filled_in_as_in_comfyui(tmp_path: Path) -> None:
    year = datetime.now().year
    assert saved(tmp_path, "%year%/%width%x%height%_%batch_num%_%none%", 2) == [
        f"{year}/8x8_{index}_%none%_00001_.png" for index in (0, 1)
    ]


@pytest.mark.parametrize("prefix", ["", ".", "..", "../cat", "sub/..", "/cat", "link/cat"])
def test_pictures_stay_in_the_output_folder(tmp_path: Path, prefix: str) -> None:
    folder = tmp_path / "output"
    folder.mkdir()
    os.symlink(tmp_path, folder / "link")
    save = image_nodes(folder, folder, {})["SaveImage"]
    assert "leads out of the output folder" in save.validate_inputs(filename_prefix=prefix)
    with pytest.raises(ValueError, match="leads out of the output folder"):
        save.execute(images=torch.rand(1, 8, 8, 3), filename_prefix=prefix)
    assert sorted(tmp_path.rglob("*")) == [folder, folder / "link"]


def test_where_nothing_can_be_saved_is_said_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, prefix in (
        (tmp_path / "file", "cat"),
        (tmp_path, "file/cat"),
        (tmp_path, "c" * 300),
        (tmp_path, "\ud800"),
        (tmp_path, "a\0b"),
    ):
        nodes = image_nodes(folder, folder, {})
        said = nodes["SaveImage"].validate_inputs(filename_prefix=prefix)
        assert re.fullmatch(r"(?s).* cannot be written: .+\.|.* names no file\.", said), said
    assert (
        "cannot be written"
        in image_nodes(tmp_path / "file", tmp_path, {})["PreviewImage"].validate_inputs()
    )
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_no_half_of_a_picture_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data: bytes) -> None:
            self.file.write(data[:9])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda path, mode: Full(opened(path, mode)))
    save = image_nodes(tmp_path, tmp_path, {})["SaveImage"]
    with pytest.raises(ValueError, match=r"cat_00001_\.png cannot be written: No space left"):
        save.execute(images=torch.rand(1, 8, 8, 3), filename_prefix="cat")
    assert not [*tmp_path.iterdir()]


def test_what_a_picture_carries_never_stops_it(tmp_path: Path) -> None:
    metadata = {"prompt": {"1": 2}, "deep": nested(5000), "strange": {1, 2}}
    nodes = image_nodes(tmp_path, tmp_path, metadata)
    (path,) = nodes["SaveImage"].execute(images=torch.rand(1, 8, 8, 3), filename_prefix="a").ui
    with Image.open(path) as picture:
        assert picture.text["prompt"] == '{"1": 2}'
        assert "strange" not in picture.text


@pytest.mark.parametrize(
    ("values", "right"),
    [
        (np.array([[0, 257, 32896, 65535]], np.uint16), [0, 257 / 65535, 32896 / 65535, 1]),
        (np.array([[0, 257, 32896, 65535]], np.int32), [0, 257 / 65535, 32896 / 65535, 1]),
        (np.array([[0, 0.25, 1, 7]], np.float32), [0, 0.25, 1, 1]),
        (np.array([[0, 51, 255]], np.uint8), [0, 0.2, 1]),
    ],
    ids=["16 bits", "16 bits in 32", "float", "8 bits"],
)
def test_a_grey_picture_of_any_depth_loads_as_it_looks(tmp_path: Path, values, right) -> None:
    Image.fromarray(values).save(tmp_path / "grey.tif")
    image, mask = image_nodes(tmp_path, tmp_path, {})["LoadImage"].execute("grey.tif").args
    assert image.shape == (1, *values.shape, 3)
    assert torch.allclose(image[0, 0], torch.tensor(right)[:, None].expand(-1, 3))
    assert not mask.any()


def loading(folder: Path, name: str) -> str:
    load = image_nodes(folder / "output", folder / "input", {})["LoadImage"]
    return str(load.validate_inputs(name))


def test_pictures_are_found_where_comfyui_finds_them(tmp_path: Path) -> None:
    for place in ("input/in.png", "input/sub/in.png", "output/out.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place)
    for name in ("in.png", "in.png [input]", "sub/in.png", "out.png [output]"):
        assert loading(tmp_path, name) == "True", name
    for name in ("out.png", "in.png [output]", "in.png [temp]"):
        assert "There is no picture" in loading(tmp_path, name), name


def test_pictures_are_read_from_nowhere_else(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "out.png")
    (tmp_path / "input").mkdir()
    os.symlink(tmp_path / "out.png", tmp_path / "input" / "link.png")
    for name in ("../out.png", str(tmp_path / "out.png"), "link.png", "../out.png [output]", "\0"):
        assert "leads out of the folder" in loading(tmp_path, name), name


def test_the_upload_button_of_an_older_export_is_ignored(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    exported = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "a.png", "upload": "image"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    assert run_graph(exported, node_classes(tmp_path)) == [[tmp_path / "preview_00001_.png"]]


def test_what_is_no_picture_is_said_in_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "broken.png").write_bytes(whole[:40] + b"\0" * 16 + whole[56:])
    huge = struct.pack(">II", 10**5, 10**5)
    (folder / "bomb.png").write_bytes(whole[:16] + huge + whole[24:])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    for name in sorted(path.name for path in folder.iterdir() if path.name != "whole.png"):
        said = loading(tmp_path, name)
        assert re.match(r".*(cannot be read: .+\.|There is no picture .+\.)$", said), name
        assert "\n" not in said
