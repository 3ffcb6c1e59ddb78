"""Whole graphs on a simulated card: what the host grants, and budgets within it."""

import copy
import gc
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from control_nets import FILES, control_net_tensors
from safetensors.torch import save_file

from majicflux.benchmarks.random_models import DIT

MB = 2**20
GB = 2**30
RESERVED = 100 * MB  # by the manager, for other programs
STAGES = ["text", "denoise", "decode"]


@pytest.fixture
def graph(small_graph: dict, on_the_card) -> dict:
    return small_graph


@dataclass
class Held:
    """Bytes of weights and of a ring that were on the card at once, in one stage."""

    budget: int | None
    stage: str
    most: int = 0


@pytest.fixture
def held(comfy, card, monkeypatch: pytest.MonkeyPatch) -> list[Held]:
    """The stages that ran."""
    prefetch = comfy.pack("engine.offload.prefetch")
    run = comfy.pack("engine.run.pipeline_run").PipelineRun
    stages: list[Held] = []
    memory_of, enter = run.memory_of, prefetch.PrefetchRing.enter

    def noted(self, stage, *predicted: float | None):
        stages.append(Held(self.plan.budget_bytes if self.plan.chosen else None, stage.name))
        return memory_of(self, stage, *predicted)

    def watched(self, block: Any) -> None:
        enter(self, block)
        ring = 0 if self._ring is None else len(self._ring)
        stages[-1].most = max(stages[-1].most, card.total - card.free + ring)

    monkeypatch.setattr(run, "memory_of", noted)
    monkeypatch.setattr(prefetch.PrefetchRing, "enter", watched)
    return stages


def succeed(comfy, executor, graph: dict) -> dict[str, Any]:
    """What the nodes gave."""
    kind, data = comfy.run(executor, graph)[-1]
    assert kind == "execution_success", data
    return comfy.outputs(executor, graph)


def error_of(comfy, executor, graph: dict) -> dict[str, Any]:
    kind, data = comfy.run(executor, graph)[-1]
    assert kind == "execution_error", data
    return data


def workload(comfy, graph: dict):
    chosen = graph["5"]["inputs"]
    of_node = (chosen[name] for name in ("width", "height", "batch_size", "steps"))
    return comfy.pack("engine.plan.plan").Workload(*of_node)


def smallest_budget(comfy, found: dict) -> int:
    """That the pipeline node accepts, with a little left for what is resident."""
    return (
        found["4"].plan(comfy.pack("engine.plan.plan").Workload(256, 256)).smallest_bytes + 4 * MB
    )


def plan_of(comfy, found: dict, graph: dict):
    """Of the pipeline node for the graph's picture."""
    return found["4"].plan(workload(comfy, graph))


def with_budget(graph: dict, budget_bytes: float, seed: int = 0) -> dict:
    changed = copy.deepcopy(graph)
    changed["4"]["inputs"]["vram_budget_gb"] = budget_bytes / GB
    changed["5"]["inputs"]["seed"] = seed
    return changed


def test_without_a_budget_the_plan_uses_what_the_host_grants(
    comfy, card, graph, on_the_card
) -> None:
    found = succeed(comfy, comfy.executor(), graph)
    plan = plan_of(comfy, found, graph)
    assert plan.budget_bytes == card.total - RESERVED
    assert [stage.name for stage in plan.stages] == STAGES
    assert not any(stage.ring for stage in plan.stages), "everything fits"
    assert len(on_the_card()) == 3
    for component in found["4"].components:
        assert component.weights.resident_bytes == component.weights.travelling_bytes


def test_a_component_that_is_resident_needs_nothing_more(comfy, graph) -> None:
    """Else the manager would send others home for what never comes."""
    found = succeed(comfy, comfy.executor(), graph)
    for component in found["4"].components:
        assert component.patcher.model_size() == component.patcher.loaded_size()


def test_on_a_small_card_weights_visit_and_the_picture_is_the_same(
    comfy, card, graph, held
) -> None:
    roomy = succeed(comfy, comfy.executor(), graph)
    tight = smallest_budget(comfy, roomy)
    comfy.manager.unload_all_models()
    gc.collect()
    held.clear()

    card.total = tight + RESERVED
    small = succeed(comfy, comfy.executor(), graph)
    plan = plan_of(comfy, small, graph)
    assert plan.budget_bytes == tight
    assert any(stage.ring for stage in plan.stages)
    keeps_to(plan, held, tight)
    assert (small["5"] - roomy["5"]).abs().mean() < 0.01


def keeps_to(plan, held: list[Held], budget: int) -> None:
    planned = {stage.name: stage for stage in plan.stages}
    assert [stage.stage for stage in held][-2:] == STAGES[1:]
    for stage in held:
        assert 0 < stage.most <= budget - planned[stage.stage].values


