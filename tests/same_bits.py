"""Whether two results are the same, on any processor."""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

LAYERS = [(512, 1536), (512, 2048), (2048, 512), (512, 3584), (2560, 512)]  # (in, out)


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal. Where a product of some rows is not bit for bit that part of the product of all rows,
    as on processors with AMX: as near as rounding leaves it."""
    if rows_are_independent():
        return torch.equal(found, expected)
    return bool((found - expected).norm() <= 0.02 * expected.norm())


@cache
def rows_are_independent() -> bool:
    """Whether this processor's products have the same bits with any number of rows or columns."""
    drawn = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for width, columns in LAYERS:
            x = torch.randn(376, width, generator=drawn).to(dtype)
            weight = torch.randn(columns, width, generator=drawn).to(dtype)
            whole = F.linear(x, weight)
            parts = [[F.linear(rows, weight) for rows in x.split(n)] for n in (64, 128, 188, 256)]
            parts = [torch.cat(of_rows) for of_rows in parts]
            some = [F.linear(x, those) for those in weight.split(128)]
            if not all(torch.equal(whole, found) for found in [*parts, torch.cat(some, dim=1)]):
                return False
    return True
