"""Each picture carries the report of its own run, with nodes made for the purpose."""

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reported import node, read, save, saved_late, unsaved


class Numbers:
    RETURN_TYPES = ("INT",)
    OUTPUT_IS_LIST = (True,)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"first": ("INT", {})}}

    def run(self, first: int) -> tuple[list[int]]:
        return ([first, first + 1, first + 2],)


class Joined:
    RETURN_TYPES = ("IMAGE",)
    INPUT_IS_LIST = True
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"images": ("IMAGE", {})}}

    def run(self, images: list[torch.Tensor]) -> tuple[torch.Tensor]:
        return (torch.cat(images),)


class Expanding:
    """Becomes the sample node that it describes."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"pipeline": ("MAJICFLUX_PIPELINE", {"rawLink": True}),
                             "inputs": ("STRING", {})}}  # fmt: skip

    def run(self, pipeline: list, inputs: str) -> dict:
        from comfy_execution.graph_utils import GraphBuilder

        builder = GraphBuilder()
        given = {**json.loads(inputs), "pipeline": pipeline}
        made = builder.node("MajicFluxSample", **given)
        return {"result": (made.out(0),), "expand": builder.finalize()}


@pytest.fixture
def graph() -> dict[str, Any]:
    return unsaved()


@pytest.fixture
def painted(comfy, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, list[Any]]]:
    """A function that runs a graph as the server would and gives what its pictures carry."""
    import nodes

    for kind in (Numbers, Joined, Expanding):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, kind.__name__, kind)

    def run(executor, graph: dict) -> dict[str, list[Any]]:
        shutil.rmtree(comfy.base / "output", ignore_errors=True)
        body = {"prompt": graph, "extra_data": {"extra_pnginfo": {"workflow": {}}}}
        kinds = {"MajicFluxSample"}
        extra = comfy.pack("host.provenance").carry(body, kinds)["extra_data"]
        comfy.run(executor, graph, extra)
        assert executor.success, executor.status_messages
        found: dict[str, list[Any]] = {}
        for path in sorted((comfy.base / "output").glob("*.png")):
            found.setdefault(path.name.split("_")[0], []).append(read(path))
        return found

    return run


@pytest.mark.parametrize("cache", ["CLASSIC", "LRU", "NONE", "RAM_PRESSURE"])
def test_every_cache_of_comfyui_keeps_them_apart(comfy, graph, painted, cache: str) -> None:
    executor = comfy.executor(cache)
    graph["6"] = save("5", "one")
    found = []
    for number, seed in enumerate((7, 8, 7)):
        graph["5"]["inputs"]["seed"] = seed
        graph["6"]["inputs"]["filename_prefix"] = f"run{number}"
        ((record,),) = painted(executor, graph).values()
        assert record["seed"] == seed
        found.append(record)
    assert (found[0] == found[2]) == (cache == "RAM_PRESSURE"), "which still has the picture"


def test_each_picture_of_a_list_carries_its_own_run(comfy, graph, painted) -> None:
    graph["numbers"] = node("Numbers", first=40)
    graph["5"]["inputs"]["seed"] = ["numbers", 0]
    graph["6"] = save("5", "one")
    graph["joined"] = node("Joined", images=["5", 0])
    graph["7"] = save("joined", "joined")
    executor = comfy.executor()
    first = painted(executor, graph)
    assert [record["seed"] for record in first["one"]] == [40, 41, 42]
    for record in first["joined"]:
        assert [run["seed"] for run in record["runs"]] == [40, 41, 42]
    assert len(first["joined"]) == 3
    graph["6"]["inputs"]["filename_prefix"] = "again"
    assert painted(executor, graph)["again"] == first["one"], "from the cache"


def test_a_sample_node_inside_a_node_that_expands_is_found(comfy, graph, painted) -> None:
    sample = graph.pop("5")["inputs"]
    del sample["pipeline"]
    for key, seed in (("a", 50), ("b", 51)):
        inputs = json.dumps({**sample, "seed": seed})
        graph[key] = node("Expanding", pipeline=["4", 0], inputs=inputs)
        graph |= saved_late(key)
    found = painted(comfy.executor(), graph)
    assert {key: record["seed"] for key, (record,) in found.items()} == {"a": 50, "b": 51}
