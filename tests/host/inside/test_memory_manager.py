"""With ComfyUI's memory manager and executor, in this process."""

import copy
import gc
import shutil
import weakref
from typing import Any

import pytest
import torch

ACCELERATOR = torch.device("cpu", 0)  # another device than `cpu` to PyTorch's comparisons
CPU = torch.device("cpu")
MB = 2**20
RESERVED = 100 * MB  # by the manager, for other programs


class Driver:
    """CUDA's pinning of memory."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.most = float("inf")

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert address not in self.pinned
        if sum(self.pinned.values()) + size > self.most:
            return 2
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


@pytest.fixture
def driver(manager, monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(manager, "MAX_PINNED_MEMORY", 3000 * MB)
    monkeypatch.setattr(manager, "TOTAL_PINNED_MEMORY", 0)
    monkeypatch.setattr(manager, "PINNED_MEMORY", {})
    return driver


@pytest.fixture
def moves(comfy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each block that went to the card. Whole modules may not move at all."""
    block = comfy.pack("engine.offload.weight_block").WeightBlock
    stay_on, sizes = block.stay_on, []

    def watched(self, device: torch.device, transfers: Any) -> Any:
        sizes.append(self.nbytes)
        return stay_on(self, device, transfers)

    def refused(self, *_: object, **__: object) -> None:
        raise AssertionError(f"the whole of {type(self).__name__} was moved")

    monkeypatch.setattr(block, "stay_on", watched)
    monkeypatch.setattr(torch.nn.Module, "_apply", refused)
    return sizes


def travel(patcher) -> None:
    """All blocks go to the card once, among the passes of a run."""
    patcher.pin()
    pinned = patcher.weights._pinned
    pinned.begin()
    for block in patcher.weights.blocks:
        pinned.of(block.host_buffer)


def component(comfy, blocks: int, block_mb: int, device: torch.device = ACCELERATOR):
    """A patcher over a chain of equal blocks."""
    offload = comfy.pack("engine.offload.offloaded_module")
    door = comfy.pack("host.comfyui")
    with torch.device("meta"):
        width = int((block_mb * MB / 4) ** 0.5)
        chain = torch.nn.Sequential(
            *(torch.nn.Linear(width, width, bias=False) for _ in range(blocks))
        )
    weights = offload.OffloadedModule(chain, [[layer] for layer in chain]).allocate()
    return door.make_patcher(weights, device, "Chain")


def resident(patcher) -> int:
    return sum(block.resident for block in patcher.weights.blocks)


def test_a_component_that_fits_is_resident(comfy, manager) -> None:
    patcher = component(comfy, blocks=4, block_mb=64)
    patcher.load(working_bytes=100 * MB, weight_cap=None)
    assert resident(patcher) == 4
    assert patcher.loaded_size() == patcher.model_size()


def test_what_does_not_fit_streams(comfy, manager, card) -> None:
    card.total = 400 * MB + RESERVED
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


