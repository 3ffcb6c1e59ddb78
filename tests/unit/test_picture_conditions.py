"""Pictures that a CONDITIONING brings: in every precision, in a budget, in batches, or refused."""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RecordingPatcher, build_pipeline
from torch import Tensor

from file_layouts import Tensors
from lora_dialects import control_lora
from majicflux.benchmarks.random_models import CLIP, DIT, T5
from majicflux.engine.errors import EngineError
from majicflux.engine.flux.transformer import DiT
from majicflux.engine.latents import to_model_space
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.engine.run.pipeline import Pipeline, denoise
from majicflux.engine.run.request import GenerationRequest
from majicflux.host import native
from majicflux.loaders.flux_dit import load_flux_dit
from majicflux.loaders.lora import load_lora
from majicflux.nodes.denoise import Denoise
from majicflux.nodes.encode_image import EncodeImage
from majicflux.nodes.encode_prompt import EncodePrompt
from majicflux.nodes.sample import Sample

pytestmark = pytest.mark.usefixtures("one_thread")
ACCELERATOR = torch.device("cpu", 0)  # another device than `cpu` to PyTorch's comparisons


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning(seed: int = 0, **options: Any) -> list[Any]:
    pooled = {"pooled_output": randn(1, CLIP.width, seed=seed)}
    return [[randn(1, 40, T5.width, seed=seed), pooled | options]]


def references(*shapes: tuple[int, int], seed: int = 0) -> dict[str, Any]:
    return {"reference_latents": [randn(1, 16, *shape, seed=seed) for shape in shapes]}


CONTROL = 64 + 128  # channels of the first layer, and of that of a control LoRA beside it
BESIDE = {"concat_latent_image": randn(1, 16, 6, 8), "concat_mask": randn(1, 1, 48, 64)}
# Channels of the transformer, and what positive and negative bring.
GIVEN = {
    "fill": (384, BESIDE, {**BESIDE, "concat_mask": randn(1, 1, 20, 20)}),
    "depth": (128, BESIDE, BESIDE),
    "control LoRA": (CONTROL, BESIDE, BESIDE),
    "one reference": (64, references((6, 8)), {}),
    "other references": (64, references((6, 8), (7, 5)), references((10, 4), seed=1)),
}


@pytest.fixture
def make(models: Path, plain: Tensors, saved: Callable) -> Callable[..., Pipeline]:
    """A pipeline whose transformer takes so many channels, in float32 unless `mode` is another."""

    def made(channels: int, precision: str = "bfloat16", **options: Any) -> Pipeline:
        pipeline = build_pipeline(models, PRECISIONS[precision], torch.float32, **options)
        own = 64 if channels == CONTROL else channels
        wide = plain | {"img_in.weight": randn(DIT.hidden, own).bfloat16() / own**0.5}
        weights, geometry = load_flux_dit(saved(wide), PRECISIONS[precision])
        patcher = RecordingPatcher(weights, pipeline.dit.patcher.device)
        dit = DiT(weights, patcher, geometry, pipeline.dit.precision)
        if channels == CONTROL:
            lora = load_lora(saved(control_lora(), "lora.safetensors"), geometry, CLIP)
            dit = dit.with_adapters(((lora, 0.6),))
        return replace(pipeline, dit=dit)

    return made


def requested(pipeline: Pipeline, positive: Any, negative: Any = None, **changes: Any):
    geometry = pipeline.dit.geometry
    prompt = native.from_conditioning("positive", positive, geometry)
    request = GenerationRequest(prompt, seed=0, steps=2, guidance=3.5, width=64, height=48)
    if negative is not None:
        away = native.from_conditioning("negative", negative, geometry)
        request = replace(request, negative=away, cfg=2.0)
    return replace(request, **changes)


def painted(pipeline: Pipeline, request: GenerationRequest) -> Tensor:
    return denoise(pipeline, request, lambda _: None, lambda: None)[0]


# Each kind of pictures in two of them: what is shown and how it is computed hardly meet.
COMPUTED = [
    ("bfloat16", ""), ("float8_e4m3fn", ""), ("int8 rotated", ""), ("int8 rotated", "8-bit"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "precision", "mode"),
    [(g, *c) for g, c in zip([*GIVEN] * 2, cycle(COMPUTED), strict=False)],
)
def test_streamed_is_resident_bit_for_bit(make, given: str, precision: str, mode: str) -> None:
    channels, *of_prompts = GIVEN[given]
    prompts = [conditioning(n, **options) for n, options in enumerate(of_prompts)]
    pipeline = make(channels, precision, device=ACCELERATOR, mode=mode)
    request = requested(pipeline, *prompts, batch_size=2)
    expected = painted(pipeline, request)
    smallest = pipeline.plan(request.workload, [pipeline.denoise]).smallest_bytes
    streamed = make(channels, precision, device=ACCELERATOR, mode=mode, budget_bytes=smallest)
    plan = streamed.plan(request.workload, [streamed.denoise])
    assert plan.stages[0].visiting
    assert torch.equal(painted(streamed, request), expected)


