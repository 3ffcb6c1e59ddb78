"""Which runs a picture carries, without ComfyUI: made-up graphs, and the command line's own."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from majicflux import cli
from majicflux.host import provenance, standalone
from majicflux.host.place import Graph, Place
from majicflux.host.provenance import KEY, Runs, carry, combined, keep
from majicflux.host.schema import ComfyNode

API = Path(__file__).parents[2] / "workflows" / "api" / "text_to_image.json"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def record(seed: int | None = None, peak: int | None = 1, name: str = "denoising") -> dict:
    made = {"budget_bytes": 10, "phases": [{"name": name, "seconds": 1.5}], "peak_bytes": peak}
    return made if seed is None else {"seed": seed, **made}


@pytest.fixture
def graph() -> Graph:
    """Two pictures of one loader, each saved, and both in one batch."""
    return {
        "1": node("Loader", file="flux"),
        "a": node("Sample", model=["1", 0], seed=1),
        "b": node("Sample", model=["1", 0], seed=2),
        "ab": node("Batch", one=["a", 0], two=["b", 0]),
        "inverted": node("Invert", image=["a", 0]),
        "save a": node("Save", images=["inverted", 0]),
        "save b": node("Save", images=["b", 0]),
        "save ab": node("Save", images=["ab", 0]),
    }


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch):
    """A function that sets where the prompt is."""
    monkeypatch.setattr(provenance, "_remembered", {})
    places: list[Place | None] = [None]
    monkeypatch.setattr(provenance.host, "executing", lambda: places[-1])

    def put(*where: Any, **options: Any) -> None:
        places.append(Place(*where, **options) if where else None)

    return put


class Hidden:
    def __init__(self, extra: Any, unique_id: str = "?"):
        self.extra_pnginfo, self.unique_id = extra, unique_id


def written(extra: dict[str, Any]) -> Any:
    """As ComfyUI writes it into a picture."""
    return json.loads(json.dumps(extra[KEY]))


def test_a_picture_carries_the_runs_above_it_whenever_it_is_saved(graph: Graph, here) -> None:
    extra: dict[str, Any] = {}
    for seed, key in enumerate("ab", start=1):
        here(graph, key)
        keep(Hidden(extra), record(seed))
        assert written(extra) == record(seed), "as the node shows it"
    for key, seed in (("save a", 1), ("save b", 2), ("inverted", 1)):
        here(graph, key)
        assert written(extra) == record(seed)
        assert json.loads(json.dumps(extra, indent=1)) == {KEY: record(seed)}, "the other encoder"
        assert written(copy.deepcopy(extra)) == record(seed)
    here(graph, "save ab")
    both = [{"node": "a", **record(1)}, {"node": "b", **record(2)}]
    assert written(extra) == {"runs": both}
    here(graph, "1")
    assert written(extra) == {"runs": []}


def test_a_remembered_picture_carries_the_run_that_made_it(graph: Graph, here) -> None:
    for seed, key in enumerate("ab", start=1):
        here(graph, key)
        keep(Hidden(None), record(seed))
    renamed = {f"12:{key}": copy.deepcopy(value) for key, value in reversed(graph.items())}
    for value in renamed.values():
        for name, link in value["inputs"].items():
            if isinstance(link, list):
                value["inputs"][name] = [f"12:{link[0]}", link[1]]
    extra = {KEY: Runs()}
    for name, seed in (("save a", 1), ("save b", 2)):
        here(renamed, f"12:{name}")
        assert written(extra) == record(seed)
    renamed["12:1"]["inputs"]["file"] = "another"
    assert written(extra) == {"runs": []}, "made by another model, so not yet made"


def test_a_run_of_this_prompt_comes_before_what_is_remembered(here) -> None:
    """As where two nodes draw numbers of their own: the same graph, another picture."""
    graph = {k: node("Sample", seed=["r", 0]) for k in "ab"} | {"r": node("Random")}
    extra: dict[str, Any] = {}
    for seed, key in enumerate("ab"):
        here(graph, key)
        keep(Hidden(extra), record(seed))
    for seed, key in enumerate("ab"):
        here(graph, key)
        assert written(extra) == record(seed)


def test_each_picture_of_a_list_carries_its_own_run(here) -> None:
    graph = {
        "list": node("Prompts"),
        "a": node("Sample", prompt=["list", 0], seed=0),
        "save": node("Save", images=["a", 0]),
        "rebatched": node("Rebatch", images=["a", 0]),
        "save all": node("Save", images=["rebatched", 0]),
    }
    for remembered in (False, True):
        extra: dict[str, Any] = {KEY: Runs()}
        for index in range(3):
            here(graph, "a", index)
            if not remembered:
                keep(Hidden(extra), record(index))
        for index in range(4):
            here(graph, "save", index)
            assert written(extra) == record(min(index, 2)), "the last is repeated"
        here(graph, "save all", 1, regroups=lambda kind: kind == "Rebatch")
        assert [run["seed"] for run in written(extra)["runs"]] == [0, 1, 2]
    here(graph, "a", 0)
    keep(Hidden(extra), record(7))
    here(graph, "save all", 0, regroups=lambda kind: kind == "Rebatch")
    assert written(extra) == record(7), "a list of one, and those before are gone"


def test_runs_inside_a_node_that_became_a_graph_are_found(graph: Graph, here) -> None:
    graph = {
        "loop": node("Loop", model=["1", 0]),
        "save": node("Save", images=["loop", 0]),
        "loop.0.a": node("Sample", seed=4, held=object()),
        "1": node("Loader", file="flux"),
    }
    inside = {"loop": ["loop.0.a"]}
    extra: dict[str, Any] = {}
    here(graph, "loop.0.a", inside=inside)
    keep(Hidden(extra), record(4))
    here(graph, "save", inside=inside)
    assert written(extra) == record(4)


def test_long_chains_and_circles_end(here) -> None:
    graph = {str(n): node("Invert", image=[str(n - 1), 0]) for n in range(1, 3000)}
    graph["0"] = node("Sample", seed=3)
    extra: dict[str, Any] = {}
    here(graph, "0")
    keep(Hidden(extra), record(3))
    here(graph, "2999")
    assert written(extra) == record(3)
    graph["0"] = node("Invert", image=["2999", 0])
    assert written(extra) == record(3)


def test_what_is_remembered_is_bounded_and_the_newest_stays(here, monkeypatch) -> None:
    monkeypatch.setattr(provenance, "REMEMBERED_RUNS", 2)
    extra = {KEY: Runs()}
    for seed in (0, 1, 0, 2):
        here({"a": node("Sample", seed=seed)}, "a")
        keep(Hidden(None), record(seed))
    for seed, found in ((0, record(0)), (1, {"runs": []}), (2, record(2))):
        here({"a": node("Sample", seed=seed)}, "a")
        assert written(extra) == found


def test_parts_of_one_sampling_are_one_record() -> None:
    text, image = record(None, 5, "text encoders"), record(None, None, "VAE decode")
    found = combined([("1", text), ("2", record(9, 3)), ("3", image)])
    assert (found["seed"], found["peak_bytes"]) == (9, 5)
    assert [phase["name"] for phase in found["phases"]] == [
        "text encoders",
        "denoising",
        "VAE decode",
    ]
    assert "seed" not in combined([("3", image)])
    assert combined([("3", image)])["peak_bytes"] is None


def test_outside_of_nodes_all_runs_of_the_prompt_are_seen(here) -> None:
    extra: dict[str, Any] = {}
    keep(Hidden(extra, "5"), record(1))
    assert extra[KEY]["seed"] == written(extra)["seed"] == 1
    keep(Hidden(extra, "6"), record(2))
    assert [run["node"] for run in written(extra)["runs"]] == ["5", "6"]


@pytest.mark.parametrize("extra", [None, [], "text"])
def test_a_client_without_metadata_is_served(extra: Any, graph: Graph, here) -> None:
    here(graph, "a")
    keep(Hidden(extra), record(1))
    body = {"prompt": graph, "extra_data": {"extra_pnginfo": extra}}
    assert carry(copy.deepcopy(body), {"Sample"}) == body
    assert carry({"prompt": graph}, {"Sample"}) == {"prompt": graph}
    for damaged in (
        {},
        {"prompt": {"1": {}}},
        {"prompt": {"1": None}, "extra_data": None},
        {"prompt": []},
    ):
        assert carry(copy.deepcopy(damaged), {"Sample"}) == damaged


def test_only_prompts_with_nodes_of_the_pack_are_changed(graph: Graph) -> None:
    def queued(kinds: set[str]) -> dict:
        extra = {"workflow": {}, KEY: "of an old picture"}
        return carry({"prompt": graph, "extra_data": {"extra_pnginfo": extra}}, kinds)

    assert queued({"Other"})["extra_data"]["extra_pnginfo"][KEY] == "of an old picture"
    assert written(queued({"Sample"})["extra_data"]["extra_pnginfo"]) == {"runs": []}


def test_pictures_of_the_command_line_carry_their_own_run(models: Path, tmp_path: Path) -> None:
    graph = json.loads(API.read_text(encoding="utf-8"))
    sample, save = graph["5"], graph.pop("6")
    sample["inputs"].update(width=32, height=32, steps=1)
    graph["15"] = copy.deepcopy(sample)
    graph["15"]["inputs"].update(seed=7)
    graph["7"] = node("MajicFluxDecode", pipeline=["4", 0], latent=["15", 1])
    for key in ("5", "15"):  # both are painted before one is saved
        graph[f"show {key}"] = node("PreviewImage", images=[key, 0])
    for key in ("5", "15", "7"):
        graph[f"save {key}"] = copy.deepcopy(save)
        graph[f"save {key}"]["inputs"].update(images=[key, 0], filename_prefix=key)
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(graph))
    before = standalone.models_folder
    try:
        done = cli.main(["run", str(file), f"--models={models}", f"--output={tmp_path}"])
    finally:
        standalone.models_folder = before
        ComfyNode.hidden.extra_pnginfo = None
    assert done == 0
    found = {}
    for key in ("5", "15", "7"):
        with Image.open(tmp_path / f"{key}_00001_.png") as picture:
            found[key] = json.loads(picture.text[KEY])
    assert [found[key]["seed"] for key in ("5", "15", "7")] == [0, 7, 7]
    names = {key: [phase["name"] for phase in run["phases"]] for key, run in found.items()}
    assert (
        names["5"]
        == ["text encoders", *names["15"]]
        == ["text encoders", "denoising", "VAE decode"]
    )
    assert names["7"] == [*names["15"], "VAE decode"]
    for one, other in itertools.combinations(found.values(), 2):
        assert one["phases"][-1]["seconds"] != other["phases"][-1]["seconds"]


def promoted(*widgets: list[str], values: list[Any]) -> dict[str, Any]:
    """A node that stands for a subgraph and shows some of its widgets."""
    shown = {"proxyWidgets": [*widgets]}
    return {"id": 12, "type": "sub", "widgets_values": values, "properties": shown}


def test_a_seed_that_was_drawn_is_written_into_the_canvas_wherever_the_node_is() -> None:
    def inner() -> dict[str, Any]:
        others = [{"id": 7, "widgets_values": [-1]}, None, {"id": None}]
        return {
            "id": "sub",
            "nodes": [*others, {"id": 5, "widgets_values": ["a cat", -1, "fixed"]}],
        }

    around = promoted(["7", "stop_at"], ["-1", "seed"], values=[-1, -1])
    outer = {"id": 3, "type": "outer"}
    nested = {"id": "outer", "nodes": [around]}
    for key, nodes, defined in (
        ("5", inner()["nodes"], []),
        ("12:5", [around], [inner()]),
        ("3:12:5", [outer], [nested, inner()]),
    ):
        canvas = copy.deepcopy({"nodes": nodes, "definitions": {"subgraphs": defined}})
        prompt = {key: node("Sample", seed=-1)}
        hidden = Hidden({"workflow": canvas}, key)
        hidden.prompt = prompt
        provenance.note_seed(hidden, -1, 42)
        assert prompt[key]["inputs"]["seed"] == 42
        place = canvas["definitions"]["subgraphs"][-1] if defined else canvas
        assert place["nodes"][-1]["widgets_values"] == ["a cat", 42, "fixed"]
        assert place["nodes"][0]["widgets_values"] == [-1], "another node's"
        if defined:
            holder = canvas if key == "12:5" else canvas["definitions"]["subgraphs"][0]
            assert holder["nodes"][0]["widgets_values"] == [-1, 42]


ODD: list[Any] = [
    None, "text", 5, [], ["nodes"], {"nodes": None}, {"nodes": "text"}, {"nodes": [None, 3, "5"]},
    {"nodes": [{"id": 5}, {"id": 5, "widgets_values": {"seed": -1}}]}, {"nodes": {"5": {}}},
    {"nodes": [], "definitions": []}, {"definitions": {"subgraphs": [None, {"id": None}]}},
    {"nodes": [promoted(["1"], values=[-1])]}, {"nodes": [promoted(values=[-1])]},
]  # fmt: skip


@pytest.mark.parametrize("key", ["5", "12:5", "12:x:5"])
@pytest.mark.parametrize("canvas", ODD, ids=str)
def test_metadata_of_any_form_never_stop_a_picture(here, key: str, canvas: Any) -> None:
    for extra in ({"workflow": canvas}, canvas):
        for prompt in (None, {}, {key: None}, {key: {"inputs": None}}):
            hidden = Hidden(extra, key)
            hidden.prompt = prompt
            provenance.note_seed(hidden, -1, 42)
            here()
            keep(hidden, record(1))
            here({key: {"class_type": "Sample", "inputs": None}}, key)
            keep(hidden, record(1))
