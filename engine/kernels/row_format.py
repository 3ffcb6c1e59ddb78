"""The formats in which rows of activations reach a matrix product."""

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-6  # of every norm in Flux.1
FLOAT8_DTYPE = torch.float8_e4m3fn
LIMITS = {FLOAT8_DTYPE: 448.0, torch.int8: 127.0}  # largest value that is used of each format
TILE = 128  # rows and columns of a product that a program of our kernel makes
# What is added to a product: low [1 or 2, rows, ranks], whose sum counts, times up [columns, some
# of the ranks]^T; the first of these for each tile of columns, int32, multiples of 16.
LowRankProduct = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class ActivationFormat:
    """The format in which a product takes its rows."""

    dtype: torch.dtype | None  # int8, float8_e4m3fn, or None: as they are, only rotated
    limit: float  # largest value that is used of it
    group: int  # columns that are rotated together, 0: none


@dataclass(frozen=True)
class QuantizedActivations:
    """Rows as a product wanted them: values [..., n], scale float32 [..., 1], x = values * scale.

    scale is None where the values are only rotated. dtype: what they were made from and the
    product's result is to be.
    """

    values: Tensor
    scale: Tensor | None
    dtype: torch.dtype
