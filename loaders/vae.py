"""The Flux VAE file."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.diffsynth_files import diffsynth_module
from ..engine.sizes import CHANNELS
from ..engine.torch_state import own_state, torch
from ..messages import log, say
from .convert import convert_into
from .diffusers_names import vae_from_diffusers
from .inspect_once import inspect_once
from .layouts import vae_layout
from .recognise import VAE, expecting
from .report import size_and_time
from .safetensors_file import ModelFileError, SafetensorsFile
from .tensor_sources import Sources, in_layout, prefix_before, sources_of

if TYPE_CHECKING:
    from ..engine.offload.offloaded_module import OffloadedModule


@inspect_once
def inspect_vae(path: Path) -> Sources:
    """The weights of a Flux VAE, from its header alone, in either layout.

    Raises ModelFileError when the file holds none, or not a whole one.
    """
    file = SafetensorsFile(path)
    with expecting(path, file.tensors, VAE):
        ours, diffusers = VAE.markers
        if any(ours in name for name in file.tensors):
            sources = sources_of([file], prefix_before(file.tensors, ours))
        else:
            sources = vae_from_diffusers(sources_of([file], prefix_before(file.tensors, diffusers)))
        first = sources.get("decoder.conv_in.weight")
        if first is not None and len(first.shape) == 4 and first.shape[1] != CHANNELS:
            raise ModelFileError(
                "{file} is a VAE of another model: its latents have {channels} channels, "
                "Flux's have 16. Choose ae.safetensors.",
                file=path.name,
                channels=first.shape[1],
            )
        return in_layout(path, sources, vae_layout())


@own_state()
def load_vae(path: Path, dtype: "torch.dtype") -> "OffloadedModule":
    """Read encoder and decoder into CPU memory in `dtype`."""
    from ..engine.flux.vae import build_vae

    start = time.perf_counter()
    names = diffsynth_module("utils.state_dict_converters.flux_vae")
    sources = inspect_vae(path)
    weights = build_vae(dtype).allocate()
    convert_into(weights.module["encoder"], names.FluxVAEEncoderStateDictConverter(sources))
    convert_into(weights.module["decoder"], names.FluxVAEDecoderStateDictConverter(sources))
    size = size_and_time(weights, dtype, start)
    weights.report = say("{file}: Flux VAE, {size}", file=path.name, size=size)
    log.info(weights.report)
    return weights
