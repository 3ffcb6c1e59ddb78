"""Our nodes and ComfyUI's own Flux in turns on one card, in a server with ComfyUI's own settings.

`tests/unit/test_gpu.py` starts such servers; in others it is skipped.
"""

import copy
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from majicflux.loaders import demo_models


@pytest.fixture
def arguments() -> Any:
    """With which the server was started."""
    found = sys.modules["comfy.cli_args"].args
    if found.cpu:
        pytest.skip("NOT TESTED ON A CARD: this server was started with --cpu")
    return found


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture
def graph(small_graph: dict) -> dict[str, Any]:
    """Ours at node 5, ComfyUI's at node `stock`; its prompt is encoded by a pipeline of its own."""
    graph = small_graph
    graph["1"]["inputs"]["weight_precision"] = "bfloat16"
    graph["2"]["inputs"]["keep_prepared"] = False
    graph["4"]["inputs"]["compute_precision"] = "bfloat16"
    graph["5"]["inputs"].update(prompt="a cat", seed=1, steps=4, width=256, height=256)
    text, file = ["positive", 0], Path(demo_models.DIT_FILE).name
    return graph | {
        "14": copy.deepcopy(graph["4"]),
        "positive": node("MajicFluxEncodePrompt", pipeline=["14", 0], prompt="a cat", guidance=3.5),
        "unet": node("UNETLoader", unet_name=file, weight_dtype="default"),
        "empty": node("EmptySD3LatentImage", width=256, height=256, batch_size=1),
        "stock": node(
            "KSampler", model=["unet", 0], positive=text, negative=text, latent_image=["empty", 0],
            seed=1, steps=4, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        "shown": node("PreviewAny", source=["stock", 0]),
    }  # fmt: skip


def test_in_turns_with_comfyuis_own_flux(comfy, graph: dict, arguments: Any) -> None:
    manager, plan = comfy.manager, comfy.pack("engine.plan.plan")
    executor, turns = comfy.executor(), itertools.count()

    def latents(of: str, output: int) -> Tensor:
        graph[of]["inputs"]["turn"] = next(turns)  # or its result were remembered
        kind, data = comfy.run(executor, graph)[-1]
        assert kind == "execution_success", data
        return executor.caches.outputs.get_local(of).outputs[output][0]["samples"].cpu()

    def ours(budget_gb: float = 0.0) -> Tensor:
        """With a budget, and without: with what ComfyUI grants."""
        graph["4"]["inputs"]["vram_budget_gb"] = budget_gb
        return latents("5", 1)

    def theirs() -> Tensor:
        return latents("stock", 0)

    def on_card() -> int:
        return sum(part.weights.resident_bytes for part in pipeline.components)

    def pinned() -> int:
        return torch.cuda.host_memory_stats()["allocated_bytes.current"]

    first, of_native = ours(), theirs()
    found = comfy.outputs(executor, graph)
    pipeline, native = found["4"], found["unet"]
    little = pipeline.plan(plan.Workload(256, 256, 1, 4)).smallest_bytes / 2**30 + 0.001
    # What ComfyUI does on NVIDIA, where comfy-aimdo pages its own models' weights.
    assert ("Dynamic" in type(native).__name__) != arguments.disable_dynamic_vram
    assert torch.equal(ours(), first)
    assert torch.equal(theirs(), of_native)
    assert torch.equal(ours(little), first)
    assert torch.equal(theirs(), of_native)
    assert on_card() > 0
    manager.free_memory(1e15, manager.get_torch_device())
    assert on_card() == 0
    assert torch.equal(ours(), first)
    assert on_card() > 0
    assert pinned() > 0
    manager.unload_all_models()
    assert on_card() == 0
    assert pinned() == 0
    assert torch.equal(ours(), first)
    torch.save(first, comfy.base / "latents.pt")
    manager.unload_all_models()
