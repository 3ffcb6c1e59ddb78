"""The rotation that spreads an outlier over its group of channels."""

from functools import cache

import torch
from torch import Tensor


def rotate(x: Tensor, group: int) -> Tensor:
    """x [..., n] with each `group` of its last axis rotated; its own inverse. 0: x as it is."""
    if group == 0:
        return x
    if x.itemsize < 4 and x.device.type == "cpu":
        # Without units for bfloat16 its products take many times as long, and round no better.
        return rotate(x.float(), group).to(x.dtype)
    if group > 16 and x.device.type == "cpu":
        # It is the product of two smaller ones, one across the columns of the other: 3 x as fast.
        inner, outer = (hadamard(size, x.device, x.dtype) for size in (16, group // 16))
        return (outer @ (x.reshape(-1, 16) @ inner).view(-1, group // 16, 16)).view(x.shape)
    return (x.reshape(-1, group) @ hadamard(group, x.device, x.dtype)).view(x.shape)


@cache
def hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The regular Hadamard matrix of a power of 4, divided by its root: orthogonal, symmetric.

    Its entries are powers of two, so every floating dtype holds it exactly. It is the one that
    ComfyUI's int8 files are rotated by.
    """
    signs = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]
    four = torch.tensor(signs, dtype=torch.float32, device="cpu") / 2
    matrix = four.new_ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix.to(device, dtype)
