"""The same small weights through DiffSynth's own pipeline."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import RecordingPatcher
from diffsynth_pipeline import diffsynth_pipeline
from PIL import Image

from majicflux.engine.flux.picture_conditions import NO_PICTURES, PictureConditions
from majicflux.engine.flux.transformer import DiT
from majicflux.engine.latents import draw_noise
from majicflux.engine.run.pipeline import Pipeline, paint
from majicflux.engine.run.request import GenerationRequest
from majicflux.engine.sampling.inputs import SamplerInputs
from majicflux.engine.sampling.loop import sample
from majicflux.engine.sampling.schedules import diffsynth_sigmas
from majicflux.loaders.flux_dit import load_flux_dit

PROMPT = "a cat on a roof 屋顶上的猫"


@pytest.mark.parametrize("steps", [1, 2, 20, 50])
def test_the_schedule_is_diffsynths(steps: int) -> None:
    from diffsynth.diffusion import FlowMatchScheduler

    scheduler = FlowMatchScheduler("FLUX.1")
    scheduler.set_timesteps(steps)
    assert torch.equal(diffsynth_sigmas(steps, 64, 64)[:-1], scheduler.sigmas)


@pytest.mark.usefixtures("one_step_at_a_time")
@pytest.mark.parametrize(("prompt", "words"), [(PROMPT, 512), (PROMPT + " many words" * 60, 768)])
def test_latents_and_picture_are_diffsynths_bit_for_bit(
    make_pipeline, prompt: str, words: int
) -> None:
    ours = make_pipeline()  # bfloat16 weights and arithmetic
    theirs = diffsynth_pipeline(ours)
    final = SimpleNamespace(latents=None)
    decode = theirs.vae_decoder.forward

    def remember(latents: torch.Tensor, **options: object) -> torch.Tensor:
        final.latents = latents.clone()
        return decode(latents, **options)

    theirs.vae_decoder.forward = remember
    picture = theirs(
        prompt=prompt, seed=7, num_inference_steps=4, height=96, width=128, embedded_guidance=3.5,
        t5_sequence_length=words, progress_bar_cmd=lambda steps: steps,
    )  # fmt: skip
    theirs.vae_decoder.forward = decode

    request = GenerationRequest(prompt, seed=7, steps=4, guidance=3.5, width=128, height=96)
    image, latents, _ = paint(
        ours, request, lambda *_: None, lambda: None, latents_dtype=torch.bfloat16
    )
    assert torch.equal(latents, final.latents.float())
    # DiffSynth rounds the picture to bytes; ours is the float picture that it rounds.
    their_pixels = torch.from_numpy(np.array(picture))
    assert ((image[0] * 255) - their_pixels.float()).abs().max() <= 1.5


def seen_by_diffsynth(ours: Pipeline, **pictures: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents of its picture, and what its VAE made of the one that it was shown."""
    theirs = diffsynth_pipeline(ours)
    theirs.vae_encoder = ours.vae.weights.module["encoder"]
    found = {}

    def encoded(pictures: torch.Tensor, **options: object) -> torch.Tensor:
        found["shown"] = encode(pictures, **options)
        return found["shown"]

    def remember(latents: torch.Tensor, **options: object) -> torch.Tensor:
        found["latents"] = latents.clone()
        return decode(latents, **options)

    encode, decode = theirs.vae_encoder.forward, theirs.vae_decoder.forward
    theirs.vae_encoder.forward, theirs.vae_decoder.forward = encoded, remember
    try:
        theirs(
            prompt=PROMPT, seed=7, num_inference_steps=4, height=96, width=128,
            embedded_guidance=3.5, progress_bar_cmd=lambda steps: steps, **pictures,
        )  # fmt: skip
    finally:
        theirs.vae_encoder.forward, theirs.vae_decoder.forward = encode, decode
    return found["latents"].float(), found["shown"].float()


