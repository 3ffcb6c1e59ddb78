"""Phases, budget and reuse."""

import logging
import platform
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch

from majicflux.engine.errors import BudgetError, NotFiniteError
from majicflux.engine.flux import vae_bands
from majicflux.engine.flux.vae_band_plan import BandPlan, plan_decode
from majicflux.engine.offload.prefetch import PrefetchRing
from majicflux.engine.offload.vram import HeldVram
from majicflux.engine.plan.denoising import step_seconds
from majicflux.engine.plan.device import DeviceProfile
from majicflux.engine.plan.plan import DENOISE
from majicflux.engine.run import pipeline as pipeline_module
from majicflux.engine.run import pipeline_run, stages
from majicflux.engine.run.pipeline import Pipeline, paint
from majicflux.engine.run.request import GenerationRequest
from majicflux.engine.sampling.solvers import heun

pytestmark = pytest.mark.usefixtures("one_thread")
REQUEST = GenerationRequest("a cat", seed=0, steps=2, guidance=3.5, width=64, height=64)
ACCELERATOR = torch.device("cpu", 0)  # another device than `cpu` to PyTorch's comparisons


def run(pipeline: Pipeline, request: GenerationRequest = REQUEST) -> torch.Tensor:
    return paint(pipeline, request, lambda _: None, lambda: None)[0]


def components(pipeline: Pipeline) -> list:
    return [pipeline.dit, pipeline.text_encoders, pipeline.vae]


@pytest.mark.usefixtures("narrow")
def test_a_new_seed_on_the_same_prompt_runs_no_text_encoder(make_pipeline) -> None:
    pipeline = make_pipeline()
    runs: list[str] = []
    for name in ("clip", "t5"):
        module = pipeline.text_encoders.weights.module[name]
        module.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    run(pipeline)
    run(pipeline, GenerationRequest("a cat", seed=1, steps=3, guidance=2.0, width=48, height=64))
    assert runs == ["clip", "t5"]
    assert len(pipeline.text_encoders.patcher.loads) == 1
    run(pipeline, GenerationRequest("a dog", seed=0, steps=2, guidance=3.5, width=64, height=64))
    assert runs == ["clip", "t5"] * 2


