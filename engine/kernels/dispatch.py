"""Which fused kernels this machine has."""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from threading import RLock, Thread

import torch
from torch import Tensor

from ...messages import log
from ..allocator import is_out_of_memory
from . import probe
from .row_format import FLOAT8_DTYPE

UNITS = {torch.int8: (7, 5), FLOAT8_DTYPE: (8, 9)}  # compute capability from which on a card has
_trying = RLock()
_verdicts: dict[tuple[str, torch.device], bool] = {}
_tried_ahead: set[tuple[torch.device, torch.dtype | None]] = set()
OFF = "MAJICFLUX_NO_FUSED_KERNELS"  # set to anything: every operation in plain PyTorch


def fused(x: Tensor) -> bool:
    """Whether operations on tensors like this one run as our own kernels."""
    return x.device.type == "cuda" and triton_works(x.device)


def of_kitchen(x: Tensor) -> bool:
    """Whether they run as comfy-kitchen's, which need no Triton: it is rare on Windows."""
    return x.device.type == "cuda" and not triton_works(x.device) and kitchen_works(x.device)


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
    if capability(device) is None or not kitchen_works(device):
        return False
    own = has_large_units(device) and triton_works(device) and int8_product_works(device)
    return not own


def has_large_units(device: torch.device) -> bool:
    """Whether the card is one of a data centre since Hopper, for whose matrix instructions our
    products in Triton are made; they were measured on an H200."""
    found = capability(device)
    return found is not None and found[0] in (9, 10, 11)


@cache
def kitchen_works(device: torch.device) -> bool:
    """Whether the kernels that ComfyUI ships (comfy-kitchen) run here, compiled ones included."""
    if os.environ.get(OFF):
        return False
    try:
        import comfy_kitchen
    except ImportError:
        return False
    if not comfy_kitchen.list_backends().get("cuda", {}).get("available"):
        return False
    return _works("comfy-kitchen", device, lambda: probe.kitchen(device))


@cache
def triton_works(device: torch.device) -> bool:
    """Whether Triton compiles our kernels and they give what PyTorch gives. One warning if not."""
    found = capability(device)
    if found is None or found < (8, 0) or os.environ.get(OFF):
        return False
    return _works("Triton", device, lambda: probe.fused(device, found >= UNITS[FLOAT8_DTYPE]))


@cache
def int8_product_works(device: torch.device) -> bool:
    """The same for our int8 product, which not every card with Triton needs."""
    return _works("The int8 product in Triton", device, lambda: probe.int8_product(device))


@cache
def low_rank_works(device: torch.device, dtype: torch.dtype) -> bool:
    """The same for our kernels of low-rank terms beside a product of rows in this dtype."""
    what = f"A low-rank term beside {str(dtype).removeprefix('torch.')} in Triton"
    joined = terms_join_product(device, dtype)
    return _works(what, device, lambda: probe.low_rank(device, dtype, joined))


def terms_join_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our kernel of a product, which takes in low-rank terms, serves rows in this dtype.

    PyTorch's float8 product takes in none, and elsewhere is not known to be slower than ours.
    """
    return dtype == torch.int8 or has_large_units(device)


@cache
def int8_attention_works(device: torch.device, dtype: torch.dtype) -> bool:
    """The same for comfy-kitchen's attention in 8 bits, where that is installed."""
    what = f"The int8 attention of comfy-kitchen in {str(dtype).removeprefix('torch.')}"
    return _works(what, device, lambda: probe.int8_attention(device, dtype))


@cache
def float8_takes_row_scales(device: torch.device) -> bool:
    """Whether PyTorch multiplies float8 with a scale for each row. On Windows it does not."""
    try:
        return all(probe.same(*pair) for pair in probe.float8_product(device))
    except RuntimeError as error:
        if is_out_of_memory(error):  # a full card says nothing about kernels
            raise
        log.info("No float8 product with a scale for each row (%s).", str(error).split("\n")[0])
        return False


def try_ahead(device: torch.device, terms_beside: Iterable[torch.dtype] = ()) -> None:
    """Have the kernels compiled and tried, once, while something else is done.

    Compiling takes seconds the first time on a machine. Whoever asks meanwhile waits for it.
    terms_beside: weights in 8 bits beside which there will be low-rank terms.
    """
    wanted = {(device, dtype) for dtype in (None, *terms_beside)} - _tried_ahead

    def attempt() -> None:
        with suppress(RuntimeError), torch.cuda.device(device):  # a full card: later, then
            for _, dtype in wanted:
                if triton_works(device) and dtype is not None and _takes_terms(device, dtype):
                    low_rank_works(device, dtype)

    if device.type == "cuda" and wanted:
        _tried_ahead.update(wanted)
        Thread(target=attempt, name="majicflux-kernels", daemon=True).start()


def _takes_terms(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether rows in this dtype reach our kernels of low-rank terms."""
    found = capability(device)
    if found is None or found < UNITS[dtype]:
        return False
    return dtype != torch.int8 or not kitchen_is_faster(device)


def _works(what: str, device: torch.device, trial: Callable[[], probe.Pairs]) -> bool:
    with _trying:
        if (what, device) not in _verdicts:
            _verdicts[what, device] = _tried(what, trial)
        return _verdicts[what, device]


def _tried(what: str, trial: Callable[[], probe.Pairs]) -> bool:
    try:
        # Twice, because a kernel's second start takes a shorter way.
        right = all(probe.same(*pair) for _ in range(2) for pair in trial())
        problem = "" if right else "wrong results"
    except Exception as error:  # no compiler, an old driver, a broken installation: anything
        if is_out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if problem:
        log.warning("%s does not work here (%s); plain operations take over.", what, problem)
    return not problem
