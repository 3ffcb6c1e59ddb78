"""Results of which one was multiplied in fewer rows or columns at a time than the other."""

import warnings
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

LAYERS = [(512, 1536), (512, 2048), (2048, 512), (512, 3584), (2560, 512)]  # (in, out)
# Relative L2. With the sums of every product in another order for each of its sizes, it was 0.003
# at most where rows are quantized, and 0.001 elsewhere.
ROUNDING = 0.005


def assert_same_in_chunks(found: Tensor, whole: Tensor, what: object = None) -> None:
    """Bit for bit, where this processor's products are so for any number of rows and columns.

    Elsewhere, as with AMX, no further apart than ROUNDING, which a warning says.
    """
    if sizes_change_no_bit():
        assert torch.equal(found, whole), what
        return
    warnings.warn(
        "products of fewer rows have other bits here: compared up to rounding", stacklevel=2
    )
    assert (found - whole).norm() <= ROUNDING * whole.norm(), what


@cache
def sizes_change_no_bit() -> bool:
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
