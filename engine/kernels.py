"""Which fused kernels this machine has."""

import logging
import os
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger("majicflux")

OFF = "MAJICFLUX_NO_FUSED_KERNELS"  # set to anything: every operation in plain PyTorch


def fused(x: Tensor) -> bool:
    """Whether operations on tensors like this one run as our own kernels."""
    return x.device.type == "cuda" and triton_works(x.device)


def of_kitchen(x: Tensor) -> bool:
    """Whether they run as comfy-kitchen's, which need no Triton: it is rare on Windows."""
    return x.device.type == "cuda" and not triton_works(x.device) and kitchen_works()


@cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA card; None for every other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def kitchen_is_faster(device: torch.device) -> bool:
    """Whether comfy-kitchen's int8 product is to be preferred to ours in Triton.

    It is compiled for every card since Turing with the matrix instructions of Ampere, which are
    the fastest of the consumer cards; on an H200 ours was 1.8 times as fast (benchmarks/README).
    """
    found = capability(device)
    if found is None or not kitchen_works():
        return False
    return found[0] not in (9, 10, 11) or not triton_works(device)


@cache
def kitchen_works() -> bool:
    """Whether the kernels that ComfyUI ships (comfy-kitchen) run here, compiled ones included."""
    if os.environ.get(OFF):
        return False
    try:
        import comfy_kitchen
    except ImportError:
        return False
    return bool(comfy_kitchen.list_backends().get("cuda", {}).get("available"))


@cache
def triton_works(device: torch.device) -> bool:
    """Whether Triton compiles and its kernels give what PyTorch gives. One warning if not."""
    found = capability(device)
    if found is None or found < (8, 0) or os.environ.get(OFF):
        return False
    try:
        problem = "" if _triton_is_right(device) else "wrong results"
    except Exception as error:  # no compiler, an old driver, a broken installation: anything
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if problem:
        log.warning("Triton does not work here (%s); the plain operations take over.", problem)
    return not problem


def _triton_is_right(device: torch.device) -> bool:
    """Whether rows come out as PyTorch has them, those of Flux's own widths rotated too."""
    from . import triton_kernels
    from .stored_linear import hadamard

    generator = torch.Generator(device).manual_seed(0)
    for width in (3072, 15360):
        x = torch.randn(1, 2, width, device=device, generator=generator)
        values, scale = triton_kernels.prepare(None, None, x, 0.0, torch.int8, 127.0, 256)
        assert scale is not None
        activated = torch.nn.functional.gelu(x, approximate="tanh").view(1, 2, -1, 256)
        rotated = (activated @ hadamard(256, device, x.dtype)).view(x.shape)
        if not torch.allclose(values * scale, rotated, atol=0.02):
            return False
    return True