def test_a_smaller_cap_is_kept_without_sending_others_home(comfy, manager, card) -> None:
    card.total = 1060 * MB + RESERVED
    ours, other = component(comfy, 8, 64), component(comfy, 6, 64)
    other.load(100 * MB, None)
    ours.load(100 * MB, None)
    assert (resident(ours), resident(other)) == (8, 6)
    ours.load(300 * MB, weight_cap=128 * MB)
    assert (resident(ours), resident(other)) == (2, 6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_others_hold_counts_as_available(comfy, manager, card, dynamic: bool) -> None:
    card.total = 1000 * MB
    ours, idle = component(comfy, 4, 64), component(comfy, 4, 64)
    other = native(200, dynamic)
    manager.load_models_gpu([other])
    ours.load(100 * MB, None)
    assert card.free == 1000 * MB - ours.loaded_size() - other.loaded_size()
    for patcher in (ours, idle):
        assert patcher.available() == 1000 * MB - RESERVED


def test_memory_of_a_cpu_is_not_counted(comfy, manager) -> None:
    assert component(comfy, 1, 1, CPU).available() is None


def test_on_a_cpu_no_second_copy_of_the_weights_is_made(comfy, manager, moves) -> None:
    patcher = component(comfy, 4, 1, CPU)
    homes = [p.data_ptr() for p in patcher.weights.module.parameters()]
    patcher.load(1 * MB, None)
    assert [p.data_ptr() for p in patcher.weights.module.parameters()] == homes


def test_one_component_makes_room_for_the_next(comfy, manager, card, moves) -> None:
    card.total = 800 * MB + RESERVED
    first, second = component(comfy, 8, 64), component(comfy, 8, 64)
    first.load(100 * MB, None)
    assert resident(first) == 8
    second.load(100 * MB, None)
    assert resident(second) == 8
    assert 0 < resident(first) < 8, "what still fits beside the other stays"
    first.load(100 * MB, None)
    assert resident(first) == 8
    assert max(moves) == 64 * MB


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_native_model_takes_what_it_needs_and_we_grow_back(
    comfy, manager, card, moves, dynamic: bool
) -> None:
    card.total = 1000 * MB + RESERVED
    ours, other = component(comfy, 8, 64), native(400, dynamic)
    ours.load(100 * MB, None)
    # It asks for a tenth more than its size, so 52 MB are lacking.
    manager.load_models_gpu([other], memory_required=100 * MB)
    assert other.loaded == 400 * MB
    assert resident(ours) == 7
    assert ours in [entry.model for entry in manager.current_loaded_models]
    ours.load(100 * MB, None)
    assert resident(ours) == 8
    # A dynamic model gives back what is lacking, a plain one that cannot leaves.
    assert 300 * MB < other.loaded < 400 * MB if dynamic else other.loaded == 0
    assert max(moves) == 64 * MB


def test_a_native_model_as_large_as_the_card_sends_all_blocks_home(comfy, manager, card) -> None:
    card.total = 600 * MB + RESERVED
    ours = component(comfy, 8, 64)
    ours.load(10 * MB, None)
    assert resident(ours) == 8
    manager.load_models_gpu([native(500)], memory_required=50 * MB)
    assert resident(ours) == 0
    assert ours not in [entry.model for entry in manager.current_loaded_models]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_full_card_grants_nothing_and_takes_what_was_granted(
    comfy, manager, card, dynamic: bool
) -> None:
    """As when another program fills it: everything visits then."""
    ours, other = component(comfy, 4, 64), native(100, dynamic)
    ours.load(100 * MB, None)
    card.total = 100 * MB
    ours.load(100 * MB, None)
    assert resident(ours) == 0
    manager.load_models_gpu([other])


def native(size_mb: int, dynamic: bool = False):
    from comfy.model_patcher import ModelPatcher

    class Native(ModelPatcher):
        """ComfyUI's own patcher, with the moving of weights to the simulated card left out."""

        loaded = 0

        def is_dynamic(self) -> bool:
            return dynamic

        def loaded_ram_size(self) -> int:
            return self.model_size() - self.loaded

        def loaded_size(self) -> int:
            return self.loaded

        def partially_load(self, device, extra_memory=0, force_patch_weights=False):
            self.loaded = self.model_size()
            return self.loaded

        def partially_unload(self, device, memory_to_free=0, force_patch_weights=False):
            freed = min(int(memory_to_free) + 1, self.loaded) if dynamic else 0
            self.loaded -= freed
            return freed

        def detach(self, unpatch_all=True):
            self.loaded = 0 if unpatch_all else self.loaded
            return self.model

    with torch.device("meta"):
        net = torch.nn.Linear(512, size_mb * 512, bias=False)
    return Native(net, ACCELERATOR, CPU)


def test_reuse_moves_no_weights(comfy, manager, driver, moves) -> None:
    patcher = component(comfy, 4, 64)
    patcher.load(100 * MB, None)
    travel(patcher)
    before = [p.data_ptr() for p in patcher.weights.module.parameters()]
    moved, pinned = len(moves), dict(driver.pinned)
    patcher.load(100 * MB, None)
    patcher.detach(unpatch_all=False)
    assert [p.data_ptr() for p in patcher.weights.module.parameters()] == before
    assert (len(moves), driver.pinned) == (moved, pinned)


def test_unload_all_models_releases_us(comfy, manager, driver) -> None:
    patcher = component(comfy, 4, 64)
    patcher.load(100 * MB, None)
    travel(patcher)
    assert manager.TOTAL_PINNED_MEMORY == patcher.weights.pinned_bytes == 4 * 64 * MB
    manager.unload_all_models()
    assert resident(patcher) == 0
    assert not manager.current_loaded_models
    assert manager.TOTAL_PINNED_MEMORY == patcher.weights.pinned_bytes == 0
    assert not driver.pinned
    patcher.load(100 * MB, None)
    travel(patcher)
    assert (resident(patcher), len(driver.pinned)) == (4, 4)


def test_freed_memory_goes_back_to_the_system_with_a_model(
    comfy, manager, driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    host = comfy.pack("host.comfyui")
    monkeypatch.setattr(host, "give_back_host_memory", lambda: given.append(True))
    patcher = component(comfy, 2, 1)
    patcher.load(100 * MB, None)
    patcher.detach(unpatch_all=False)  # as it is used again
    assert not given
    manager.unload_all_models()
    assert given == [True]


def test_memory_is_pinned_until_the_system_refuses(comfy, manager, driver) -> None:
    driver.most = 150 * MB
    patcher = component(comfy, 4, 64)
    for _ in range(3):
        travel(patcher)
        assert patcher.weights.pinned_bytes == manager.TOTAL_PINNED_MEMORY == 2 * 64 * MB
    patcher.detach()
    assert not driver.pinned


def test_memory_is_pinned_up_to_the_managers_limit(comfy, manager, driver, monkeypatch) -> None:
    monkeypatch.setattr(manager, "MAX_PINNED_MEMORY", 150 * MB)
    first, second = component(comfy, 2, 64), component(comfy, 2, 64)
    travel(first)
    travel(second)
    assert manager.TOTAL_PINNED_MEMORY == 2 * 64 * MB
    first.detach()
    travel(second)
    assert second.weights.pinned_bytes == 2 * 64 * MB


def test_a_manager_that_does_not_pin_is_no_error(comfy, manager) -> None:
    patcher = component(comfy, 2, 1)
    travel(patcher)
    assert patcher.weights.pinned_bytes == 0


def test_what_another_model_takes_stays_pinned(comfy, manager, driver, card) -> None:
    """It visits from now on, which is what pinning is for."""
    card.total = 1000 * MB + RESERVED
    patcher = component(comfy, 8, 64)
    patcher.load(100 * MB, None)
    travel(patcher)
    manager.load_models_gpu([native(400)], memory_required=100 * MB)
    assert resident(patcher) == 7
    assert len(driver.pinned) == 8


def test_a_dropped_component_is_freed_without_the_garbage_collector(comfy, manager, driver) -> None:
    patcher = component(comfy, 4, 1)
    patcher.load(1 * MB, None)
    travel(patcher)
    assert driver.pinned
    alive = weakref.ref(patcher.weights)
    gc.disable()
    try:
        del patcher
        assert alive() is None
        assert not driver.pinned
    finally:
        gc.enable()


def test_handles_show_their_patcher_to_the_cache(comfy, small_graph) -> None:
    from comfy.model_patcher import ModelPatcher

    executor = comfy.executor()
    messages = comfy.run(executor, small_graph)
    assert messages[-1][0] == "execution_success", messages[-1]
    outputs = comfy.outputs(executor, small_graph)
    patchers = [h.patcher for h in outputs.values() if hasattr(h, "patcher")]
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
    module = comfy.pack("nodes.dit_loader")
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
    shutil.copy(folder / "majicflus_v134.safetensors", folder / file)
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
    dit = comfy.outputs(executor, small_graph)["1"]
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
