"""A VAE as thin as the one that ships: random weights, and modules of few channels."""

import math

import torch
from torch import nn

from file_layouts import Tensors
from majicflux.benchmarks.random_models import random_tensors
from majicflux.engine.offload.offloaded_module import OffloadedModule
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


def make_thin(module: nn.Module) -> nn.Module:
    """Put thin layers in the place of DiffSynth's full ones."""
    for name, layer in module.named_children():
        if isinstance(layer, nn.Conv2d):
            ends = thin_width(layer.in_channels), thin_width(layer.out_channels)
            setattr(module, name, nn.Conv2d(*ends, layer.kernel_size, layer.stride, layer.padding))
        elif isinstance(layer, nn.GroupNorm):
            width, in_a_group = thin_width(layer.num_channels), layer.num_channels // 32
            setattr(module, name, nn.GroupNorm(width // in_a_group, width, layer.eps))
        else:
            make_thin(layer)
    if hasattr(module, "head_dim"):
        module.head_dim = thin_width(module.head_dim)
    return module


def thinned(vae: OffloadedModule) -> OffloadedModule:
    """A VAE of full width that was made of a thin one, without its channels that hold nothing."""
    full = vae.module.state_dict()
    with torch.device("meta"):
        parts = {name: make_thin(type(part)()) for name, part in vae.module.items()}
    thin = nn.ModuleDict(parts).to(full["decoder.conv_in.weight"].dtype)
    found = OffloadedModule(thin, [[thin["decoder"]]], once=[[thin["encoder"]]]).allocate()
    for name, tensor in thin.state_dict().items():
        tensor.copy_(full[name][tuple(map(slice, tensor.shape))])
        if ".to_q." in name:  # as `widened` has it
            tensor /= math.sqrt(len(full[name]) / len(tensor))
    return found
