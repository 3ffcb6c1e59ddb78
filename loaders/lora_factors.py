"""What LoRA, LoHa and LoKr add to a weight: as two matrices of low rank, exactly, or row by row."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..engine.torch_state import torch
from .lora_changes import LOHA, LOKR

if TYPE_CHECKING:
    from torch import Tensor


def factors(method: str, tensors: Mapping[str, "Tensor"]) -> tuple["Tensor", "Tensor"]:
    """up [out, rank] and down [rank, in] whose product is the change, but for its scale.

    tensors: by their role, matrices.
    """
    if method == LOHA:
        # Element by element, a product of sums is a sum over all pairs.
        first, second = (tensors[f"hada_w{index}_a"] for index in (1, 2))
        up = (first[:, :, None] * second[:, None, :]).flatten(1)
        first, second = (tensors[f"hada_w{index}_b"] for index in (1, 2))
        return up, (first[:, None, :] * second[None, :, :]).flatten(0, 1)
    if method == LOKR:
        # (A B) x (C D) = (A x C)(B x D), where x is Kronecker's product.
        (up, down), (next_up, next_down) = (_two(tensors, f"lokr_w{index}") for index in (1, 2))
        return torch.kron(up, next_up), torch.kron(down, next_down)
    return tensors["up"], tensors["down"]


def rows_of_change(method: str, tensors: Mapping[str, "Tensor"], rows: slice) -> "Tensor":
    """Some rows of the change, float32 [rows, in], but for its scale."""
    if method == LOHA:
        return _rows(tensors, "hada_w1", rows).mul_(_rows(tensors, "hada_w2", rows))
    if method == LOKR:
        height = len(tensors["lokr_w2"] if "lokr_w2" in tensors else tensors["lokr_w2_a"])
        index = torch.arange(rows.start, rows.stop, device="cpu")
        first = _rows(tensors, "lokr_w1", index // height)
        second = _rows(tensors, "lokr_w2", index % height)
        return (first[:, :, None] * second[:, None, :]).flatten(1)
    return tensors["up"][rows].float() @ tensors["down"].float()


def _rows(tensors: Mapping[str, "Tensor"], role: str, rows: "slice | Tensor") -> "Tensor":
    """Of a matrix that is there as a whole or as the product of two."""
    whole = tensors.get(role)
    if whole is not None:
        return whole[rows].float()
    return tensors[f"{role}_a"][rows].float() @ tensors[f"{role}_b"].float()


def _two(tensors: Mapping[str, "Tensor"], role: str) -> tuple["Tensor", "Tensor"]:
    """A matrix as two that are no wider in between than they must be."""
    whole = tensors.get(role)
    if whole is None:
        return tensors[f"{role}_a"], tensors[f"{role}_b"]
    same = torch.eye(min(whole.shape), dtype=whole.dtype)
    return (whole, same) if whole.shape[0] >= whole.shape[1] else (same, whole)