@pytest.mark.parametrize("given", GIVEN)
def test_chunks_and_groups_of_heads_paint_the_same(make, monkeypatch, given: str) -> None:
    from majicflux.engine.offload import chunking
    from majicflux.engine.run import pipeline_run

    channels, *of_prompts = GIVEN[given]
    pipeline = make(channels)
    request = requested(pipeline, *(conditioning(n, **o) for n, o in enumerate(of_prompts)))
    expected = painted(pipeline, request)
    monkeypatch.setattr(pipeline_run, "Chunking", lambda *_: chunking.Chunking(tokens=64, groups=2))
    monkeypatch.setattr(chunking, "ROW_MULTIPLE", 8)
    found = painted(pipeline, request)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("given", GIVEN)
def test_the_pictures_of_a_batch_are_those_that_are_painted_alone(make, given: str) -> None:
    channels, *of_prompts = GIVEN[given]
    pipeline = make(channels)
    prompts = [conditioning(n, **options) for n, options in enumerate(of_prompts)]
    both = painted(pipeline, requested(pipeline, *prompts, batch_size=2))
    latents = torch.zeros(1, 16, 6, 8)
    for number in range(2):
        alone = requested(pipeline, *prompts, latents=latents, noise_of=[number])
        found = painted(pipeline, alone)[0]
        assert ((found - both[number]).norm() / found.norm()).item() < 1e-5


def test_each_picture_of_a_batch_has_its_own_reference(make) -> None:
    pipeline = make(64)
    two = randn(2, 16, 6, 8)
    both = painted(
        pipeline, requested(pipeline, conditioning(reference_latents=[two]), batch_size=2)
    )
    for number in range(2):
        alone = conditioning(reference_latents=[two[number : number + 1]])
        request = requested(pipeline, alone, latents=torch.zeros(1, 16, 6, 8), noise_of=[number])
        found = painted(pipeline, request)[0]
        assert ((found - both[number]).norm() / found.norm()).item() < 1e-5


def test_another_picture_with_the_same_prompt_is_seen(make) -> None:
    """Although what the prompt means to each step is remembered."""
    pipeline, text = make(64), conditioning()
    found = []
    for seed in (0, 1, 0):
        tokens, options = text[0]
        given = [[tokens, options | references((6, 8), seed=seed)]]
        found.append(painted(pipeline, requested(pipeline, given)))
    assert torch.equal(found[0], found[2])
    assert ((found[1] - found[0]).norm() / found[0].norm()).item() > 0.01


def test_a_noise_mask_is_the_mask_of_a_fill_model_that_is_given_no_other(make) -> None:
    pipeline = make(384)
    image = {"concat_latent_image": randn(1, 16, 6, 8)}
    mask = torch.zeros(1, 6, 8)
    mask[:, :, 4:] = 1
    given = {"latents": to_model_space(randn(1, 16, 6, 8)), "mask": mask}
    alone = painted(pipeline, requested(pipeline, conditioning(**image), **given))
    named = conditioning(**image, concat_mask=mask[:, None])
    assert torch.allclose(alone, painted(pipeline, requested(pipeline, named, **given)), atol=1e-5)


def test_each_picture_is_filled_where_its_own_mask_says(make) -> None:
    pipeline = make(384)
    pictures = torch.rand(2, 48, 64, 3, generator=torch.manual_seed(3))
    masks = torch.zeros(2, 48, 64)
    masks[0, :, :32] = 1
    masks[1, :24] = 1

    def sampled(images: Tensor, mask: Tensor, batch_size: int = 1) -> Tensor:
        given = ("a cat", 0, 2, 3.5, 64, 48, batch_size)
        return Sample.execute(pipeline, *given, image=images, mask=mask).args[1]["samples"]

    found = sampled(pictures, masks, 2)
    assert len(found) == 4
    alone = sampled(pictures[:1], masks[:1])[0]
    assert ((found[0] - alone).norm() / alone.norm()).item() < 1e-4
    one_mask = sampled(pictures, masks[1:], 2)
    for number in (1, 3):
        difference = (one_mask[number] - found[number]).norm() / found[number].norm()
        assert difference.item() < 1e-4


