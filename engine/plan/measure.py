"""The profile of the device that is here, measured where it can be."""

import time
from functools import cache

import torch
from torch import _int_mm, _scaled_mm  # pyright: ignore[reportPrivateImportUsage]

from ..allocator import allocator_of, is_out_of_memory
from ..flux.geometry import HEAD_DIM
from ..kernels import dispatch
from ..quant.attention import PYTORCH, Attention
from ..quant.compute import ComputePrecision
from .device import WORKSPACE_BYTES, DeviceProfile
from .units import MB

MEASURING_BYTES = 256 * MB
_measured: dict[tuple[torch.device, ComputePrecision], DeviceProfile] = {}
ATTENTION_TOKENS = 4096  # about as many as Flux.1 has at 1024x1024
ATTENTIONS = (1024, ATTENTION_TOKENS, 16384)  # sizes that are compared
INT8 = Attention(0)
GAIN = 1.05  # what rounding to 8 bits has to gain
ONES = 0x38  # in each byte: a number of about 1 in float8, small ones in other formats


def device_profile(
    device: torch.device, computing: ComputePrecision | None = None, rates: bool = False
) -> DeviceProfile:
    """rates: measure them too, for `computing`, which takes a moment and up to MEASURING_BYTES of
    the device the first time. Where there is no memory for it they stay unknown."""
    workspace = WORKSPACE_BYTES if device.type == "cuda" else 0
    fused = device.type == "cuda" and dispatch.triton_works(device)
    if not rates or device.type != "cuda":
        return DeviceProfile(workspace, fused)
    assert computing is not None
    eight_bit = sorted(computing.eight_bit, key=str)
    try:
        product = _product_rate(device, eight_bit[0] if eight_bit else computing.dtype)
        attention = _attention_rate(device, computing.dtype, computing.attention)
        profile = DeviceProfile(workspace, fused, copy_rate(device), product, attention)
        _measured[device, computing] = profile
        return profile
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return DeviceProfile(workspace, fused)
    finally:
        allocator_of(device).give_back()


def measured_profile(device: torch.device, computing: ComputePrecision) -> DeviceProfile | None:
    """With its rates, if they were measured before."""
    return _measured.get((device, computing))


@cache
def copy_rate(device: torch.device, pinned: bool = True) -> float:
    """Bytes/s from pinned memory, or from other."""
    home = torch.ones(64 * MB, dtype=torch.uint8, pin_memory=pinned)
    place = torch.empty_like(home, device=device)
    return len(home) / _seconds(lambda: place.copy_(home, non_blocking=True), device)


@cache
def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two matrices in this dtype."""
    side = 4096
    a = torch.empty(side, side, dtype=dtype, device=device)
    a.view(torch.uint8).fill_(ONES)
    if dtype == torch.int8:
        product = lambda: _int_mm(a, a.T)  # noqa: E731
    elif dtype.itemsize == 1:
        # Not a scale for each row, which Windows lacks.
        one = torch.ones((), dtype=torch.float32, device=device)
        product = lambda: _scaled_mm(  # noqa: E731
            a, a.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    else:
        product = lambda: a @ a.T  # noqa: E731
    return 2 * side**3 / _seconds(product, device)


def int8_attention_from(device: torch.device, dtype: torch.dtype) -> int | None:
    """The tokens from which on attention in 8 bits is the faster one, measured the first time in up
    to MEASURING_BYTES of the device; None: it never is."""
    found = None
    for tokens in reversed(ATTENTIONS):
        plain, in_int8 = (_attention_rate(device, dtype, each, tokens) for each in (PYTORCH, INT8))
        if in_int8 < GAIN * plain:
            break
        found = tokens
    return found


@cache
def _attention_rate(
    device: torch.device, dtype: torch.dtype, attention: Attention, tokens: int = ATTENTION_TOKENS
) -> float:
    """FLOP/s of Flux.1's attention, of fewer heads where there are many tokens."""
    from ..flux.blocks import attend  # which needs DiffSynth, as nothing else here does

    heads = min(24, 24 * ATTENTION_TOKENS // tokens)
    qkv = torch.empty(1, tokens, 3 * heads * HEAD_DIM, dtype=dtype, device=device)
    qkv.normal_(generator=torch.Generator(device).manual_seed(0))
    seconds = _seconds(lambda: attend(qkv, heads, attention), device)
    return 4 * heads * tokens**2 * HEAD_DIM / seconds


def _seconds(run, device: torch.device) -> float:
    """The best of a few runs."""
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
