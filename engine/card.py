"""What the plan must know of the card, measured where it can be."""

import time
from functools import cache

import torch
from torch import _int_mm, _scaled_mm  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.functional import scaled_dot_product_attention

from . import kernels
from .allocator import allocator_of, ran_out
from .plan import MB, WORKSPACE_BYTES, Card
from .products import Computing

MEASURING_BYTES = 256 * MB
_measured: dict[tuple[torch.device, Computing], Card] = {}
ONES = 0x38  # in each byte: a number of about 1 in float8, small ones in other formats


def card_of(device: torch.device, computing: Computing | None = None, rates: bool = False) -> Card:
    """rates: measure them too, for `computing`, which takes a moment and up to MEASURING_BYTES of
    the device the first time. Where there is no memory for it they stay unknown."""
    workspace = WORKSPACE_BYTES if device.type == "cuda" else 0
    fused = device.type == "cuda" and kernels.triton_works(device)
    if not rates or device.type != "cuda":
        return Card(workspace, fused)
    assert computing is not None
    eight_bit = sorted(computing.eight_bit, key=str)
    try:
        product = _product_rate(device, eight_bit[0] if eight_bit else computing.dtype)
        attention = _attention_rate(device, computing.dtype)
        card = Card(workspace, fused, copy_rate(device), product, attention)
        _measured[device, computing] = card
        return card
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return Card(workspace, fused)
    finally:
        allocator_of(device).give_back()


def measured_card(device: torch.device, computing: Computing) -> Card | None:
    """With its rates, if they were measured before."""
    return _measured.get((device, computing))


@cache
def copy_rate(device: torch.device) -> float:
    """Bytes/s from pinned memory."""
    home = torch.empty(64 * MB, dtype=torch.uint8, pin_memory=True)
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


@cache
def _attention_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of an attention of as many heads and about as many tokens as Flux.1's has."""
    heads, tokens, width = 24, 4096, 128
    q = torch.zeros(1, heads, tokens, width, dtype=dtype, device=device)
    seconds = _seconds(lambda: scaled_dot_product_attention(q, q, q), device)
    return 4 * heads * tokens**2 * width / seconds


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
