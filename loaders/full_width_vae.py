"""A thin VAE that becomes Flux's VAE of full width, and computes the same.

Flux has one VAE, of one size, 84 million parameters. A thin one has fewer channels at every place
and 1.5 million. `widened` gives it the channels that it lacks, all of them zero, and what passes
through the other channels does not change:

- A convolution that is padded with zeros adds nothing to the channels that it had, and the bias of
  a new channel is zero, so new channels hold zero. So does a shortcut, a sum, and SiLU, as
  silu(0) = 0.
- GroupNorm takes mean and variance over a group of neighbouring channels, 1/32 of the full width.
  A thin width is a multiple of that, so each of the 32 groups is a whole group of the thin
  norm, or nothing but zeros, which stay zero as their weight and bias are.
- Attention divides its products by the square root of the width, which grows. The queries grow by
  as much beforehand.
- The encoder gives a mean and a logarithm of a variance for each channel of the latents. A thin
  one gives the means alone; the variance becomes none.
"""

import math
from collections.abc import Mapping

from ..engine.torch_state import torch
from .layouts import vae_layout

NO_VARIANCE = -30.0  # its logarithm, the least that readers of the file tell apart


def widened(thin: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """The tensors of ae.safetensors, float32, from thin ones under the same names."""
    full = {}
    for name, shape in vae_layout().items():
        part = thin[name]
        tensor = torch.zeros(shape, dtype=torch.float32)
        tensor[tuple(map(slice, part.shape))] = part
        if ".attn_1.q." in name:
            tensor *= math.sqrt(shape[0] / part.shape[0])
        full[name] = tensor
    latent_channels = len(thin["encoder.conv_out.bias"])
    full["encoder.conv_out.bias"][latent_channels:] = NO_VARIANCE
    return full
