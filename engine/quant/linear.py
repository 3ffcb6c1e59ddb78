"""A linear layer that stores its weight in one format and multiplies in another."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diffsynth_files import diffsynth_module
from ..kernels.hadamard import rotate
from ..kernels.ops import dequantize, norm_modulate_quantize
from ..kernels.reference import rms_norm
from ..kernels.row_format import ActivationFormat, QuantizedActivations
from .formats import Storage, rotation_group

ALL = slice(None)
StorageOf = Callable[[str], Storage]  # of the linear layer of that name
Rows = Tensor | QuantizedActivations


class LinearMethod(Protocol):
    """A way to multiply. An object lasts for one run and may keep memory for it.

    dtype: of the run's activations. Rows in another one, a few in float32, are multiplied in
    theirs.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    def wanted(self, layer: "StoredLinear") -> ActivationFormat | None:
        """The format in which the rows should come; None: as they are."""

    def __call__(
        self, layer: "StoredLinear", x: Rows, out: Tensor | None, columns: slice
    ) -> Tensor:
        """These columns of x W^T + b, which are `out` if they could be written there."""
        ...


class Additions(Protocol):
    """What is added to the products of one layer."""

    def low(self, layer: "StoredLinear", x: Rows) -> Tensor | None:
        """What is made of x first, for any columns."""

    def product(
        self, layer: "StoredLinear", x: Rows, out: Tensor | None, columns: slice, low: Tensor | None
    ) -> Tensor:
        """These columns of the layer's product and what is added; `out` if it is written there."""
        ...


class StoredLinear(nn.Module):
    """`y = x W^T + b`, by the method that the run has chosen.

    weight: [out, in] in the dtype of the storage; scale: [out] float32 or absent, with
    W = weight * scale[:, None], rotated by groups of `group` input channels unless that is 0;
    bias: [out] or absent. adapted: what adapters add for the length of a run, see `adapters`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, storage: Storage):
        super().__init__()
        dtype = storage.torch_dtype
        self.weight = _parameter(out_features, in_features, dtype=dtype)
        self.scale = _parameter(out_features, dtype=torch.float32) if storage.scaled else None
        vector_dtype = getattr(torch, storage.vector_dtype)
        self.bias = _parameter(out_features, dtype=vector_dtype) if bias else None
        self.group = rotation_group(in_features, storage.rotated)
        self.adapted: Additions | None = None
        self.method: LinearMethod | None = None

    def rows(
        self,
        x: Tensor | None,
        norm: tuple[Tensor, Tensor] | None = None,
        gelu: Tensor | None = None,
    ) -> Tensor | QuantizedActivations:
        """What `norm_modulate_quantize` gives of the same, in the format that the method wants."""
        if self.method is None:
            return norm_modulate_quantize(x, norm, gelu)
        wanted, dtype = self.method.wanted(self), self.method.dtype
        return norm_modulate_quantize(x, norm, gelu, wanted, dtype)

    def matrix(self, columns: slice = ALL) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight, scale and bias of these output columns."""
        if columns == ALL:  # at every product: three views less to make
            return self.weight, self.scale, self.bias
        scale, bias = (None if v is None else v[columns] for v in (self.scale, self.bias))
        return self.weight[columns], scale, bias

    def forward(
        self, x: Rows, out: Tensor | None = None, columns: slice = ALL, low: Tensor | None = None
    ) -> Tensor:
        """These columns of the result, written to `out` when that is given.

        x: [..., in], or what `rows` gave. low: what adapters make of x, if that is there already.
        """
        if self.adapted is not None:
            low = self.adapted.low(self, x) if low is None else low
            y = self.adapted.product(self, x, out, columns, low)
        elif self.method is None:
            y = dequantized_product(self, x, columns=columns)
        else:
            y = self.method(self, x, out, columns)
        if out is not None and y is not out:
            out.copy_(y)
        return y

    def write(self, x: Rows, outs: Sequence[Tensor], columns: Sequence[slice]) -> None:
        """Some columns of the result to each of `outs`; what adapters make of x is made once."""
        low = None if self.adapted is None else self.adapted.low(self, x)
        for out, some in zip(outs, columns, strict=True):
            self(x, out, some, low)


class StoredNorm(nn.Module):
    """DiffSynth's RMSNorm, step by step, with a weight in any dtype."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = _parameter(width, dtype=dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def dequantized_product(
    layer: StoredLinear,
    x: Rows,
    buffer: Tensor | None = None,
    out: Tensor | None = None,
    columns: slice = ALL,
) -> Tensor:
    """The product in the dtype of x, the weight converted for its length, into `buffer` if given.

    A rotated weight meets a rotated input: that is the same product, and less to rotate. Rows have
    been rotated already.
    The result is `out` where that is given, contiguous, and the layer has a bias.
    """
    x = rotate(x, layer.group) if isinstance(x, Tensor) else x.values
    weight, scale, bias = layer.matrix(columns)
    if weight.dtype != x.dtype:
        weight = _converted(weight, scale, x.dtype, buffer)
    bias = None if bias is None else bias.to(x.dtype)
    if out is None or bias is None or not out.is_contiguous():
        return F.linear(x, weight, bias)
    torch.addmm(bias, x.flatten(0, -2), weight.T, out=out.flatten(0, -2))
    return out


def _converted(
    stored: Tensor, scale: Tensor | None, dtype: torch.dtype, buffer: Tensor | None
) -> Tensor:
    """The weight in another dtype, still rotated."""
    if buffer is None:
        buffer = torch.empty(stored.numel(), dtype=dtype, device=stored.device)
    weight = buffer[: stored.numel()].view(stored.shape)
    if scale is None:
        return weight.copy_(stored)
    dequantize(stored, scale, weight)
    return weight


def store(module: nn.Module, storage_of: StorageOf, prefix: str = "") -> None:
    """Replace every linear layer and RMS norm below `module`, which is on the meta device."""
    rms_norm = diffsynth_module("models.general_modules").RMSNorm
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.Linear):
            sides, bias = (child.in_features, child.out_features), child.bias is not None
            stored: nn.Module = StoredLinear(*sides, bias, storage_of(path))
        elif isinstance(child, rms_norm):
            dtype = getattr(torch, storage_of(path).vector_dtype)
            stored = StoredNorm(len(child.weight), child.eps, dtype)  # pyright: ignore[reportArgumentType]
        else:
            store(child, storage_of, f"{path}.")
            continue
        setattr(module, name, stored)


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def stored_linears(module: nn.Module) -> list[StoredLinear]:
    return [layer for layer in module.modules() if isinstance(layer, StoredLinear)]
