"""The same small weights through DiffSynth's own pipeline."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffsynth_pipeline import diffsynth_pipeline
from PIL import Image

from majicflux.engine.flux.picture_conditions import PictureConditions
from majicflux.engine.latents import draw_noise
from majicflux.engine.run.pipeline import paint
from majicflux.engine.run.request import GenerationRequest
from majicflux.engine.sampling.inputs import SamplerInputs
from majicflux.engine.sampling.loop import sample
from majicflux.engine.sampling.schedules import diffsynth_sigmas

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


@pytest.mark.usefixtures("one_step_at_a_time")
def test_a_reference_is_seen_as_diffsynths_kontext_sees_it(make_pipeline) -> None:
    ours = make_pipeline()
    theirs = diffsynth_pipeline(ours)
    theirs.vae_encoder = ours.vae.weights.module["encoder"]
    found = {}

    def encoded(pictures: torch.Tensor, **options: object) -> torch.Tensor:
        found["reference"] = encode(pictures, **options)
        return found["reference"]

    def remember(latents: torch.Tensor, **options: object) -> torch.Tensor:
        found["latents"] = latents.clone()
        return decode(latents, **options)

    encode, decode = theirs.vae_encoder.forward, theirs.vae_decoder.forward
    theirs.vae_encoder.forward, theirs.vae_decoder.forward = encoded, remember
    pixels = torch.rand(48, 80, 3, generator=torch.Generator().manual_seed(0))
    theirs(
        prompt=PROMPT, seed=7, num_inference_steps=4, height=96, width=128, embedded_guidance=3.5,
        kontext_images=Image.fromarray((255 * pixels).byte().numpy()),
        progress_bar_cmd=lambda steps: steps,
    )  # fmt: skip
    theirs.vae_encoder.forward, theirs.vae_decoder.forward = encode, decode
    request = GenerationRequest(PROMPT, seed=7, steps=4, guidance=3.5, width=128, height=96)
    shown = PictureConditions(references=(found["reference"].float(),))

    def latents(**changes: object) -> torch.Tensor:
        given = dataclasses.replace(request, **changes)
        dtype = torch.bfloat16
        return paint(ours, given, lambda *_: None, lambda: None, latents_dtype=dtype)[1]

    expected = found["latents"].float()
    assert torch.equal(latents(reference=shown), expected)
    assert (latents() - expected).norm() > 0.01 * expected.norm()


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
