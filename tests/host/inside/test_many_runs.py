"""One process that paints all day."""

import gc
import random
from typing import Any

import psutil
import pytest

MB = 2**20
WARM_UP, RUNS = 10, 30
SIZES = (16, 32, 48, 64, 80)


def mixed(graph: dict, run: int) -> dict:
    chosen = random.Random(run)
    graph["5"]["inputs"].update(
        width=chosen.choice(SIZES),
        height=chosen.choice(SIZES),
        batch_size=chosen.choice((1, 1, 2, 3)),
        steps=1,
        seed=run,
        prompt=f"picture {run}",
    )
    return graph


def patchers(comfy) -> list[Any]:
    kind = comfy.pack("host.comfyui").WeightsPatcher
    return [found for found in gc.get_objects() if type(found) is kind]


@pytest.mark.parametrize("on_a_card", [False, True])
def test_runs_of_all_sizes_leave_nothing_behind(
    comfy, small_graph, request: pytest.FixtureRequest, on_a_card: bool
) -> None:
    if on_a_card:  # where weights visit
        request.getfixturevalue("on_the_card")
        small_graph["4"]["inputs"]["vram_budget_gb"] = 0.2
    gc.collect()
    before = {id(patcher) for patcher in patchers(comfy)}
    executor, process = comfy.executor(), psutil.Process()
    held = 0
    for run in range(RUNS):
        kind, data = comfy.run(executor, mixed(small_graph, run))[-1]
        assert kind == "execution_success", data
        if run == WARM_UP - 1:
            gc.collect()
            held = process.memory_info().rss
    gc.collect()
    assert process.memory_info().rss - held < 60 * MB
    made = [patcher for patcher in patchers(comfy) if id(patcher) not in before]
    assert len(made) == 3
    assert len(comfy.manager.current_loaded_models) <= 3 + len(before)
    blocks = [block for patcher in made for block in patcher.weights.all_blocks]
    assert not any(block.visitors for block in blocks)
    del executor, made, blocks
    comfy.manager.unload_all_models()
    gc.collect()
    assert {id(patcher) for patcher in patchers(comfy)} <= before
