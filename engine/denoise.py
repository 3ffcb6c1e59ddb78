"""The denoising loop and the call into DiffSynth's Flux forward."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .text_encoders import TextEmbedding

# velocity(latents, sigma) -> d(latents)/d(sigma), same shape as latents
Velocity = Callable[[Tensor, Tensor], Tensor]
# on_step(steps done, estimate of the clean latents)
OnStep = Callable[[int, Tensor], None]
# for each block, what each of its modulation layers gives, [1, 1, n * width]
Modulation = Sequence[Sequence[Tensor]]


def euler(velocity: Velocity, latents: Tensor, sigmas: Tensor, on_step: OnStep) -> Tensor:
    """Integrate from sigmas[0] down to 0. The dtype of `latents` is kept between steps.

    latents: [batch, 16, h, w] in model space; sigmas: float32 [steps], falling, on the CPU.
    """
    following = torch.cat([sigmas[1:], sigmas.new_zeros(1)])
    for step, (sigma, sigma_next) in enumerate(zip(sigmas, following, strict=True), start=1):
        slope = velocity(latents, sigma).to(latents.dtype)
        clean = latents - slope * sigma
        latents = latents + slope * (sigma_next - sigma)
        on_step(step, clean)
    return latents


def flux_velocity(
    dit: Any,
    text: TextEmbedding,
    guidance: float,
    compute_dtype: torch.dtype,
    modulation: Mapping[float, Modulation] | None = None,
) -> Velocity:
    """DiffSynth's `model_fn_flux_image` as a function of the latents and sigma.

    The timestep and the guidance take the dtype of the latents, as in DiffSynth, where bfloat16
    latents therefore mean a guidance of 3504 instead of 3500; float32 latents keep both exact.
    modulation: what `modulation_of_steps` gave, by sigma; other sigmas compute their own.
    """
    from diffsynth.pipelines.flux_image import model_fn_flux_image

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        batch, _, height, width = latents.shape
        device = latents.device
        prompt = text.tokens.to(device, compute_dtype).expand(batch, -1, -1)
        with _modulated(dit, (modulation or {}).get(sigma.item())):
            return model_fn_flux_image(
                dit=dit,
                latents=latents.to(compute_dtype),
                timestep=_timestep(sigma, latents),
                prompt_emb=prompt,
                pooled_prompt_emb=text.pooled.to(device, compute_dtype).expand(batch, -1),
                guidance=torch.full((batch,), guidance, device=device, dtype=latents.dtype),
                text_ids=torch.zeros(batch, prompt.shape[1], 3, device=device),
                image_ids=_image_ids(batch, height // 2, width // 2, device),
            )

    return velocity


def modulation_of_steps(
    dit: Any,
    text: TextEmbedding,
    guidance: float,
    compute_dtype: torch.dtype,
    latents: Tensor,
    sigmas: Tensor,
) -> dict[float, Modulation]:
    """The modulation of every block for every sigma, by sigma; one call of each layer.

    It depends on the step, the guidance and the pooled text alone, while its layers are a quarter
    of the parameters: computed before the first step, they need not travel at every step.
    """
    pooled = dit.pooled_text_embedder(text.pooled.to(latents.device, compute_dtype))
    strength = torch.full((1,), guidance, device=latents.device, dtype=latents.dtype) * 1000

    def conditioning(sigma: Tensor) -> Tensor:  # in DiffSynth's order
        found = dit.time_embedder(_timestep(sigma, latents), compute_dtype) + pooled
        if dit.guidance_embedder is None:
            return found
        return found + dit.guidance_embedder(strength, compute_dtype)

    active = F.silu(torch.cat([conditioning(sigma) for sigma in sigmas]))[:, None]
    found = [[layer(active) for layer in block.modulation_layers()] for block in _blocks(dit)]
    return {
        sigma.item(): [[layer[step, None] for layer in block] for block in found]
        for step, sigma in enumerate(sigmas)
    }


@contextmanager
def _modulated(dit: Any, modulation: Modulation | None) -> Iterator[None]:
    if modulation is None:
        yield
        return
    for block, values in zip(_blocks(dit), modulation, strict=True):
        block.modulation = values
    try:
        yield
    finally:
        for block in _blocks(dit):
            block.modulation = None


def _blocks(dit: Any) -> list[Any]:
    return [*dit.blocks, *dit.single_blocks]


def _timestep(sigma: Tensor, latents: Tensor) -> Tensor:
    return (sigma * 1000).to(latents.device, latents.dtype).reshape(1)


def _image_ids(batch: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Position of each 2x2 latent patch, float32 [batch, rows*columns, 3] as (0, row, column).

    Float32, because DiffSynth's own ids take the latents' dtype and bfloat16 skips integers
    above 256, which a side of 4096 pixels reaches.
    """
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)
    return ids.reshape(1, rows * columns, 3).expand(batch, -1, -1)
