"""Rectified flow: from pictures to noise in training, and back for a look at what was learnt."""

from collections.abc import Callable, Sequence
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


def paint_latents(
    model: LittleFlux,
    words: Words,
    prompts: Sequence[str],
    size: Size,
    device: torch.device,
    steps: int = 20,
    guidance: float = 3.5,
    cfg: float | None = None,
) -> Tensor:
    """[prompts, 16, h, w]. cfg: for a model that has not learnt guidance yet; it sees few tokens,
    as in its training."""
    length = PACK_T5_LENGTH if cfg is None else T5_LENGTH
    count, passes = len(prompts), 1 if cfg is None else 2
    texts = [words(prompt, length) for prompt in [*prompts, *[""] * count][: passes * count]]
    t5_ids, clip_ids = (torch.tensor([ids[k] for ids in texts], device=device) for k in (0, 1))
    strength = torch.full((passes * count,), guidance, device=device)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        x, now = x.repeat(passes, 1, 1, 1), sigma.repeat(passes)
        v = model(x, now, t5_ids, clip_ids, strength).float()
        if cfg is None:
            return v
        conditional, unconditional = v.chunk(2)
        return guided(conditional, unconditional, torch.full_like(sigma, cfg))

    return descend(velocity, count, size, device, steps)


@torch.no_grad()
def descend(
    velocity: Callable[[Tensor, Tensor], Tensor],
    count: int,
    size: Size,
    device: torch.device,
    steps: int,
) -> Tensor:
    """Latents [count, 16, h, w], from the same noise each.

    velocity: of such latents at sigmas [count].
    """
    width, height = size
    one = (1, CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    x = draw_noise(1, one).repeat(count, 1, 1, 1).to(device)
    for sigma, after in pairwise(diffsynth_sigmas(steps, width, height).tolist()):
        with bfloat16_on_a_card(device):
            v = velocity(x, torch.full((count,), sigma, device=device))
        x = x + (after - sigma) * v.float()
    return x


def _of_pictures(x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]"""
    return x[:, None, None, None]
