"""What benchmarks with PyTorch have in common."""

import torch
from torch import Tensor


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The L2 norm of the difference, as a share of that of `exact`."""
    return ((found.float() - exact).norm() / exact.norm()).item()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
