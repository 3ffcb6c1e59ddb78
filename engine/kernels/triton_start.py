"""How Triton's kernels are started, some hundred times a step, in little of a processor's time."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_compiled: dict[tuple[Any, ...], Any] = {}


def start(
    kernel: Any,
    device: torch.device,
    programs: tuple[int, int, int],
    given: tuple[Any, ...],
    num_warps: int = 4,
    **constants: Any,
) -> None:
    """Start a kernel; `given` and `constants` are its arguments in their order.

    At each call Triton finds out which compiled kernel the arguments need, which takes longer than
    starting it. So what it found is kept, by all that it looks at.
    """
    key = (kernel.__name__, device, num_warps, *map(_kind, given), *constants.values())
    with _on(device):
        if compiled := _compiled.get(key):
            compiled[programs](*given, *constants.values())
        else:  # Triton's interpreter gives None
            _compiled[key] = kernel[programs](*given, **constants, num_warps=num_warps)


def _kind(given: Any) -> Any:
    """What of a kernel's argument is compiled in."""
    if isinstance(given, Tensor):
        return given.dtype, given.data_ptr() % 16 == 0
    if isinstance(given, int):
        return given == 1, given % 16 == 0, given < 2**31
    return None if given is None else given.base.dtype  # of a TensorDescriptor, aligned


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels start on the current card; Triton's interpreter takes tensors of the CPU."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


# Triton's own take a few microseconds, and are called some hundred times a step.
def power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
