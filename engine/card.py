"""What the plan must know of the card, measured where it can be."""

import time
from functools import cache

import torch
from torch import _int_mm, _scaled_mm  # pyright: ignore[reportPrivateImportUsage]

from . import kernels
from .plan import MB, WORKSPACE_BYTES, Card
from .products import Computing


def card_of(device: torch.device, computing: Computing | None = None, rates: bool = False) -> Card:
    """rates: measure them too, for `computing`, which takes a moment the first time."""
    workspace = WORKSPACE_BYTES if device.type == "cuda" else 0
    fused = device.type == "cuda" and kernels.triton_works(device)
    if not rates or device.type != "cuda":
        return Card(workspace, fused)
    assert computing is not None
    attention = _product_rate(device, computing.dtype)
    eight_bit = sorted(computing.eight_bit, key=str)
    product = _product_rate(device, eight_bit[0]) if eight_bit else attention
    return Card(workspace, fused, copy_rate(device), product, attention)


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
    a = torch.ones(side, side, device=device).to(dtype)
    if dtype == torch.int8:
        product = lambda: _int_mm(a, a.T)  # noqa: E731
    elif dtype.itemsize == 1:
        one = torch.ones((), device=device)  # not a scale for each row, which Windows lacks
        product = lambda: _scaled_mm(  # noqa: E731
            a, a.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    else:
        product = lambda: a @ a.T  # noqa: E731
    return 2 * side**3 / _seconds(product, device)


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
