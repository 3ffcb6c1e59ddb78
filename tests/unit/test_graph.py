"""The runner of API graphs."""

import copy
from pathlib import Path

import pytest
from graphs import nested, node_classes
from PIL import Image

from majicflux.host.graph import GraphError, run_graph, set_inputs
from majicflux.host.image_nodes import image_nodes
from majicflux.host.schema import ComfyNode, Schema, io


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
