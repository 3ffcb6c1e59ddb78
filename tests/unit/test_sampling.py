"""Solvers, schedules, and what a run begins from."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffsynth_pipeline import diffsynth_pipeline
from PIL import Image
from torch import Tensor

from majicflux.engine.latents import latent_mask
from majicflux.engine.run import pipeline as parts
from majicflux.engine.run.pipeline import Pipeline, paint
from majicflux.engine.run.request import GenerationRequest
from majicflux.engine.sampling.schedules import (
    SCHEDULES,
    bfl_sigmas,
    diffsynth_sigmas,
    given_sigmas,
    some_steps,
)
from majicflux.engine.sampling.solvers import SOLVERS, euler, heun, passes

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")
FLOAT = torch.float32
REQUEST = GenerationRequest("a cat", seed=0, steps=4, guidance=3.5, width=64, height=48)


@pytest.fixture
def exact(make_pipeline) -> Pipeline:
    return make_pipeline(dtype=FLOAT)


def latents_of(pipeline: Pipeline, request: GenerationRequest, **options: object) -> Tensor:
    if request.picture is not None:
        return paint(pipeline, request, lambda _: None, lambda: None, **options)[1]
    names = ["prompt", "negative"][: len(request.prompts)]
    texts = [prompt for prompt in request.prompts if isinstance(prompt, str)]
    if texts:
        found, _ = parts.encode_prompts(pipeline, texts, lambda: None)
        request = replace(request, **dict(zip(names, found, strict=True)))
    return parts.denoise(pipeline, request, lambda _: None, lambda: None, **options)[0]


# Solvers. Data that are normal with deviation S: the velocity and its paths are known exactly.
S = 0.5


def normal_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    sigma = sigma.double()
    spread = (1 - sigma) ** 2 * S**2 + sigma**2
    return x * (sigma - (1 - sigma) * S**2) / spread


def normal_path(start: float, sigma: float) -> float:
    """Where the path through 1 at `start` is at `sigma`."""
    spread = [(1 - s) ** 2 * S**2 + s**2 for s in (start, sigma)]
    return math.sqrt(spread[1] / spread[0])


def error_of(solver, steps: int, start: float = 0.95, end: float = 0.2) -> float:
    uneven = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 1.5
    levels = start + (end - start) * uneven
    # Two tiny steps first: methods that look back begin with a lower order.
    sigmas = torch.cat([levels[:1], levels[:1] - 1e-5, levels[:1] - 2e-5, levels[1:]])
    found = solver(normal_velocity, torch.ones(1, dtype=torch.float64), sigmas)
    return abs(found.item() - normal_path(start, end))


@pytest.mark.parametrize(
    ("name", "order"), [("euler", 1), ("heun", 2), ("deis_2m", 2), ("deis_3m", 3)]
)
def test_the_order_of_convergence_is_the_papers(name: str, order: int) -> None:
    errors = [error_of(SOLVERS[name], steps) for steps in (128, 256, 512)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", ["deis_2m", "deis_3m"])
@pytest.mark.parametrize("schedule", SCHEDULES.values())
@pytest.mark.parametrize("steps", [4, 8, 20])
def test_few_steps_are_enough_for_the_better_solvers(name: str, schedule, steps: int) -> None:
    """With as many passes as Euler, down to the end."""
    sigmas = schedule(steps, 1024, 1024, 1.0).double()
    assert passes(SOLVERS[name], sigmas) == passes(euler, sigmas) == steps

    def error(solver) -> float:
        found = solver(normal_velocity, torch.ones(1, dtype=torch.float64), sigmas)
        return abs(found.item() - normal_path(1, 0))

    assert error(SOLVERS[name]) < 0.7 * error(euler)


@pytest.mark.parametrize("solver", SOLVERS.values())
def test_every_solver_ends_at_the_data_and_keeps_the_dtype(solver) -> None:
    clean, noise = torch.full((1, 16, 2, 2), 3.0), torch.full((1, 16, 2, 2), -1.0)
    for dtype in (torch.float32, torch.bfloat16):
        velocity = (noise - clean).to(dtype)
        end = solver(lambda *_, v=velocity: v, noise.to(dtype), diffsynth_sigmas(5, 16, 16))
        assert end.dtype == dtype
        assert torch.allclose(end, clean.to(dtype), atol=1e-5 if dtype == FLOAT else 0.05)


def test_passes_are_counted() -> None:
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0])
    assert passes(euler, sigmas) == passes(SOLVERS["deis_3m"], sigmas) == 3
    assert passes(heun, sigmas) == 5
    assert passes(heun, sigmas[:-1]) == 4, "a run that stops early has no step to 0"


# Schedules


def test_the_resolution_aware_schedule_shifts_by_the_published_lengths() -> None:
    for side, mu in ((256, 0.5), (1024, 1.15)):
        shift = math.exp(mu)
        found = bfl_sigmas(4, side, side)
        expected = [shift / (shift + 1 / t - 1) for t in (1, 0.75, 0.5, 0.25)]
        assert found.tolist() == pytest.approx([*expected, 0])
    assert (bfl_sigmas(8, 1024, 1024)[1:-1] > bfl_sigmas(8, 512, 512)[1:-1]).all()


@pytest.mark.parametrize("schedule", SCHEDULES.values())
@pytest.mark.parametrize("strength", [1.0, 0.5, 0.01])
def test_all_steps_are_made_from_the_level_of_the_strength(schedule, strength: float) -> None:
    sigmas = schedule(6, 512, 768, strength)
    assert len(sigmas) == 7
    assert sigmas[-1] == 0
    assert (sigmas[1:] < sigmas[:-1]).all()
    fine = schedule(1000, 512, 768, 1.0)
    assert sigmas[0].item() == pytest.approx(fine[round(1000 * (1 - strength))].item(), abs=0.01)


def test_the_strength_of_diffsynth_is_ours() -> None:
    from diffsynth.diffusion import FlowMatchScheduler

    scheduler = FlowMatchScheduler("FLUX.1")
    scheduler.set_timesteps(9, denoising_strength=0.35)
    assert torch.equal(diffsynth_sigmas(9, 64, 64, 0.35)[:-1], scheduler.sigmas)


@pytest.mark.parametrize(
    "levels", [[1.0], [0.5, 1.0], [14.6, 0.0], [1.0, 0.5, 0.5, 0.0], [1.0, -0.1], [math.nan, 0.0]]
)
def test_levels_that_a_flow_model_cannot_follow_are_refused(levels: list[float]) -> None:
    with pytest.raises(ValueError, match="Noise levels must"):
        given_sigmas(torch.tensor(levels))


@pytest.mark.parametrize(("start", "end"), [(4, 9), (3, 3), (3, 2)])
def test_steps_that_are_not_there_are_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="no step from"):
        some_steps(diffsynth_sigmas, start, end)(4, 64, 64, 1.0)


# Against DiffSynth's pipeline, in its dtype


def their_latents(theirs, **options: object) -> Tensor:
    found: list[Tensor] = []
    decode = theirs.vae_decoder.forward

    def remember(latents: Tensor, **rest: object) -> Tensor:
        found.append(latents.clone())
        return decode(latents, **rest)

    theirs.vae_decoder.forward = remember
    theirs(
        prompt="a cat", seed=0, num_inference_steps=4, height=48, width=64,
        embedded_guidance=3.5, progress_bar_cmd=lambda steps: steps, **options,
    )  # fmt: skip
    theirs.vae_decoder.forward = decode
    return found[0].float()


@pytest.mark.usefixtures("one_step_at_a_time")
def test_cfg_is_diffsynths_bit_for_bit(make_pipeline) -> None:
    ours = make_pipeline()
    theirs = diffsynth_pipeline(ours)
    request = replace(REQUEST, cfg=2.5, negative="blurred")
    found = latents_of(ours, request, latents_dtype=torch.bfloat16)
    expected = their_latents(theirs, cfg_scale=2.5, negative_prompt="blurred")
    assert torch.equal(found, expected)
    assert not torch.equal(found, their_latents(theirs))


@pytest.mark.usefixtures("one_step_at_a_time")
def test_image_to_image_is_diffsynths_bit_for_bit(make_pipeline) -> None:
    ours = make_pipeline()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    theirs = diffsynth_pipeline(ours)
    theirs.vae_encoder = ours.vae.weights.module["encoder"]
    expected = their_latents(
        theirs, input_image=Image.fromarray(pixels), denoising_strength=0.6
    )  # fmt: skip
    # DiffSynth scales the bytes in bfloat16, so it is given to us as it encodes it.
    picture = theirs.preprocess_image(Image.fromarray(pixels)).to(torch.bfloat16)
    with torch.inference_mode():
        clean = theirs.vae_encoder(picture).float()
    request = replace(REQUEST, latents=clean, strength=0.6)
    assert torch.equal(latents_of(ours, request, latents_dtype=torch.bfloat16), expected)


# What a run begins from


def picture_of(rows: int = 48, columns: int = 64, count: int = 1) -> Tensor:
    return torch.rand(count, rows, columns, 3, generator=torch.Generator().manual_seed(3))


def test_a_picture_is_encoded_and_little_strength_changes_it_little(exact) -> None:
    picture = picture_of()
    clean, _ = parts.encode_pictures(exact, picture, lambda: None)

    def change(strength: float) -> float:
        request = replace(REQUEST, picture=picture, strength=strength)
        return (latents_of(exact, request) - clean).norm().item()

    assert change(0.01) < 0.2 * change(0.6) < change(1.0)


def test_strength_one_forgets_the_picture(exact) -> None:
    request = replace(REQUEST, picture=picture_of())
    assert torch.equal(latents_of(exact, request), latents_of(exact, REQUEST))


@pytest.mark.parametrize("solver", SOLVERS.values())
def test_what_the_mask_leaves_out_is_unchanged(exact, solver) -> None:
    clean = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 48, 64)
    mask[:, :, 32:] = 1
    request = replace(REQUEST, latents=clean, mask=mask, solver=solver, strength=0.8)
    found = latents_of(exact, request)
    assert torch.equal(found[..., :3], clean[..., :3])
    assert not torch.isclose(found[..., 4:], clean[..., 4:]).any()
    everything = replace(request, mask=torch.ones(1, 48, 64))
    whole = latents_of(exact, replace(request, mask=None))
    assert torch.allclose(latents_of(exact, everything), whole, atol=1e-4)
    assert not torch.allclose(found[..., 4:], whole[..., 4:], atol=1e-3), "it sees the rest"


def test_a_soft_mask_changes_less_where_it_is_softer(exact) -> None:
    clean = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(1))

    def change(value: float) -> float:
        request = replace(REQUEST, latents=clean, mask=torch.full((1, 6, 8), value))
        return (latents_of(exact, request) - clean).norm().item()

    assert change(0.0) == 0 < change(0.3) < change(0.7) < change(1.0)


def test_masks_of_any_size_are_brought_to_the_latents() -> None:
    mask = torch.zeros(1, 48, 64)
    mask[:, :24] = 1
    found = latent_mask(mask, (3, 16, 6, 8))
    assert found.shape == (3, 1, 6, 8)
    assert (found[:, :, :3] == 1).all()
    assert (found[:, :, 3:] == 0).all()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"cfg": 2.0, "negative": "blurred"},
        {"solver": heun},
        {"picture": picture_of(), "strength": 0.7},
        {"latents": torch.ones(1, 16, 6, 8), "mask": torch.full((1, 6, 8), 0.5)},
    ],
)
def test_each_picture_of_a_batch_equals_a_single_run(make_pipeline, change: dict) -> None:
    pipeline = make_pipeline()
    batch = latents_of(pipeline, replace(REQUEST, batch_size=3, **change))
    assert torch.equal(batch[:1], latents_of(pipeline, replace(REQUEST, **change)))
    third = replace(REQUEST, noise_of=[2], **change)
    assert torch.equal(batch[2:], latents_of(pipeline, third))


def test_several_pictures_are_each_painted_as_often_as_asked(exact) -> None:
    request = replace(REQUEST, picture=picture_of(count=2), strength=0.5, batch_size=2)
    found = latents_of(exact, request)
    assert len(found) == 4
    second = replace(REQUEST, picture=request.picture[1:], strength=0.5, noise_of=[3])
    assert torch.equal(found[3:], latents_of(exact, second))


@pytest.mark.parametrize("solver", [euler, heun])
@pytest.mark.parametrize("at", [1, 3])
def test_a_run_handed_over_equals_one_run(exact, solver, at: int) -> None:
    (prompt,), _ = parts.encode_prompts(exact, ["a cat"], lambda: None)
    whole = replace(REQUEST, prompt=prompt, solver=solver)
    expected, _ = parts.denoise(exact, whole, lambda _: None, lambda: None)
    first = replace(whole, schedule=some_steps(whole.schedule, 0, at))
    second = replace(whole, schedule=some_steps(whole.schedule, at, 99), add_noise=False)
    halfway, _ = parts.denoise(exact, first, lambda _: None, lambda: None)
    assert not torch.allclose(halfway, expected, atol=1e-2)
    found, _ = parts.denoise(exact, replace(second, latents=halfway), lambda _: None, lambda: None)
    assert torch.allclose(found, expected, atol=1e-5)


def test_progress_counts_passes_and_shows_the_estimate(exact) -> None:
    for change, expected in (
        ({}, 4),
        ({"solver": heun}, 7),
        ({"cfg": 2.0}, 4),
        ({"cfg": 2.0, "solver": heun}, 7),
    ):
        request = replace(REQUEST, **change)
        seen: list[Tensor] = []
        found = paint(exact, request, seen.append, lambda: None)[1]
        assert len(seen) == request.passes == expected
        assert torch.allclose(seen[-1].float(), found, atol=1e-4), "at the end it is the picture"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strength": 0.0}, "Strength must be"),
        ({"strength": 1.1}, "Strength must be"),
        ({"strength": 0.5}, "needs a picture to begin from"),
        ({"mask": torch.ones(1, 6, 8)}, "mask needs a picture"),
        (
            {"latents": torch.ones(1, 16, 6, 8), "picture": picture_of()},
            "both a picture and latents",
        ),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(REQUEST, **change)


def test_cfg_one_runs_one_pass_and_encodes_no_negative_prompt(exact) -> None:
    latents_of(exact, replace(REQUEST, negative="blurred"))
    assert exact.text_encoders.recall("blurred") is None
    latents_of(exact, replace(REQUEST, negative="blurred", cfg=1.5))
    assert exact.text_encoders.recall("blurred") is not None


def test_the_parts_alone_make_the_same_picture(exact) -> None:
    nothing = lambda *_: None  # noqa: E731
    picture, latents, _ = paint(exact, REQUEST, nothing, nothing)
    (prompt,), _ = parts.encode_prompts(exact, ["a cat"], nothing)
    found, _ = parts.denoise(exact, replace(REQUEST, prompt=prompt), nothing, nothing)
    assert torch.equal(found, latents)
    assert torch.equal(parts.decode(exact, found, nothing)[0], picture)


def test_a_prompt_may_bring_its_own_guidance(exact) -> None:
    (prompt,), _ = parts.encode_prompts(exact, ["a cat"], lambda: None)
    own = replace(REQUEST, prompt=replace(prompt, guidance=1.5))
    expected = latents_of(exact, replace(REQUEST, guidance=1.5))
    assert torch.equal(latents_of(exact, own), expected)
    assert not torch.equal(expected, latents_of(exact, REQUEST))
