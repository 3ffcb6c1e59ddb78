"""With ComfyUI's memory manager and executor, in this process."""

import copy
import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch

API = Path(__file__).parents[2] / "workflows" / "api" / "text_to_image.json"
ACCELERATOR = torch.device("cpu", 0)  # another device than `cpu` to PyTorch's comparisons
MB = 2**20


@pytest.fixture
def small_graph() -> dict:
    graph = json.loads(API.read_text(encoding="utf-8"))
    graph["5"]["inputs"].update(width=64, height=64, steps=2)
    return graph


@pytest.fixture
def manager(comfy, monkeypatch: pytest.MonkeyPatch):
    """The real manager on a simulated card, which holds what the loaded models say they hold."""
    mm = comfy.manager
    mm.unload_all_models()
    monkeypatch.setattr(mm, "current_loaded_models", [])
    card = {"total": 3000 * MB}

    def free(device=None, torch_free_too=False):
        held = {id(m.model): m.model.loaded_size() for m in mm.current_loaded_models if m.model}
        left = card["total"] - sum(held.values())
        return (left, 0) if torch_free_too else left

    monkeypatch.setattr(mm, "get_free_memory", free)
    monkeypatch.setattr(mm, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(mm, "vram_state", mm.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(mm, "minimum_inference_memory", lambda: 100 * MB)
    monkeypatch.setattr(mm, "EXTRA_RESERVED_VRAM", 0)
    mm.card = card
    yield mm
    del mm.card


def component(comfy, blocks: int, block_mb: int):
    """A patcher over a chain of equal blocks."""
    offload, door = comfy.pack("engine.offload"), comfy.pack("host.comfyui")
    with torch.device("meta"):
        width = int((block_mb * MB / 4) ** 0.5)
        chain = torch.nn.Sequential(
            *(torch.nn.Linear(width, width, bias=False) for _ in range(blocks))
        )
    weights = offload.OffloadedModule(chain, list(chain)).allocate()
    return door.make_patcher(weights, ACCELERATOR, "Chain")


def resident(patcher) -> int:
    return sum(block.resident for block in patcher.weights.blocks)


def test_a_component_that_fits_is_resident(comfy, manager) -> None:
    patcher = component(comfy, blocks=4, block_mb=64)
    patcher.load(working_bytes=100 * MB, weight_cap=None)
    assert resident(patcher) == 4
    assert patcher.loaded_size() == patcher.model_size()


def test_what_does_not_fit_streams(comfy, manager) -> None:
    manager.card["total"] = 400 * MB
    patcher = component(comfy, blocks=8, block_mb=64)
    patcher.load(working_bytes=200 * MB, weight_cap=None)
    assert resident(patcher) == 3


def test_the_users_budget_is_a_cap_on_what_the_host_grants(comfy, manager) -> None:
    patcher = component(comfy, blocks=4, block_mb=64)
    patcher.load(100 * MB, weight_cap=130 * MB)
    assert resident(patcher) == 2
    patcher.load(100 * MB, weight_cap=None)
    assert resident(patcher) == 4
    patcher.load(100 * MB, weight_cap=70 * MB)
    assert resident(patcher) == 1


def test_one_component_makes_room_for_the_next(comfy, manager) -> None:
    manager.card["total"] = 700 * MB
    first, second = component(comfy, 8, 64), component(comfy, 8, 64)
    first.load(100 * MB, None)
    assert resident(first) == 8
    second.load(100 * MB, None)
    assert resident(second) == 8
    assert resident(first) < 8
    first.load(100 * MB, None)
    assert resident(first) == 8


def test_a_native_model_takes_our_memory_and_we_take_it_back(comfy, manager) -> None:
    manager.card["total"] = 700 * MB
    ours = component(comfy, 8, 64)
    ours.load(100 * MB, None)
    net = torch.nn.Linear(10_000, 10_000, bias=False)  # 400 MB
    native = comfy_patcher(net)
    manager.load_models_gpu([native], memory_required=100 * MB)
    assert resident(ours) < 8
    ours.load(100 * MB, None)
    assert resident(ours) == 8


def comfy_patcher(net: torch.nn.Module):
    from comfy.model_patcher import ModelPatcher

    class Native(ModelPatcher):
        """ComfyUI's own patcher, with the moving of weights to the simulated card left out."""

        loaded = 0

        def loaded_size(self) -> int:
            return self.loaded

        def partially_load(self, device, extra_memory=0, force_patch_weights=False):
            self.loaded = self.model_size()
            return self.loaded

        def partially_unload(self, device, memory_to_free=0, force_patch_weights=False):
            return 0

        def detach(self, unpatch_all=True):
            self.loaded = 0 if unpatch_all else self.loaded
            return self.model

    return Native(net, ACCELERATOR, torch.device("cpu"))


def test_reuse_moves_no_weights(comfy, manager) -> None:
    patcher = component(comfy, 4, 64)
    patcher.load(100 * MB, None)
    before = [p.data_ptr() for p in patcher.weights.module.parameters()]
    patcher.load(100 * MB, None)
    assert [p.data_ptr() for p in patcher.weights.module.parameters()] == before


def test_unload_all_models_releases_us(comfy, manager) -> None:
    patcher = component(comfy, 4, 64)
    patcher.load(100 * MB, None)
    manager.free_memory(1e30, ACCELERATOR)
    assert resident(patcher) == 0
    assert not manager.current_loaded_models


def test_a_dropped_component_is_freed_without_the_garbage_collector(comfy, manager) -> None:
    patcher = component(comfy, 4, 1)
    patcher.load(1 * MB, None)
    alive = weakref.ref(patcher.weights)
    gc.disable()
    try:
        del patcher
        assert alive() is None
    finally:
        gc.enable()


def test_handles_show_their_patcher_to_the_cache(comfy, small_graph) -> None:
    from comfy.model_patcher import ModelPatcher

    executor = comfy.executor()
    messages = comfy.run(executor, small_graph)
    assert messages[-1][0] == "execution_success", messages[-1]
    outputs = [entry.outputs[0][0] for entry in executor.caches.outputs.cache.values()]
    patchers = [h.patcher for h in outputs if hasattr(h, "patcher")]
    assert len(patchers) == 3
    assert all(isinstance(p, ModelPatcher) for p in patchers)
    loaded = {id(m.model) for m in comfy.manager.current_loaded_models}
    assert loaded == {id(p) for p in patchers}
    comfy.manager.unload_all_models()
    assert all(p.weights.resident_bytes == 0 for p in patchers)
    small_graph["5"]["inputs"]["seed"] = 1
    assert comfy.run(executor, small_graph)[-1][0] == "execution_success"


@pytest.mark.parametrize("cache_type", ["CLASSIC", "NONE"])
def test_two_loaders_of_one_file_hold_it_once(comfy, small_graph, monkeypatch, cache_type) -> None:
    """Two branches from loader to picture; the loaders differ in nothing but their node."""
    module = comfy.pack("loaders.flux_dit")
    load, alive = module.load_flux_dit, weakref.WeakSet()
    most = 0

    def counted(*args: object):
        nonlocal most
        weights, geometry = load(*args)
        alive.add(weights)
        most = max(most, len(alive))
        return weights, geometry

    monkeypatch.setattr(module, "load_flux_dit", counted)
    graph = small_graph
    folder = comfy.base / "models" / "diffusion_models"
    file = f"twice-{cache_type}.safetensors"  # which no other test has loaded
    shutil.copy(folder / graph["1"]["inputs"]["file"], folder / file)
    graph["1"]["inputs"]["file"] = file
    for node in ("1", "4", "5", "6"):
        graph["1" + node] = copy.deepcopy(graph[node])
    graph["14"]["inputs"]["dit"] = ["11", 0]
    graph["15"]["inputs"].update(pipeline=["14", 0], seed=5)
    graph["16"]["inputs"]["images"] = ["15", 0]
    executor = comfy.executor(cache_type)
    assert comfy.run(executor, graph)[-1][0] == "execution_success"
    assert most == 1
    (folder / file).unlink()


def test_interrupt_ends_the_run_before_the_next_block(comfy, small_graph) -> None:
    executor = comfy.executor()
    comfy.run(executor, small_graph)
    dit = next(
        entry.outputs[0][0]
        for entry in executor.caches.outputs.cache.values()
        if hasattr(entry.outputs[0][0], "geometry")
    )
    ran: list[int] = []

    def forward_begins(*_: object) -> None:
        ran.append(1)
        if len(ran) == 3:
            comfy.manager.interrupt_current_processing()

    attention = [block.attn for block in dit.weights.module.blocks]
    projections = [block.proj_out for block in dit.weights.module.single_blocks]
    hooks = [m.register_forward_pre_hook(forward_begins) for m in (*attention, *projections)]
    again = copy.deepcopy(small_graph)
    again["5"]["inputs"]["seed"] = 9
    messages = comfy.run(executor, again)
    for hook in hooks:
        hook.remove()
    assert messages[-1][0] == "execution_interrupted"
    assert len(ran) == 3
    assert comfy.run(executor, again)[-1][0] == "execution_success"
