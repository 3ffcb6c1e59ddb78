"""Random weights of a VAE as thin as the one that ships."""

import torch

from file_layouts import Tensors
from majicflux.benchmarks.random_models import random_tensors
from majicflux.loaders.layouts import vae_layout

# Of a full layer: of a thin one, in whole groups of the full norm, which have 4, 8 or 16 channels.
WIDTHS = {128: 24, 256: 48, 512: 64}
MEANS = {32: 16}  # the encoder gives means and variances of 16 channels, a thin one the means


def thin_width(full: int) -> int:
    return (WIDTHS | MEANS).get(full, full)


def thin_tensors() -> Tensors:
    """float32, under the names of ae.safetensors."""
    layout = {name: tuple(map(thin_width, shape)) for name, shape in vae_layout().items()}
    return random_tensors(layout, 0, torch.float32)