@pytest.fixture
def tight(comfy, graph) -> int:
    """A budget that is hardly enough."""
    return smallest_budget(comfy, succeed(comfy, comfy.executor(), graph))


def test_a_new_budget_reloads_no_weights(comfy, graph, tight, held) -> None:
    executor = comfy.executor()
    before = succeed(comfy, executor, graph)
    held.clear()
    after = succeed(comfy, executor, with_budget(graph, tight, seed=1))
    for node in ("1", "2", "3"):
        assert after[node] is before[node]
    assert after["4"] is not before["4"]
    assert after["4"].budget_bytes == pytest.approx(tight, abs=1)
    assert 0 < max(stage.most for stage in held) <= tight
    again = succeed(comfy, executor, with_budget(graph, 0, seed=2))
    assert again["4"].components == before["4"].components
    weights = again["3"].weights
    assert weights.resident_bytes == weights.travelling_bytes, "it grew back"


def test_a_control_net_is_held_to_the_budget_too(comfy, graph, held) -> None:
    folder = comfy.base / "models" / "controlnet"
    folder.mkdir(exist_ok=True)
    tensors = control_net_tensors(replace(FILES["Union"], hidden=DIT.hidden))
    save_file(tensors, folder / "union.safetensors")
    size = {"width": 64, "height": 64, "batch_size": 1, "color": 0x3F7FBF}
    graph["picture"] = {"class_type": "EmptyImage", "inputs": size}
    graph["net"] = {"class_type": "MajicFluxControlNet", "inputs": {
        "file": "union.safetensors", "weight_precision": "float8_e4m3fn", "strength": 0.8,
        "image": ["picture", 0], "start": 0.0, "end": 1.0, "mode": "depth",
    }}  # fmt: skip
    graph["5"]["inputs"]["control"] = ["net", 0]
    executor = comfy.executor()
    found = succeed(comfy, executor, graph)
    (control,) = found["net"]
    weights = control.net.weights
    assert weights.resident_bytes == weights.travelling_bytes, "there is room"
    pipeline = found["4"]
    stages = [pipeline.text, pipeline.encode, pipeline.denoise_with([control]), pipeline.decode]
    tight = pipeline.plan(workload(comfy, graph), stages).smallest_bytes + 4 * MB
    held.clear()
    succeed(comfy, executor, with_budget(graph, tight, seed=1))
    assert [stage.stage for stage in held] == ["encode", "denoise", "decode"]
    assert 0 < max(stage.most for stage in held) <= tight
    succeed(comfy, executor, with_budget(graph, 0, seed=2))
    assert weights.resident_bytes == weights.travelling_bytes, "it grew back"


def test_two_budgets_over_one_loader_in_one_graph(comfy, graph, tight, held) -> None:
    for node in ("4", "5", "6"):
        graph["1" + node] = copy.deepcopy(graph[node])
    graph["14"]["inputs"]["vram_budget_gb"] = tight / GB
    graph["15"]["inputs"]["pipeline"] = ["14", 0]
    graph["16"]["inputs"]["images"] = ["15", 0]
    graph["5"]["inputs"]["seed"] = graph["15"]["inputs"]["seed"] = 5
    found = succeed(comfy, comfy.executor(), graph)
    assert found["14"].dit is found["4"].dit
    assert found["14"].budget_bytes == pytest.approx(tight, abs=1)
    assert found["4"].budget_bytes is None
    of_tight = [stage.most for stage in held if stage.budget == found["14"].budget_bytes]
    assert 0 < max(of_tight) <= tight
    assert max(stage.most for stage in held if stage.budget is None) > tight
    assert (found["15"] - found["5"]).abs().mean() < 0.01


def test_one_budget_for_two_precisions_in_one_graph(comfy, graph, held) -> None:
    """What one of them has left on the card counts for the other."""
    for node in ("1", "4", "5", "6"):
        graph["1" + node] = copy.deepcopy(graph[node])
    graph["11"]["inputs"]["weight_precision"] = "int8 rotated"
    graph["14"]["inputs"]["dit"] = ["11", 0]
    graph["15"]["inputs"]["pipeline"] = ["14", 0]
    graph["16"]["inputs"]["images"] = ["15", 0]
    executor = comfy.executor()
    found = succeed(comfy, executor, graph)
    values = max(stage.values for stage in plan_of(comfy, found, graph).stages)
    budget = values + sum(each.weights.travelling_bytes for each in found["4"].components)
    for seed in (1, 2):
        graph["14"]["inputs"]["vram_budget_gb"] = budget / GB
        graph["15"]["inputs"]["seed"] = seed
        held.clear()
        found = succeed(comfy, executor, with_budget(graph, budget, seed))
        plans = [found[node].plan(workload(comfy, graph)) for node in ("4", "14")]
        assert [each.stage for each in held] == [*STAGES[1:]] * 2
        for each in held:
            values = min(plan.of(each.stage).values for plan in plans)
            assert 0 < each.most <= budget - values


