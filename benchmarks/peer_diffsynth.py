"""DiffSynth's "dynamic VRAM management" as a peer of `budget_peers`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from majicflux.engine.flux.transformer import sized_flux_dit
from majicflux.lab.steps import Step

from .peer_setup import FLOAT8, Setup
from .step import BFLOAT16, GB, diffsynth_names, diffsynth_step, imported


@contextmanager
def low_vram(setup: Setup) -> Iterator[Step]:
    step = diffsynth_step(_module(setup), setup.case, setup.device)
    yield torch.inference_mode(False)(torch.no_grad()(step))


@torch.inference_mode(False)
@torch.no_grad()
def _module(setup: Setup) -> Any:
    """DiffSynth's modules as its "dynamic VRAM management" has them.

    Every layer starts in CPU memory as float8. Before it computes, it moves to the card for good
    while less than `vram_limit` GB of the card are used; else a bfloat16 copy is made for the call.
    """
    from diffsynth.configs.vram_management_module_maps import VRAM_MANAGEMENT_MODULE_MAPS
    from diffsynth.core.vram.layers import enable_vram_management
    from diffsynth.models.flux_dit import FluxJointTransformerBlock, FluxSingleTransformerBlock

    module = sized_flux_dit(setup.geometry, FluxJointTransformerBlock, FluxSingleTransformerBlock)
    module.requires_grad_(False)
    module.load_state_dict(diffsynth_names(setup.float8), assign=True)
    # One spelling of the device everywhere: the layers compare these values.
    card = str(setup.device)
    config: dict[str, Any] = {
        "offload_dtype": FLOAT8,
        "offload_device": "cpu",
        "onload_dtype": FLOAT8,
        "onload_device": "cpu",
        "preparing_dtype": FLOAT8,
        "preparing_device": card,
        "computation_dtype": BFLOAT16,
        "computation_device": card,
    }
    names = VRAM_MANAGEMENT_MODULE_MAPS["diffsynth.models.flux_dit.FluxDiT"]
    module = enable_vram_management(
        module,
        {imported(a): imported(b) for a, b in names.items()},
        config,
        vram_limit=_limit(setup),
    )
    for layer in module.modules():  # as its pipeline does before the first step
        onload = getattr(layer, "onload", None)
        if onload is not None:
            onload()
    return module.eval()


def _limit(setup: Setup) -> float | None:
    """GB (2**30): the card's size less 0.5, as its documentation advises.

    DiffSynth compares it with all that is in use, so what is used outside PyTorch's allocator is
    added. On the CPU it cannot look: None, which "prepares" every layer.
    """
    if setup.device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(setup.device)
    outside = total - free - torch.cuda.memory_reserved(setup.device)
    return (setup.budget + outside) / GB - 0.5
