"""A VAE as thin as the one that ships: random weights, and modules of few channels.

And a narrow one that does all that a full one does, for tests where the width shows nothing.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from file_layouts import Tensors
from majicflux.benchmarks.random_models import random_tensors
from majicflux.engine.diffsynth_files import diffsynth_module
from majicflux.engine.offload.offloaded_module import OffloadedModule
from majicflux.loaders.layouts import vae_layout

Width = Callable[[int], int]  # of a layer, from that of the full one
# Of a full layer: of a thin one, in whole groups of the full norm, which have 4, 8 or 16 channels.
WIDTHS = {128: 24, 256: 48, 512: 64}
MEANS = {32: 16}  # the encoder gives means and variances of 16 channels, a thin one the means
# Of a narrow one, in 32 groups as the full one is, which decoding in bands counts on.
NARROW, GROUPS = {128: 32, 256: 64, 512: 64}, 32


def thin_width(full: int) -> int:
    return (WIDTHS | MEANS).get(full, full)


def narrow_width(full: int) -> int:
    return NARROW.get(full, full)


def thin_tensors(width: Width = thin_width) -> Tensors:
    """float32, under the names of ae.safetensors."""
    layout = {name: tuple(map(width, shape)) for name, shape in vae_layout().items()}
    return random_tensors(layout, 0, torch.float32)


def make_thin(module: nn.Module, width: Width = thin_width, groups: int = 0) -> nn.Module:
    """Put thin layers in the place of DiffSynth's full ones; groups: 0 keeps their size."""
    for name, layer in module.named_children():
        if isinstance(layer, nn.Conv2d):
            ends = width(layer.in_channels), width(layer.out_channels)
            setattr(module, name, nn.Conv2d(*ends, layer.kernel_size, layer.stride, layer.padding))
        elif isinstance(layer, nn.GroupNorm):
            channels, in_a_group = width(layer.num_channels), layer.num_channels // GROUPS
            setattr(
                module, name, nn.GroupNorm(groups or channels // in_a_group, channels, layer.eps)
            )
        else:
            make_thin(layer, width, groups)
    if hasattr(module, "head_dim"):
        module.head_dim = width(module.head_dim)
    return module


@cache
def _narrow_states() -> dict[str, Tensors]:
    names = diffsynth_module("utils.state_dict_converters.flux_vae")
    tensors = thin_tensors(narrow_width)
    return {
        "encoder": names.FluxVAEEncoderStateDictConverter(tensors),
        "decoder": names.FluxVAEDecoderStateDictConverter(tensors),
    }


def narrow_vae(dtype: torch.dtype) -> OffloadedModule:
    """Random weights in the place of those that `load_vae` reads."""
    theirs = diffsynth_module("models.flux_vae")
    with torch.device("meta"):
        parts = {"encoder": theirs.FluxVAEEncoder(), "decoder": theirs.FluxVAEDecoder()}
        narrow = {name: make_thin(part, narrow_width, GROUPS) for name, part in parts.items()}
    both = nn.ModuleDict(narrow).to(dtype)
    found = OffloadedModule(both, [[both["decoder"]]], once=[[both["encoder"]]]).allocate()
    for name, state in _narrow_states().items():
        both[name].load_state_dict(state)
    return found


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
