"""Control nets in a run: in every precision, in a budget, for some steps, chained, or refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RecordingPatcher
from control_nets import FILES, LITE, control_net_tensors, picture, randn, transformer_tensors
from torch import Tensor

from majicflux.benchmarks.random_models import CLIP, T5
from majicflux.engine.errors import ControlNetWidthError
from majicflux.engine.flux.controlnet import Control, ControlNet
from majicflux.engine.flux.geometry import (
    ControlGeometry,
    FluxGeometry,
    blocks_used,
    lockstep,
)
from majicflux.engine.flux.lockstep import visits
from majicflux.engine.flux.text_encoders import TextEmbedding
from majicflux.engine.flux.transformer import DiT
from majicflux.engine.offload.prefetch import PrefetchRing
from majicflux.engine.offload.weight_block import WeightBlock
from majicflux.engine.plan.denoising import step_seconds
from majicflux.engine.plan.device import DeviceProfile
from majicflux.engine.quant.compute import ComputePrecision, choose_compute
from majicflux.engine.quant.formats import FLOAT32, PRECISIONS, Precision, uniform
from majicflux.engine.run import pipeline_run, stages
from majicflux.engine.run.pipeline import Pipeline
from majicflux.engine.run.pipeline_run import OnStage, ignore_stage
from majicflux.engine.run.request import GenerationRequest
from majicflux.engine.sampling.solvers import euler, heun, levels_of_passes
from majicflux.loaders.controlnet import load_control_net
from majicflux.loaders.flux_dit import load_flux_dit

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, ACCELERATOR = torch.device("cpu"), torch.device("cpu", 0)  # another to PyTorch's comparisons
CUDA = pytest.param(
    torch.device("cuda", 0),
    marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason="NOT TESTED ON A CARD: no CUDA device"
    ),
    id="card",
)
EXACT = uniform(FLOAT32)
PROMPT = TextEmbedding(randn(1, 17, T5.width), randn(1, CLIP.width))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The transformer under the name of "", and the control nets."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("control")
    tensors = {name: control_net_tensors(g, 1, torch.bfloat16) for name, g in FILES.items()}
    for name, each in {"": transformer_tensors(LITE, torch.bfloat16), **tensors}.items():
        save_file(each, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in ("", *FILES)}


class Made:
    """A pipeline of a transformer alone, and control nets beside it."""

    def __init__(
        self,
        files: dict[str, Path],
        precision: Precision,
        device: torch.device = CPU,
        mode: str = "",
        budget_bytes: int | None = None,
    ) -> None:
        self.files, self.precision, self.device = files, precision, device
        weights, geometry = load_flux_dit(files[""], precision)
        compute = ComputePrecision(torch.float32)
        if mode:
            compute = choose_compute(weights.module, device, mode, torch.float32)
        patcher = RecordingPatcher(weights, device)
        dit = DiT(weights, patcher, geometry, precision)
        self.pipeline = Pipeline(dit, None, None, budget_bytes, compute)

    def control(self, name: str = "Union-Pro 2.0", **options: Any) -> Control:
        weights, geometry = load_control_net(self.files[name], self.precision)
        patcher = RecordingPatcher(weights, self.device)
        net = ControlNet(weights, patcher, geometry, self.precision)
        return Control(net, picture(48, 64), **options)

    def painted(
        self, *controls: Control, on_stage: OnStage = ignore_stage, **changes: Any
    ) -> Tensor:
        """By controls whose pictures have been encoded."""
        request = requested(*controls, **changes)
        stage = self.pipeline.denoise_with(request.acting)
        self.run = self.pipeline.start(request.workload, [stage], lambda: None, on_stage)
        given = (request.sampler_inputs(None), [PROMPT] * len(request.prompts), 3.5)
        hints = [encoded(control) for control in request.acting]
        with torch.inference_mode():
            return stage.run(self.run, *given, lambda _: None, hints=hints)


def encoded(control: Control) -> Tensor:
    """Some latents for each picture."""
    return randn(1, 16, 6, 8, seed=int(control.picture.sum()))


def requested(*controls: Control, **changes: Any) -> GenerationRequest:
    request = GenerationRequest(PROMPT, seed=0, steps=2, guidance=3.5, width=64, height=48)
    return replace(request, controls=controls, **changes)


@pytest.fixture
def make(files: dict[str, Path]) -> Callable[..., Made]:
    def made(precision: Precision = EXACT, **options: Any) -> Made:
        return Made(files, precision, **options)

    return made


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def chained(made: Made) -> list[Control]:
    """Two nets, one of them with two pictures."""
    union = made.control("Union", mode=2)
    again = replace(union, picture=picture(30, 30), mode=0, strength=0.3, end=0.5)
    return [union, made.control("inpainting", mask=torch.ones(1, 48, 64)), again]


TWO = {"batch_size": 2, "cfg": 2.0, "negative": PROMPT}


@pytest.mark.parametrize("device", [pytest.param(ACCELERATOR, id="cpu"), CUDA])
@pytest.mark.parametrize(
    ("precision", "mode"),
    [*((name, "") for name in PRECISIONS), ("float8_e4m3fn", "8-bit"), ("int8 rotated", "8-bit")],
)
def test_streamed_is_resident_bit_for_bit(
    make, monkeypatch, precision: str, mode: str, device
) -> None:
    resident = make(PRECISIONS[precision], device=device, mode=mode)
    controls = chained(resident)
    expected = resident.painted(*controls, **TWO)
    request = requested(*controls, **TWO)
    stage = resident.pipeline.denoise_with(controls)
    plan = resident.pipeline.plan(request.workload, [stage])
    smallest, overhead = plan.smallest_bytes, plan.stages[0].overhead
    for budget in (smallest, smallest + (smallest - overhead) // 8):
        streamed = make(PRECISIONS[precision], device=device, mode=mode, budget_bytes=budget)
        found = streamed.painted(*chained(streamed), **TWO)
        plan = streamed.run.plan.stages[0]
        assert plan.visiting
        if device.type == "cuda":  # products of so few rows depend on how many columns there are
            as_much = partial(pipeline_run.Chunking, plan.tokens, plan.groups)
            with monkeypatch.context() as patch:
                patch.setattr(pipeline_run, "Chunking", lambda *rest, made=as_much: made(*rest[2:]))
                expected = resident.painted(*controls, **TWO)
        assert torch.equal(found, expected)
        report = streamed.run.report.stages[0]
        assert report.moved_bytes
        assert device.type == "cpu" or 0 < report.peak_bytes <= budget


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_precision_is_as_near_as_the_transformer_in_it(make, precision: str) -> None:
    exact, rounded = make(), make(PRECISIONS[precision])
    for name in FILES:
        expected = exact.painted(exact.control(name))
        error = relative(rounded.painted(rounded.control(name)), expected)
        alone = relative(rounded.painted(), exact.painted())
        assert error <= 1.5 * alone, name


def test_a_strength_of_0_is_none_bit_for_bit(make) -> None:
    made = make()
    without = made.painted()
    net = made.control()
    assert torch.equal(made.painted(replace(net, strength=0.0)), without)
    assert torch.equal(made.painted(replace(net, start=1.0, end=1.0)), without)
    assert relative(made.painted(net), without) > 0.01


@pytest.mark.parametrize(
    ("double_blocks", "single_blocks", "where"),
    [
        (5, 0, {0: 0, 4: 1, 8: 2, 12: 3, 16: 4}),
        (4, 0, {0: 0, 5: 1, 10: 2, 15: 3}),
        (2, 0, {0: 0, 10: 1}),
        (5, 10, {0: 0, 4: 1, 8: 2, 12: 3, 16: 4} | {19 + 4 * n: 5 + n for n in range(10)}),
    ],
)
def test_blocks_run_just_before_the_first_that_they_tell_something(
    double_blocks: int, single_blocks: int, where: dict[int, int]
) -> None:
    net = ControlGeometry(double_blocks=double_blocks, single_blocks=single_blocks)
    found = lockstep(FluxGeometry(), net)
    assert len(found) == 57
    assert {place: own[0] for place, own in enumerate(found) if own} == where
    assert all(len(own) <= 1 for own in found)


def test_a_small_transformer_hears_what_comes_in_time() -> None:
    small, union = replace(LITE, double_blocks=6), ControlGeometry(single_blocks=10)
    assert lockstep(small, ControlGeometry()) == [[0], [], [], [], [1], *[[]] * 6]
    assert lockstep(small, union) == [[0], [], [], [], [1], [], [2, 3, 4, 5], *[[]] * 3, [6]]


@pytest.mark.parametrize(
    ("in_file", "used"), [(6, 5), (5, 5), (4, 4), (10, 10), (19, 19), (18, 10)]
)
def test_of_the_blocks_in_a_file_those_that_are_used_are_read(in_file: int, used: int) -> None:
    assert blocks_used(in_file, 0) == used
    assert blocks_used(in_file, 10) == in_file


@pytest.mark.parametrize("solver", [euler, heun])
def test_weights_come_in_the_order_that_is_expected(make, monkeypatch, solver) -> None:
    """And outside of start and end those of a control net do not come at all."""
    entered: list[WeightBlock] = []
    enter = PrefetchRing.enter

    def watched(ring: PrefetchRing, block: WeightBlock) -> None:
        entered.append(block)
        enter(ring, block)

    monkeypatch.setattr(PrefetchRing, "enter", watched)
    made = make()
    early, late = made.control("Union", end=0.4), made.control(start=0.6)
    made.painted(early, late, solver=solver, steps=3)
    dit = made.pipeline.dit
    levels = levels_of_passes(solver, requested(steps=3).sigmas)
    of_passes = visits(dit, [early, late], levels)
    passing = [block for blocks in of_passes for of_block in blocks for block in of_block]
    assert entered[-len(passing) :] == passing
    for control in (early, late):
        acting = [level for level in levels if control.acts_at(level)]
        assert 0 < len(acting) < len(levels)
        own = [*control.net.weights.blocks]
        due = lockstep(LITE, control.net.geometry)
        of_pass = sum(len(control.net.visits(numbers)) for numbers in due)
        assert sum(block in own for block in entered) == len(acting) * of_pass


def test_the_seconds_of_a_run_are_those_of_the_nets_that_act_in_each_pass(
    make, monkeypatch
) -> None:
    made, told = make(), []
    card = DeviceProfile(copy_rate=1e9, product_rate=1e9, attention_rate=1e9)
    monkeypatch.setattr(stages, "measured_profile", lambda *_: card)
    early, late = made.control("Union", end=0.4), made.control(start=0.6)
    made.painted(early, late, steps=5, on_stage=lambda *stage: told.append(stage))
    request, plan = requested(early, late, steps=5), made.run.plan
    levels = levels_of_passes(request.solver, request.sigmas)
    acting = [[c.net.geometry for c in (early, late) if c.acts_at(level)] for level in levels]
    assert [len(nets) for nets in acting] == [1, 1, 0, 1, 1]
    given = (plan.stages[0], LITE, request.workload, card)
    expected = sum(step_seconds(*given, nets) for nets in acting)
    assert told == [("denoising", pytest.approx(expected))]
    assert expected < 4.5 * plan.seconds


def test_another_seed_moves_no_weights_that_are_needed_once(make) -> None:
    made = make(PRECISIONS["bfloat16"], device=ACCELERATOR, budget_bytes=60 * 2**20)
    controls = chained(made)
    moved = []
    for seed in (0, 1):
        made.painted(*controls, seed=seed)
        moved.append(made.run.report.stages[0].moved_bytes)
    once = sum(c.net.weights.sizes.once[0].nbytes for c in controls[:2])
    assert moved[0] - moved[1] >= once


def test_a_control_net_of_another_width_is_refused(make) -> None:
    made = make()
    control = made.control()
    geometry = replace(control.net.geometry, hidden=3072)
    wide = replace(control, net=replace(control.net, geometry=geometry))
    with pytest.raises(ControlNetWidthError, match="has a width of 3072 where the transformer has"):
        made.painted(wide)