@pytest.mark.usefixtures("narrow")
def test_a_negative_prompt_that_is_remembered_is_not_encoded_again(make_pipeline) -> None:
    pipeline = make_pipeline()
    runs: list[str] = []
    pipeline.text_encoders.weights.module["t5"].register_forward_pre_hook(
        lambda *_: runs.append("")
    )
    run(pipeline, replace(REQUEST, cfg=2.0, negative="fog"))
    assert len(runs) == 2
    run(pipeline, replace(REQUEST, prompt="a dog", cfg=2.0, negative="fog"))
    assert len(runs) == 3


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("phase", ["text encoders", "denoising", "VAE decode"])
def test_every_phase_can_be_stopped(make_pipeline, caplog, phase: str) -> None:
    pipeline = make_pipeline()
    text, dit = 1 + len(pipeline.text_encoders.weights.blocks), pipeline.dit.weights
    visits = {"text encoders": 2, "denoising": text + 2}  # the first as the prompt is read
    visits["VAE decode"] = text + len(dit.once) + REQUEST.steps * len(dit.blocks) + 1

    class Cancelled(BaseException):
        pass

    def before_block() -> None:
        visits[phase] -= 1
        if visits[phase] == 0:
            raise Cancelled

    with caplog.at_level(logging.INFO), pytest.raises(Cancelled):
        paint(pipeline, REQUEST, lambda *_: None, before_block)
    phases = ["text encoders", "denoising", "VAE decode"]
    finished = [name for name in phases if f"{name}: " in caplog.text]
    assert finished == phases[: phases.index(phase)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of another C library")
@pytest.mark.usefixtures("narrow")
def test_what_was_freed_goes_back_to_the_system_with_a_run(make_pipeline) -> None:
    pipeline = make_pipeline()
    run(pipeline)
    pieces = [bytearray(b"x" * 2**15) for _ in range(8192)]  # too small for mappings of their own
    behind = bytearray(b"x" * 2**15)
    pieces.clear()
    before = psutil.Process().memory_info().rss
    run(pipeline)
    assert before - psutil.Process().memory_info().rss > 2**26
    assert len(behind) == 2**15


@pytest.mark.usefixtures("narrow")
def test_a_batch_has_one_noise_per_picture_and_one_prompt(make_pipeline) -> None:
    pipeline = make_pipeline()
    batch = run(pipeline, GenerationRequest("a cat", 0, 2, 3.5, 64, 64, batch_size=2))
    assert batch.shape == (2, 64, 64, 3)
    assert not torch.equal(batch[0], batch[1])
    assert (batch[0] - run(pipeline)[0]).abs().mean() < 0.02


@pytest.mark.usefixtures("narrow")
def test_a_run_can_be_stopped_between_blocks_and_begun_again(make_pipeline) -> None:
    pipeline = make_pipeline()
    expected = run(pipeline)
    weights = pipeline.dit.weights
    blocks = len(weights.blocks)
    visited: list[int] = []  # the prompt and what it means to each step are remembered

    class Cancelled(BaseException):
        pass

    def before_block() -> None:
        visited.append(1)
        if len(visited) == blocks + 3:
            raise Cancelled

    passes: list[torch.Tensor | None] = []
    with pytest.raises(Cancelled):
        paint(pipeline, REQUEST, passes.append, before_block)
    assert len(passes) == 1
    assert len(visited) == blocks + 3
    assert torch.equal(run(pipeline), expected)


@pytest.mark.parametrize("budget_mb", [0, 50, 2000])
def test_components_share_the_card_only_as_far_as_the_budget_allows(
    make_pipeline, budget_mb: float
) -> None:
    """budget_mb: more than the smallest that works."""
    smallest = make_pipeline(device=ACCELERATOR).plan(REQUEST.workload).smallest_bytes
    budget = smallest + budget_mb * 2**20
    pipeline = make_pipeline(device=ACCELERATOR, budget_bytes=budget)
    most = 0

    def look(*_: object) -> None:
        nonlocal most
        most = max(most, sum(c.weights.resident_bytes for c in components(pipeline)))

    for component in components(pipeline):
        for module in component.weights.module.modules():
            module.register_forward_pre_hook(look)
    run(pipeline)
    run(pipeline, GenerationRequest("a dog", 0, 2, 3.5, 64, 64))
    assert 0 < most <= budget
    everything = sum(c.weights.travelling_bytes for c in components(pipeline))
    if budget_mb == 2000:
        assert most == everything
    else:
        assert most < everything
    for component in components(pipeline):
        for working, cap in component.patcher.loads:
            assert working + cap <= budget


def test_what_other_pipelines_have_left_there_gives_way(make_pipeline) -> None:
    """As where two precisions are compared, or a run had a control net that this one has not."""

    def resident(pipeline: Pipeline) -> int:
        return sum(c.weights.resident_bytes for c in components(pipeline))

    first, second = (make_pipeline(device=ACCELERATOR, budget_bytes=2 * 2**30) for _ in range(2))
    run(first)
    stayed = resident(first)
    _, _, report = paint(second, REQUEST, lambda _: None, lambda: None)
    assert resident(first) == stayed > 0, "there is room for both"
    plan = second.plan(REQUEST.workload)
    for stage, planned in zip(report.stages, plan.stages, strict=True):
        assert stage.planned_bytes >= planned.peak + stayed
    second = replace(second, budget_bytes=plan.smallest_bytes + stayed // 2)
    (denoising,) = (s for s in second.plan(REQUEST.workload).stages if s.name == DENOISE)
    held: list[int] = []
    second.dit.weights.module.blocks[0].register_forward_pre_hook(
        lambda *_: held.append(resident(first) + resident(second))
    )
    run(second)
    assert max(held) + denoising.values + denoising.overhead <= second.budget_bytes


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_too_small_a_budget_is_refused_before_anything_moves(make_pipeline, share: float) -> None:
    smallest = make_pipeline(device=ACCELERATOR).plan(REQUEST.workload).smallest_bytes
    pipeline = make_pipeline(device=ACCELERATOR, budget_bytes=int(share * smallest))
    with pytest.raises(BudgetError) as caught:
        run(pipeline)
    sentence, *phases = str(caught.value).splitlines()
    assert "are too little for 1 x 64x64: the phase 'VAE decode'" in sentence
    assert [line.partition(":")[0] for line in phases] == [
        "text encoders",
        "denoising",
        "VAE decode",
    ]
    assert not any(c.patcher.loads for c in components(pipeline))
    assert not any(c.weights.resident_bytes for c in components(pipeline))
    assert pipeline.text_encoders.recall(REQUEST.prompt) is None


@pytest.mark.usefixtures("narrow")
def test_without_a_budget_the_host_decides(make_pipeline) -> None:
    pipeline = make_pipeline()
    phases = pipeline.plan(REQUEST.workload).stages
    run(pipeline)
    for component, phase in zip(
        (pipeline.text_encoders, pipeline.dit, pipeline.vae), phases, strict=True
    ):
        ((working, cap),) = component.patcher.loads
        assert cap is None
        assert working == phase.values + phase.overhead > 0
        assert phase.ring == 0


@pytest.mark.usefixtures("narrow")
def test_working_memory_grows_with_the_picture(make_pipeline) -> None:
    pipeline = make_pipeline()
    run(pipeline)
    run(pipeline, GenerationRequest("a cat", 0, 1, 3.5, 128, 128))
    for component in (pipeline.dit, pipeline.vae):
        (small, _), (large, _) = component.patcher.loads
        assert large > small


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("limit", [float("inf"), 10 * 2**20])
def test_the_vae_takes_the_smallest_bands_when_memory_runs_out(
    make_pipeline, monkeypatch, limit: float
) -> None:
    vae = make_pipeline(dtype=torch.float32).vae
    decoder = vae.weights.module["decoder"]
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    taken: list[BandPlan] = []
    decode = vae_bands.decode
    whole = decoder.forward
    smallest, planned = (plan_decode(8, 8, 4, size) for size in (0, limit))
    assert smallest != planned

    def short_of_memory(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("simulated")

    def in_bands(*args) -> torch.Tensor:
        taken.append(args[2])
        return short_of_memory() if args[2] != smallest else decode(*args)

    with torch.inference_mode():
        expected, _ = vae.decode(latents)
        assert torch.equal(
            expected[0], (whole(latents[:1])[0] / 2 + 0.5).clamp(0, 1).movedim(0, -1)
        )
        monkeypatch.setattr(decoder, "forward", short_of_memory)
        monkeypatch.setattr(vae_bands, "decode", in_bands)
        found, _ = vae.decode(latents, bands=planned if limit < float("inf") else None)
    # The second picture does not try again what failed for the first.
    assert taken == [planned] * (limit < float("inf")) + [smallest] * 2
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.usefixtures("narrow")
def test_base_and_limit_come_after_the_others_have_given_way(make_pipeline, monkeypatch) -> None:
    """Else what leaves is held against what comes: a limit too high, and a negative peak."""
    pipeline = make_pipeline(device=ACCELERATOR, budget_bytes=100 * 2**20)
    events: list[str] = []

    class Noted(HeldVram):
        def __init__(self, *given: Any):
            events.append("base")
            super().__init__(*given)

        def held_to(self, *given: Any):
            events.append("limit")
            return super().held_to(*given)

    monkeypatch.setattr(pipeline_run, "HeldVram", Noted)
    for component in components(pipeline):
        load, release = component.patcher.load, component.weights.release
        monkeypatch.setattr(
            component.patcher,
            "load",
            lambda *a, load=load, **k: (events.append("load"), load(*a, **k)),
        )
        monkeypatch.setattr(
            component.weights,
            "release",
            lambda *a, release=release: (events.append("release"), release(*a))[1],
        )
    run(pipeline)
    assert events == ["release", "release", "load", "base", "limit"] * 3


@pytest.mark.usefixtures("narrow")
def test_another_seed_needs_no_layer_that_a_run_needs_once(make_pipeline) -> None:
    """A quarter of the weights stays where it is; everything else that is changed asks for it."""
    pipeline = make_pipeline(device=ACCELERATOR)
    once = {id(part) for block in pipeline.dit.weights._modules[-3:] for part in block}
    asked: list[str] = []
    for part in pipeline.dit.weights.module.modules():
        if id(part) in once:
            part.register_forward_pre_hook(lambda *_: asked.append(""))
    small = replace(REQUEST, width=32, height=32)
    first = run(pipeline, small)
    assert asked
    for change, again in (
        ({"seed": 1}, False), ({"seed": 0}, False), ({"width": 48}, False),
        ({"guidance": 2.0}, True), ({"steps": 3}, True), ({"prompt": "a dog"}, True),
        ({"cfg": 2.0}, True), ({"cfg": 2.0, "seed": 3}, False),
    ):  # fmt: skip
        asked.clear()
        request = replace(small, **change)
        found = run(pipeline, request)
        assert bool(asked) == again, change
        assert torch.equal(found, run(make_pipeline(device=ACCELERATOR), request)), change
    assert torch.equal(run(pipeline, small), first)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("share", [0.0, 0.4, 0.97])
def test_a_ring_takes_no_more_than_the_weights_that_the_host_kept_away(
    make_pipeline, monkeypatch, share: float
) -> None:
    """As with --novram: all were planned to stay, and none, or fewer, are let in."""
    pipeline = make_pipeline(device=ACCELERATOR, budget_bytes=2 * 2**30)
    expected = run(pipeline)
    planned = {phase.name: phase for phase in pipeline.plan(REQUEST.workload).stages}
    assert all(phase.ring == 0 for phase in planned.values())
    pipeline = make_pipeline(device=ACCELERATOR, budget_bytes=2 * 2**30)
    taken: list[tuple[int, int, int]] = []
    for component in components(pipeline):
        weights = component.weights
        cap = int(share * weights.travelling_bytes)
        load, visiting = component.patcher.load, weights.visiting

        def watched(ring: PrefetchRing, *given: Any, weights=weights, visiting=visiting) -> Any:
            taken.append((weights.resident_bytes, ring.ring_bytes, weights.largest_bytes))
            return visiting(ring, *given)

        monkeypatch.setattr(
            component.patcher,
            "load",
            lambda working, weight_cap, load=load, cap=cap: load(working, cap),
        )
        monkeypatch.setattr(weights, "visiting", watched)
    pinned: list[str] = []
    monkeypatch.setattr(pipeline.dit.patcher, "pin", lambda: pinned.append(""))
    assert torch.equal(run(pipeline), expected)
    assert pinned, "what visits after all is pinned as it does"
    assert len(taken) == len(planned)
    for (resident, ring, largest), phase in zip(taken, planned.values(), strict=True):
        assert largest <= ring
        assert resident + ring <= phase.resident


@pytest.mark.usefixtures("narrow")
def test_each_phase_is_told_as_it_begins(make_pipeline, monkeypatch) -> None:
    pipeline, told = make_pipeline(), []
    picture = torch.rand(1, 64, 64, 3)
    request = replace(REQUEST, picture=picture)
    nothing = lambda *_: None  # noqa: E731
    tell = lambda *phase: told.append(phase)  # noqa: E731
    _, latents, report = paint(pipeline, request, nothing, nothing, on_stage=tell)
    whole = [(name, None) for name in ("text encoders", "VAE encode", "denoising", "VAE decode")]
    assert told == [(stage.label, None) for stage in report.stages] == whole, "no rates are known"
    told.clear()
    pipeline.text_encoders.forget()
    prompts, _ = pipeline_module.encode_prompts(pipeline, ["a cat"], nothing, tell)
    latents, _ = pipeline_module.encode_pictures(pipeline, picture, nothing, tell)
    request = replace(REQUEST, prompt=prompts[0], latents=latents, solver=heun)
    card = DeviceProfile(copy_rate=1e9, product_rate=1e9, attention_rate=1e9)
    monkeypatch.setattr(stages, "measured_profile", lambda *_: card)
    (denoising,) = pipeline.plan(request.workload, [pipeline.denoise]).stages
    a_step = step_seconds(denoising, pipeline.dit.geometry, request.workload, card)
    latents, _ = pipeline_module.denoise(pipeline, request, nothing, nothing, on_stage=tell)
    pipeline_module.decode(pipeline, latents, nothing, tell)
    assert told == [*whole[:2], ("denoising", request.passes * a_step), whole[3]]
    assert request.passes == 3, "of two steps, the last of which has one"


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("part", ["tokens", "pooled"])
def test_an_embedding_of_no_numbers_is_refused_before_anything_runs(
    make_pipeline, part: str
) -> None:
    """Whoever encoded it: the denoising, which gives no numbers either, is not to blame."""
    pipeline, passes, nothing = make_pipeline(), [], lambda *_: None
    (prompt,), _ = pipeline_module.encode_prompts(pipeline, ["a cat"], nothing)
    damaged = replace(prompt, **{part: torch.full_like(getattr(prompt, part), torch.nan)})
    request = replace(REQUEST, prompt=damaged)
    for go in (paint, pipeline_module.denoise):
        with pytest.raises(NotFiniteError, match="The phase 'text encoders' gave"):
            go(pipeline, request, passes.append, nothing)
    assert not passes
