"""Tensors in 8 bits, for the file that ships: half the size of bfloat16."""

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 128  # values that share a scale
LARGEST = 127
SMALLEST_SCALE = 6e-8  # above 0 in float16, so that a group of zeros divides by something


def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Vectors as float16; all else as int8 with `NAME:scale`, a float16 for GROUP values.

    A group is of consecutive values, the last one of a tensor may be shorter.
    """
    found = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            found[name] = tensor.detach().half().cpu().contiguous()
            continue
        values = tensor.detach().float().cpu().flatten()
        groups = F.pad(values, (0, -len(values) % GROUP)).view(-1, GROUP)
        scale = (groups.abs().amax(1) / LARGEST).clamp(min=SMALLEST_SCALE).half()
        rounded = (groups / scale.float()[:, None]).round().clamp(-LARGEST, LARGEST)
        found[name] = rounded.to(torch.int8).flatten()[: len(values)].view(tensor.shape)
        found[name + ":scale"] = scale
    return found
