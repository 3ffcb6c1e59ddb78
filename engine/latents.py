"""Noise, and the two spaces that Flux latents are written in.

Model space is what the transformer sees. VAE space is what the autoencoder produces and what
ComfyUI's LATENT carries: model = (vae - 0.1159) * 0.3611.
"""

import torch
from torch import Tensor

from .sizes import PIXELS_PER_LATENT

CHANNELS = 16
SCALE = 0.3611
SHIFT = 0.1159


def draw_noise(seed: int, batch_size: int, width: int, height: int) -> Tensor:
    """Standard normal float32 [batch, 16, height/8, width/8] on the CPU, sizes in pixels.

    One generator per seed and one draw for the whole batch, as ComfyUI's `prepare_noise` does,
    so the same seed means the same noise in both.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (batch_size, CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def to_vae_space(latents: Tensor) -> Tensor:
    return latents / SCALE + SHIFT
