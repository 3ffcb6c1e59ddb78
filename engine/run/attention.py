"""Which attention the blocks of a transformer take on its device, and why."""

import os

import torch

from ...messages import say
from ..allocator import allocator_of, is_out_of_memory
from ..flux.transformer import DiT
from ..kernels import dispatch
from ..plan.measure import MEASURING_BYTES, int8_attention_from
from ..quant.attention import PYTORCH, Attention

KITCHEN = "0.2.29"  # the first comfy-kitchen with attention in 8 bits


def choose_attention(dit: DiT, mode: str, dtype: torch.dtype) -> Attention:
    """For a mode of the pipeline node and activations in `dtype`.

    off: PyTorch's. on: in int8, if that works on the device. auto: where it is faster too, which
    takes a moment and up to MEASURING_BYTES of the device to find out, once.
    """
    device = dit.patcher.device
    if mode == "off":
        return PYTORCH
    if obstacle := int8_obstacle(device, dtype):
        return Attention(obstacle=obstacle)
    if mode == "on":
        return Attention(0)
    dit.patcher.load(MEASURING_BYTES, dit.weights.resident_bytes)
    try:
        faster = int8_attention_from(device, dtype)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return Attention(obstacle=say("the card has no memory free to measure it"))
    finally:
        allocator_of(device).give_back()
    return Attention(faster, "" if faster else say("PyTorch's is no slower on this card"))


def int8_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why no attention can be in int8 on `device`; "" where it can."""
    found, needed = dispatch.capability(device), dispatch.UNITS[torch.int8]
    if found is None or found < needed:
        return say(
            "{format} matrix units begin with compute capability {needed}",
            format="int8",
            needed=f"{needed[0]}.{needed[1]}",
        )
    if os.environ.get(dispatch.OFF):
        return say("{name} is set", name=dispatch.OFF)
    try:
        from comfy_kitchen import int8_attention_is_available
    except ImportError:
        return say("comfy-kitchen {version} or newer is not installed", version=KITCHEN)
    if not int8_attention_is_available(device):
        return say("comfy-kitchen's kernels need a PyTorch for CUDA 13 or newer")
    if not dispatch.int8_attention_works(device, dtype):
        return say("that of comfy-kitchen gives wrong results here, or none")
    return ""
