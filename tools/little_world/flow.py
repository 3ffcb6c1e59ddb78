"""Rectified flow: from pictures to noise in training, and back for a look at what was learnt."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ...engine.latents import draw_noise
from ...engine.sampling.schedules import SIGMA_MIN, diffsynth_sigmas
from ...engine.sizes import CHANNELS, PIXELS_PER_LATENT
from .learner import bfloat16_on_a_card
from .models import LittleFlux
from .supply import Size
from .vocabulary import T5_LENGTH, Words

GUIDANCE = (1.0, 6.0)  # the strengths that are learnt
PACK_T5_LENGTH = 512  # tokens of T5 that the pack gives the transformer
TRAINING_SHIFT = 2.0  # the sampler has 3, but small errors at low noise are seen too


def draw_sigmas(count: int, device: torch.device) -> Tensor:
    """Half uniform, half in the middle, then all shifted towards noise as the sampler does."""
    uniform = torch.rand(count, device=device)
    middle = torch.sigmoid(torch.randn(count, device=device))
    u = torch.where(torch.rand(count, device=device) < 0.5, uniform, middle)
    return (TRAINING_SHIFT * u / (1 + (TRAINING_SHIFT - 1) * u)).clamp(SIGMA_MIN, 1.0)


def draw_guidance(count: int, device: torch.device) -> Tensor:
    low, high = GUIDANCE
    return low + (high - low) * torch.rand(count, device=device)


def noisy(clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [B, 16, h, w] -> the same with noise, the sigmas [B], the velocity to learn."""
    noise, sigma = torch.randn_like(clean), draw_sigmas(len(clean), clean.device)
    s = _of_pictures(sigma)
    return (1 - s) * clean + s * noise, sigma, noise - clean


def guided(conditional: Tensor, unconditional: Tensor, strength: Tensor) -> Tensor:
    """strength: [B], of classifier-free guidance; 1 is the conditional velocity itself."""
    return unconditional + _of_pictures(strength) * (conditional - unconditional)


def mean_square(found: Tensor, wanted: Tensor) -> Tensor:
    return (found.float() - wanted).square().mean()


@torch.no_grad()
def paint_latents(
    model: LittleFlux,
    words: Words,
    prompts: Sequence[str],
    size: Size,
    device: torch.device,
    steps: int = 20,
    guidance: float = 3.5,
    cfg: float | None = None,
    seed: int = 1,
) -> Tensor:
    """[prompts, 16, h, w]. cfg: for a model that has not learnt guidance yet; it sees few tokens,
    as in its training."""
    length = PACK_T5_LENGTH if cfg is None else T5_LENGTH
    count, (width, height) = len(prompts), size
    texts = [words(prompt, length) for prompt in [*prompts, *[""] * count]]
    t5_ids, clip_ids = (torch.tensor([ids[k] for ids in texts], device=device) for k in (0, 1))
    one = (1, CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    x = draw_noise(seed, one).repeat(count, 1, 1, 1).to(device)
    strength = torch.full((2 * count,), guidance, device=device)
    used = count if cfg is None else 2 * count
    sigmas = diffsynth_sigmas(steps, width, height).tolist()
    for sigma, after in pairwise(sigmas):
        now = torch.full((used,), sigma, device=device)
        with bfloat16_on_a_card(device):
            given = (t5_ids[:used], clip_ids[:used], strength[:used])
            v = model(x.repeat(used // count, 1, 1, 1), now, *given).float()
        if cfg is not None:
            v = guided(*v.chunk(2), torch.full((count,), cfg, device=device))
        x = x + (after - sigma) * v
    return x


def _of_pictures(x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]"""
    return x[:, None, None, None]
