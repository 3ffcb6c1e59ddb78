"""Prompt -> picture: the three components, in turn, inside one VRAM budget."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoise import OnStep, euler, flux_velocity, modulation_of_steps
from .flux_dit import DiT
from .latents import CHANNELS, draw_noise
from .offload import BeforeBlock
from .products import Computing
from .schedule import shifted_sigmas
from .sizes import PATCH, PIXELS_PER_LATENT, size_problem
from .text_encoders import TextEmbedding, TextEncoders
from .vae import VAE

log = logging.getLogger("majicflux")

MAX_STEPS = 100
MAX_SEED = 2**64 - 1

# Working memory, by adding up the live bytes of DiffSynth 2.1.12's forward at full size: 664 MB in
# a single block at 4608 tokens of width 3072, 1.71 GB in the VAE at 1024x1024, both in bfloat16.
DIT_VALUES_PER_TOKEN_AND_CHANNEL = 24
VAE_VALUES_PER_PIXEL = 850
TEXT_ENCODER_BYTES = 150 * 2**20


@dataclass(frozen=True)
class Pipeline:
    """Three components and how they may use the compute device.

    budget_bytes: upper limit for weights and working memory together, or None for whatever the
    host grants. Working memory is an estimate here, so the limit is kept to its accuracy.
    """

    dit: DiT
    text_encoders: TextEncoders
    vae: VAE
    budget_bytes: int | None
    computing: Computing

    def __post_init__(self) -> None:
        channels = self.dit.geometry.in_channels
        if channels != CHANNELS * PATCH**2:
            raise ValueError(
                f"This transformer takes {channels} input channels, so it is a fill, depth or "
                "canny model, which needs a picture too. Choose a text-to-image model."
            )


@dataclass(frozen=True)
class Request:
    """What to paint. Sizes in pixels, multiples of 16."""

    prompt: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name, size in (("Width", self.width), ("Height", self.height)):
            if problem := size_problem(name, size):
                raise ValueError(problem)
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"Steps must be 1 to {MAX_STEPS}, not {self.steps}.")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"The seed must be 0 to {MAX_SEED}, not {self.seed}.")
        if self.batch_size < 1:
            raise ValueError(f"The batch size must be at least 1, not {self.batch_size}.")


@torch.inference_mode()
def paint(
    pipeline: Pipeline,
    request: Request,
    on_step: OnStep,
    before_block: BeforeBlock,
    latents_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Run the request; `before_block` is called before each block of weights and may raise.

    Returns float32 RGB [batch, height, width, 3] in 0..1 and the float32 latents
    [batch, 16, height/8, width/8] in model space, both on the CPU.
    """
    text = _embed(pipeline, request.prompt, before_block)
    latents = _denoise(pipeline, request, text, on_step, before_block, latents_dtype)
    return _decode(pipeline, latents, before_block), latents.float().cpu()


def _embed(pipeline: Pipeline, prompt: str, before_block: BeforeBlock) -> TextEmbedding:
    encoders = pipeline.text_encoders
    remembered = encoders.recall(prompt)
    if remembered is not None:
        return remembered
    _make_room(pipeline, encoders, TEXT_ENCODER_BYTES)
    with _timed("text encoders"):
        return encoders.encode(prompt, before_block)


def _denoise(
    pipeline: Pipeline,
    request: Request,
    text: TextEmbedding,
    on_step: OnStep,
    before_block: BeforeBlock,
    latents_dtype: torch.dtype,
) -> Tensor:
    dit, dtype = pipeline.dit, pipeline.computing.dtype
    noise = draw_noise(request.seed, request.batch_size, request.width, request.height)
    tokens = noise.shape[2] * noise.shape[3] // PATCH**2 + text.tokens.shape[1]
    values = DIT_VALUES_PER_TOKEN_AND_CHANNEL * tokens * dit.geometry.hidden * len(noise)
    _make_room(pipeline, dit, values * dtype.itemsize)
    device = dit.patcher.device
    with (
        _timed("denoising"),
        dit.weights.running_on(device, before_block) as module,
        pipeline.computing.applied_to(module, device),
    ):
        latents, sigmas = noise.to(device, latents_dtype), shifted_sigmas(request.steps)
        given = (module, text, request.guidance, dtype)
        velocity = flux_velocity(*given, modulation_of_steps(*given, latents, sigmas))
        return euler(velocity, latents, sigmas, on_step)


def _decode(pipeline: Pipeline, latents: Tensor, before_block: BeforeBlock) -> Tensor:
    vae = pipeline.vae
    pixels = latents.shape[2] * latents.shape[3] * PIXELS_PER_LATENT**2
    _make_room(pipeline, vae, VAE_VALUES_PER_PIXEL * pixels * vae.dtype.itemsize)
    with _timed("VAE decode"):
        return vae.decode(latents, before_block)


def _make_room(pipeline: Pipeline, component: DiT | TextEncoders | VAE, values_bytes: int) -> None:
    """Make `component` ready to run; the others leave the device as far as the budget demands."""
    weights = component.weights
    # A streamed block, and one matrix of it converted to the compute dtype, are working memory too.
    working = values_bytes + 2 * weights.largest_block_bytes
    if pipeline.budget_bytes is None:
        component.patcher.load(working, weight_cap=None)
        return
    cap = max(0, pipeline.budget_bytes - working)
    spare = max(0, cap - weights.total_bytes)
    for other in (pipeline.dit, pipeline.text_encoders, pipeline.vae):
        if other is not component:
            other.patcher.release(max(0, other.weights.resident_bytes - spare))
            spare -= other.weights.resident_bytes
    component.patcher.load(working, cap)


@contextmanager
def _timed(phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    log.info("%s: %.1f s", phase, time.perf_counter() - start)