@pytest.mark.parametrize("channels", [64, 128, CONTROL])
def test_references_of_sample_are_those_of_a_conditioning(make, channels: int) -> None:
    """Each picture of a batch is a reference of Kontext's, or the map of a picture."""
    pipeline = make(channels)
    images = torch.rand(2, 64, 32, 3, generator=torch.manual_seed(3))
    latents = EncodeImage.execute(pipeline, images).args[0]["samples"]
    options = (
        {"reference_latents": [*latents.split(1)]}
        if channels == 64
        else {"concat_latent_image": latents}
    )

    def told(prompt: str, **pictures: Any) -> Any:
        ((tokens, given),) = EncodePrompt.execute(pipeline, prompt, 3.5).args[0]
        return [[tokens, given | pictures]]

    def sampled(**inputs: Any) -> Tensor:
        given = (pipeline, "a cat", 0, 2, 3.5, 64, 48, 2)
        return Sample.execute(*given, cfg=2.0, negative_prompt="fog", **inputs).args[1]["samples"]

    found = sampled(reference=images)
    expected = sampled(positive=told("a cat", **options), negative=told("fog", **options))
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5
    other = sampled(reference=images.flip(0, 1))
    assert ((other - found).norm() / found.norm()).item() > 1e-3


def test_a_fill_model_takes_no_reference(make) -> None:
    with pytest.raises(ValueError, match="takes no reference: connect image and mask"):
        Sample.execute(make(384), "a cat", 0, 2, 3.5, 64, 48, 1, reference=torch.ones(1, 48, 64, 3))


def test_a_reference_is_not_passed_over_for_that_of_a_conditioning(make) -> None:
    pipeline = make(64)
    given = {"positive": conditioning(**references((6, 8))), "reference": torch.ones(1, 48, 64, 3)}
    with pytest.raises(ValueError, match="positive brings pictures of its own, and reference too"):
        Sample.execute(pipeline, "", 0, 2, 3.5, 64, 48, 1, **given)


def test_a_control_lora_asks_for_a_picture(make) -> None:
    pipeline = make(CONTROL)
    with pytest.raises(EngineError, match=r"takes 128 channels, .* control LoRA: it needs a pic"):
        Sample.execute(pipeline, "a cat", 0, 2, 3.5, 64, 48, 1)
    with pytest.raises(ValueError, match="canny models and control LoRAs cannot take"):
        native.from_conditioning(
            "positive", conditioning(**references((6, 8))), pipeline.dit.geometry
        )


@pytest.mark.parametrize("given", [{}, references((6, 8))])
def test_a_fill_model_asks_for_a_picture(make, given: dict[str, Any]) -> None:
    pipeline, latent = make(384), {"samples": torch.zeros(1, 16, 6, 8)}
    positive = conditioning(**given)
    refused = "fill, depth or canny" if not given else "reference_latents, which fill, depth and"
    with pytest.raises(ValueError, match=refused):
        Denoise.execute(pipeline, positive, latent, 0, 2, 3.5)
    with pytest.raises(EngineError, match=r"needs a picture too\. Connect image"):
        Sample.execute(pipeline, "a cat", 0, 2, 3.5, 64, 48, 1)
    with pytest.raises(EngineError, match="needs a picture too"):  # the negative prompt brings none
        Denoise.execute(
            pipeline, conditioning(**BESIDE), latent, 0, 2, 3.5, conditioning(), cfg=2.0
        )


@pytest.mark.parametrize(
    ("channels", "given", "words"),
    [
        (64, {"reference_latents": [torch.zeros(1, 4, 6, 8)]}, r"has reference_latents of the sha"),
        (64, {"reference_latents": [torch.zeros(1, 16, 1, 6, 8)]}, "reference_latents of the shap"),
        (64, {"reference_latents": ["a cat"]}, "reference_latents takes LATENT"),
        (64, {"reference_latents": [torch.full((1, 16, 6, 8), torch.nan)]}, "NaN"),
        (64, references((6, 8)) | {"reference_latents_method": "index_timestep_zero"},
         "places its references by index_timestep_zero"),
        (128, {"concat_latent_image": torch.zeros(1, 4, 6, 8)}, "has concat_latent_image of the"),
        (384, {"concat_mask": torch.full((1, 1, 6, 8), torch.inf)}, "NaN or infinity"),
        (64, {"attention_mask": torch.ones(1, 5, 5)}, "carries attention_mask, .* Choose multiply"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(channels, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        native.from_conditioning(
            "positive", conditioning(**given), replace(DIT, in_channels=channels)
        )
