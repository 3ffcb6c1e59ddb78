"""Noise, and the two spaces that Flux latents are written in.

Model space is what the transformer sees. VAE space is what the autoencoder produces and what
ComfyUI's LATENT carries: model = (vae - 0.1159) * 0.3611.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

SCALE = 0.3611
SHIFT = 0.1159


def draw_noise(seed: int, shape: Sequence[int], which: Sequence[int] | None = None) -> Tensor:
    """Standard normal float32 [batch, 16, h, w] on the CPU.

    which: for each picture the number of its noise among those of the seed; None: from 0 on.
    One generator per seed, as in ComfyUI's `prepare_noise`, so the same seed means the same noise
    in both.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    if which is None:
        return draw(tuple(shape))
    one = (1, *shape[1:])
    noises = [draw(one) for _ in range(max(which) + 1)]
    return torch.cat([noises[number] for number in which])


def latent_mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask of any size, [n, rows, columns] or [n, 1, rows, columns] -> [batch, 1, h, w].

    shape: of the latents. Repeated for the batch. As ComfyUI's `prepare_mask`.
    """
    mask = mask.float().reshape(-1, 1, *mask.shape[-2:])
    mask = F.interpolate(mask, tuple(shape[-2:]), mode="bilinear")
    return mask.repeat(-(-shape[0] // len(mask)), 1, 1, 1)[: shape[0]]


def to_vae_space(latents: Tensor) -> Tensor:
    return latents / SCALE + SHIFT


def to_model_space(latents: Tensor) -> Tensor:
    return (latents - SHIFT) * SCALE
