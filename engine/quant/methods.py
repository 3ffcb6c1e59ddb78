"""How a stored weight is multiplied: converted for its length, or in its own 8 bits."""

from collections.abc import Collection
from functools import cached_property

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels.libraries import kitchen_int8_product
from ..kernels.matmul import product
from ..kernels.ops import norm_modulate_quantize
from ..kernels.row_format import LIMITS, ActivationFormat, QuantizedActivations
from .formats import CONVERTED_AT_ONCE
from .linear import LinearMethod, Rows, StoredLinear, dequantized_product

FEW_ROWS = 128  # which cost little to multiply; quantizing them would only lose accuracy
SIDE_MULTIPLE = 16  # of both sides of a weight that matrix units multiply in 8 bits


class Dequantized:
    """The weight in the dtype of the activations, one matrix at a time in one buffer."""

    def __init__(self, layers: Collection[StoredLinear], device: torch.device, dtype: torch.dtype):
        sizes = [layer.weight.numel() for layer in layers if layer.weight.dtype != dtype]
        self.largest = max(sizes, default=0)
        self.device, self.dtype = device, dtype

    @cached_property
    def buffer(self) -> Tensor:
        """Memory for the largest matrix that has to be converted, from the first one on."""
        return torch.empty(self.largest, dtype=self.dtype, device=self.device)

    def wanted(self, layer: StoredLinear) -> ActivationFormat | None:
        return ActivationFormat(None, 0.0, layer.group) if layer.group else None

    def __call__(self, layer: StoredLinear, x: Rows, out: Tensor | None, columns: slice) -> Tensor:
        if isinstance(x, Tensor) and x.dtype != self.dtype:
            return _in_pieces(layer, x, columns)
        buffer = None if layer.weight.dtype == self.dtype else self.buffer
        return dequantized_product(layer, x, buffer, out, columns)


class EightBit:
    """Rows and weights both in 8 bits, where the weights are in one of `dtypes`.

    Every other layer, and every layer whose shape the units do not take, is left to `otherwise`.
    """

    def __init__(
        self, dtypes: Collection[torch.dtype], device: torch.device, otherwise: LinearMethod
    ):
        self.dtypes = dtypes
        self.otherwise, self.dtype = otherwise, otherwise.dtype
        self.kitchen = torch.int8 in dtypes and dispatch.kitchen_is_faster(device)

    def wanted(self, layer: StoredLinear) -> ActivationFormat | None:
        dtype = layer.weight.dtype
        if not self.takes(layer):
            return self.otherwise.wanted(layer)
        if self.kitchen and dtype == torch.int8:
            return None  # its kernel rotates and quantizes by itself
        return ActivationFormat(dtype, LIMITS[dtype], layer.group)

    def __call__(self, layer: StoredLinear, x: Rows, out: Tensor | None, columns: slice) -> Tensor:
        if isinstance(x, Tensor):
            exact = x.numel() <= FEW_ROWS * x.shape[-1] or x.dtype != self.dtype
            if exact or not self.takes(layer):
                return self.otherwise(layer, x, out, columns)
            wanted = self.wanted(layer)
            if wanted is None:
                return kitchen_int8_product(x, *layer.matrix(columns), layer.group)
            x = norm_modulate_quantize(x, wanted=wanted)
            assert isinstance(x, QuantizedActivations)
        elif x.scale is None:  # only rotated
            return self.otherwise(layer, x, out, columns)
        return product(x, *layer.matrix(columns), out)

    def takes(self, layer: StoredLinear) -> bool:
        """Whether matrix units multiply this weight: by what is declared, not by trying.

        An error of a product that was taken is one of the run, such as a full card.
        """
        fills = not any(side % SIDE_MULTIPLE for side in layer.weight.shape)
        return layer.weight.dtype in self.dtypes and fills


def _in_pieces(layer: StoredLinear, x: Tensor, columns: slice) -> Tensor:
    """The product in the dtype of x, with a few rows of the weight converted at a time."""
    first, last, _ = columns.indices(len(layer.weight))
    step = max(1, CONVERTED_AT_ONCE // layer.weight.shape[1])
    pieces = [slice(start, min(start + step, last)) for start in range(first, last, step)]
    found = [dequantized_product(layer, x, columns=some) for some in pieces]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)