@pytest.mark.parametrize("more_mb", [0, 20, 60])
def test_a_budget_is_kept_with_whatever_was_resident(
    comfy, card, graph, tight, held, more_mb: int
) -> None:
    executor = comfy.executor()
    succeed(comfy, executor, graph)
    budget = tight + more_mb * MB
    assert card.total - card.free > tight
    held.clear()
    found = succeed(comfy, executor, with_budget(graph, budget, seed=1))
    plan = plan_of(comfy, found, graph)
    keeps_to(plan, held, budget)


def test_a_budget_that_is_too_small_for_anything_stops_at_the_pipeline(comfy, card, graph) -> None:
    executor = comfy.executor()
    error = error_of(comfy, executor, with_budget(graph, 0.05 * GB))
    assert error["node_type"] == "MajicFluxPipeline"
    assert error["exception_type"] == "majicflux.BudgetTooSmallError"
    said = error["exception_message"]
    assert said.startswith("0.05 GB of VRAM are too little for 1 x 64x64: the phase 'VAE decode'")
    assert "Set vram_budget_gb to 0." in said
    assert card.free == card.total, "nothing was moved"
    succeed(comfy, executor, with_budget(graph, 0))


def test_what_the_sentence_says_is_enough(comfy, graph) -> None:
    executor = comfy.executor()
    said = error_of(comfy, executor, with_budget(graph, 0.05 * GB))["exception_message"]
    enough = float(said.split("Set vram_budget_gb to ")[1].split()[0])
    succeed(comfy, executor, with_budget(graph, enough * GB))


def test_a_picture_too_large_for_the_budget_stops_at_sample_before_it_begins(
    comfy, card, graph
) -> None:
    executor = comfy.executor()
    large = with_budget(graph, 0.3 * GB)
    large["5"]["inputs"].update(width=8192, height=8192, batch_size=4)
    error = error_of(comfy, executor, large)
    assert error["node_type"] == "MajicFluxSample"
    assert error["exception_type"] == "majicflux.BudgetTooSmallError"
    assert "0.30 GB of VRAM are too little for 4 x 8192x8192" in error["exception_message"]
    assert "choose a smaller picture or batch" in error["exception_message"]
    assert card.free == card.total, "nothing was moved"
    succeed(comfy, executor, with_budget(graph, 0.3 * GB))


def test_a_card_that_is_too_small_is_no_matter_of_the_budget(comfy, card, graph) -> None:
    card.total = RESERVED + 50 * MB
    error = error_of(comfy, comfy.executor(), graph)
    said = error["exception_message"]
    assert "0.05 GB" in said
    assert "Set vram_budget_gb" not in said, "the node has no budget; a larger one would not help"


def test_what_runs_on_the_cpu_needs_nothing_of_the_budget(
    comfy, graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with --cpu-vae, and with --lowvram for the text encoders."""
    monkeypatch.setattr(comfy.pack("host.comfyui"), "vae_device", lambda: torch.device("cpu"))
    found = succeed(comfy, comfy.executor(), with_budget(graph, 0.06 * GB))
    plan = plan_of(comfy, found, graph)
    assert plan.smallest_bytes == max(stage.smallest for stage in plan.stages[:2])


def test_a_run_that_finds_less_than_was_planned_says_so_and_the_next_works(
    comfy, graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another program takes the memory during the run."""
    executor = comfy.executor()
    found = succeed(comfy, executor, graph)
    layer = found["1"].weights.module.final_proj_out

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = layer.register_forward_pre_hook(full)
    error = error_of(comfy, executor, with_budget(graph, 0, seed=1))
    hook.remove()
    sentence, details = error["exception_message"].strip().splitlines()
    assert "The card ran out of memory in the phase 'denoising'" in sentence
    assert details == "CUDA out of memory.", "which the canvas explains in the user's language"
    for component in found["4"].components:
        assert not component.weights.root.visitors
    succeed(comfy, executor, with_budget(graph, 0, seed=1))


def test_free_between_runs_and_the_next_run_takes_everything_back(
    comfy, card, graph, on_the_card
) -> None:
    executor = comfy.executor()
    found = succeed(comfy, executor, graph)
    assert card.free < card.total
    comfy.manager.unload_all_models()
    assert (card.free, on_the_card()) == (card.total, [])
    again = succeed(comfy, executor, with_budget(graph, 0, seed=1))
    assert again["1"] is found["1"]
    assert len(on_the_card()) >= 2  # the prompt is remembered, so its encoders need not come