def seen_by_us(ours: Pipeline, pictures: PictureConditions) -> torch.Tensor:
    request = GenerationRequest(
        PROMPT, seed=7, steps=4, guidance=3.5, width=128, height=96, reference=pictures
    )
    dtype = torch.bfloat16
    return paint(ours, request, lambda *_: None, lambda: None, latents_dtype=dtype)[1]


def drawn(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("one_step_at_a_time", "narrow")
def test_a_reference_is_seen_as_diffsynths_kontext_sees_it(make_pipeline) -> None:
    ours, picture = make_pipeline(), (255 * drawn(48, 80, 3)).byte().numpy()
    expected, shown = seen_by_diffsynth(ours, kontext_images=Image.fromarray(picture))
    assert torch.equal(seen_by_us(ours, PictureConditions(references=(shown,))), expected)
    plain = seen_by_us(ours, NO_PICTURES)
    assert (plain - expected).norm() > 0.01 * expected.norm()


@pytest.mark.usefixtures("one_step_at_a_time", "narrow")
def test_a_picture_is_filled_as_diffsynth_fills_it(make_pipeline, plain, saved) -> None:
    ours = make_pipeline()
    first = {"img_in.weight": (drawn(len(plain["img_in.weight"]), 384) - 0.5).bfloat16() / 10}
    weights, geometry = load_flux_dit(saved(plain | first), ours.dit.precision)
    dit = DiT(weights, RecordingPatcher(weights), geometry, ours.dit.precision)
    ours = dataclasses.replace(ours, dit=dit)
    picture, mask = (255 * drawn(96, 128, 3)).byte().numpy(), (drawn(96, 128) > 0.7)
    expected, shown = seen_by_diffsynth(
        ours,
        flux_fill_image=Image.fromarray(picture),
        flux_fill_mask=Image.fromarray(255 * mask.byte().numpy()),
    )
    given = PictureConditions(shown, mask[None, None].float())
    assert torch.equal(seen_by_us(ours, given), expected)
    unmasked = PictureConditions(shown, torch.ones(1, 1, 96, 128))
    assert (seen_by_us(ours, unmasked) - expected).norm() > 0.001 * expected.norm()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("steps", "guidance"), [(20, 3.5), (1, 4.0)])
def test_float32_latents_stay_closer_to_exact_arithmetic(
    make_pipeline, steps: int, guidance: float
) -> None:
    """Why latents, conditions and the residual are float32 while products are not. With one step
    and a guidance of 4, bfloat16 holds what is embedded exactly: what is left is their rounding."""
    request = GenerationRequest(PROMPT, seed=7, steps=steps, guidance=guidance, width=64, height=64)

    def latents(mode: str, dtype: torch.dtype) -> torch.Tensor:
        pipeline = make_pipeline(mode=mode)
        return paint(pipeline, request, lambda *_: None, lambda: None, latents_dtype=dtype)[1]

    exact = latents("float32", torch.float32)
    error = {
        dtype: (latents("bfloat16", dtype) - exact).norm()
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert error[torch.float32] < 0.5 * error[torch.bfloat16]


def test_noise_is_torchs_for_the_seed() -> None:
    torch.manual_seed(123)
    expected = torch.randn(2, 16, 12, 8)
    assert torch.equal(draw_noise(123, (2, 16, 12, 8)), expected)


def test_euler_integrates_a_straight_line_exactly() -> None:
    clean, noise = torch.full((1, 16, 2, 2), 3.0), torch.full((1, 16, 2, 2), -1.0)
    seen: list[torch.Tensor] = []
    task = SamplerInputs(diffsynth_sigmas(5, 16, 16), noise)
    given = (seen.append, torch.device("cpu"), torch.float32)
    end = sample(task, lambda x, sigma: noise - clean, *given)
    assert torch.allclose(end, clean, atol=1e-5)
    assert len(seen) == 5
    assert all(torch.allclose(x0, clean, atol=1e-5) for x0 in seen)
