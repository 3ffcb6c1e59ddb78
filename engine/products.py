"""How a stored weight is multiplied, and which way this device does it fastest."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, _int_mm, _scaled_mm, nn  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import functional as F

from ..messages import say
from . import kernels
from .rows import Rows, Wanted, prepare
from .stored_linear import FLOAT8_DTYPE, LIMITS, StoredLinear, dequantized_product
from .work import CONVERTED_AT_ONCE

log = logging.getLogger("majicflux")
CPU = torch.device("cpu")

FEW_ROWS = 128  # which cost little to multiply; quantizing them would only lose accuracy
ROWS_AT_ONCE = 1024  # of an int8 product without a kernel, whose sums take 4 bytes each
FEWEST_ROWS = 32  # of the same: cuBLAS wants more than 16
SIDE_MULTIPLE = 16  # of both sides of a weight that matrix units multiply in 8 bits


class Product(Protocol):
    """A way to multiply. An object lasts for one run and may keep memory for it.

    dtype: of the run's activations. Rows in another one, a few in float32, are multiplied in
    theirs.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    def wanted(self, layer: StoredLinear) -> Wanted | None:
        """The format in which the rows should come; None: as they are."""

    def __call__(
        self, layer: StoredLinear, x: Tensor | Rows, out: Tensor | None, columns: slice
    ) -> Tensor:
        """These columns of x W^T + b, which are `out` if they could be written there."""
        ...


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

    def wanted(self, layer: StoredLinear) -> Wanted | None:
        return Wanted(None, 0.0, layer.group) if layer.group else None

    def __call__(
        self, layer: StoredLinear, x: Tensor | Rows, out: Tensor | None, columns: slice
    ) -> Tensor:
        if isinstance(x, Tensor) and x.dtype != self.dtype:
            return _in_pieces(layer, x, columns)
        buffer = None if layer.weight.dtype == self.dtype else self.buffer
        return dequantized_product(layer, x, buffer, out, columns)


class EightBit:
    """Rows and weights both in 8 bits, where the weights are in one of `dtypes`.

    Every other layer, and every layer whose shape the units do not take, is left to `otherwise`.
    """

    def __init__(self, dtypes: Collection[torch.dtype], device: torch.device, otherwise: Product):
        self.dtypes = dtypes
        self.otherwise, self.dtype = otherwise, otherwise.dtype
        self.kitchen = torch.int8 in dtypes and kernels.kitchen_is_faster(device)

    def wanted(self, layer: StoredLinear) -> Wanted | None:
        dtype = layer.weight.dtype
        if not self.takes(layer):
            return self.otherwise.wanted(layer)
        if self.kitchen and dtype == torch.int8:
            return None  # its kernel rotates and quantizes by itself
        return Wanted(dtype, LIMITS[dtype], layer.group)

    def __call__(
        self, layer: StoredLinear, x: Tensor | Rows, out: Tensor | None, columns: slice
    ) -> Tensor:
        dtype = layer.weight.dtype
        exact = isinstance(x, Tensor) and (
            x.numel() <= FEW_ROWS * x.shape[-1] or x.dtype != self.dtype
        )
        if not self.takes(layer) or exact:
            return self.otherwise(layer, x, out, columns)
        if self.kitchen and dtype == torch.int8 and isinstance(x, Tensor):
            return kitchen_product(layer, x, columns)
        if isinstance(x, Tensor):
            x = prepare(x, wanted=Wanted(dtype, LIMITS[dtype], layer.group))
        assert isinstance(x, Rows)
        product = _int8_product if dtype == torch.int8 else _float8_product
        return product(layer, x, out, columns)

    def takes(self, layer: StoredLinear) -> bool:
        """Whether matrix units multiply this weight: by what is declared, not by trying.

        An error of a product that was taken is one of the run, such as a full card.
        """
        return layer.weight.dtype in self.dtypes and not any(
            side % SIDE_MULTIPLE for side in layer.weight.shape
        )


@dataclass(frozen=True)
class Computing:
    """What a run computes in. dtype: of the activations; eight_bit: weights that are multiplied
    by rows in their own format; device: that this was chosen for; obstacles: why other weights
    are not, or slowly."""

    dtype: torch.dtype
    eight_bit: frozenset[torch.dtype] = frozenset()
    device: torch.device | None = None
    obstacles: tuple[str, ...] = ()

    @property
    def report(self) -> str:
        """The choice and its reason, for the log and the canvas."""
        if self.device is None:
            return self.choice
        values = {"formats": self._formats, "device": device_name(self.device)}
        return say("computes in {formats} on {device}", **values) + self._reasons

    @property
    def choice(self) -> str:
        """The report without the name of the device."""
        return say("computes in {formats}", formats=self._formats) + self._reasons

    @property
    def _formats(self) -> str:
        return ", ".join(sorted(map(_name, self.eight_bit))) or _name(self.dtype)

    @property
    def _reasons(self) -> str:
        return f" ({'; '.join(self.obstacles)})" if self.obstacles else ""

    def conversion_bytes(self, module: nn.Module) -> int:
        """Of the buffer for matrices that are multiplied in another format than they are kept."""
        others = [x for x in stored_linears(module) if x.weight.dtype not in self.eight_bit]
        return Dequantized(others, CPU, self.dtype).largest * self.dtype.itemsize

    @contextmanager
    def applied_to(self, module: nn.Module, device: torch.device) -> Iterator[None]:
        """Let the layers of `module` multiply this way on `device`."""
        layers = stored_linears(module)
        product: Product = Dequantized(layers, device, self.dtype)
        if self.eight_bit:
            product = EightBit(self.eight_bit, device, product)
        for layer in layers:
            layer.product = product
        try:
            yield
        finally:
            for layer in layers:
                layer.product = None


def choose(module: nn.Module, device: torch.device, mode: str, native: torch.dtype) -> Computing:
    """The computing for a mode of the pipeline node; `native`: the device's own floating dtype.

    auto: 8 bits where the device has matrix units for the format of the weights, and for int8
    fused kernels, `native` elsewhere. 8-bit: 8 bits wherever they can be had, also by slow
    arithmetic, such as on a CPU. Other modes are the dtype that they name.
    Raises ValueError when 8-bit finds no weight in 8 bits.
    """
    if mode not in ("auto", "8-bit"):
        return Computing(getattr(torch, mode))
    stored = {layer.weight.dtype for layer in stored_linears(module)} & LIMITS.keys()
    if mode == "8-bit" and not stored:
        raise ValueError(
            say(
                "compute_precision is 8-bit, but no weight of the transformer is. Choose "
                "float8_e4m3fn or int8 rotated as weight_precision, or another compute_precision."
            )
        )
    obstacles = {dtype: _obstacle(dtype, device, mode == "8-bit") for dtype in stored}
    chosen = frozenset(dtype for dtype, obstacle in obstacles.items() if not obstacle)
    reasons = set(filter(None, obstacles.values()))
    if FLOAT8_DTYPE in chosen and device.type == "cuda" and not kernels.triton_works(device):
        reasons.add(_unfused(_name(FLOAT8_DTYPE)))  # still faster than in `native`
    return Computing(native, chosen, device, tuple(sorted(reasons)))


def stored_linears(module: nn.Module) -> list[StoredLinear]:
    return [layer for layer in module.modules() if isinstance(layer, StoredLinear)]


def _obstacle(dtype: torch.dtype, device: torch.device, forced: bool) -> str:
    """Why weights in `dtype` are not multiplied in it on `device`; "" when they are."""
    name = _name(dtype)
    if device.type != "cuda":
        return "" if forced else say("no 8-bit matrix units for {format} weights", format=name)
    found = kernels.capability(device)
    needed = kernels.INT8_UNITS if dtype == torch.int8 else kernels.FLOAT8_UNITS
    if found is None or found < needed:
        values = {"format": name, "needed": f"{needed[0]}.{needed[1]}"}
        if dtype == FLOAT8_DTYPE and found is not None and found >= kernels.INT8_UNITS:
            return say(
                "{format} matrix units begin with compute capability {needed}, int8 rotated "
                "weights would be faster",
                **values,
            )
        return say("{format} matrix units begin with compute capability {needed}", **values)
    if forced or dtype == FLOAT8_DTYPE or kernels.kitchen_works(device):
        return ""
    works = kernels.triton_works(device) and kernels.int8_product_works(device)
    return "" if works else _unfused(name)


def _unfused(name: str) -> str:
    return say(
        "no fused kernels for {format}: Triton is not installed or does not work", format=name
    )


def _in_pieces(layer: StoredLinear, x: Tensor, columns: slice) -> Tensor:
    """The product in the dtype of x, with a few rows of the weight converted at a time."""
    first, last, _ = columns.indices(len(layer.weight))
    step = max(1, CONVERTED_AT_ONCE // layer.weight.shape[1])
    pieces = [slice(start, min(start + step, last)) for start in range(first, last, step)]
    found = [dequantized_product(layer, x, columns=some) for some in pieces]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _float8_product(layer: StoredLinear, x: Rows, out: Tensor | None, columns: slice) -> Tensor:
    weight, scale, bias = layer.matrix(columns)
    values, row_scale = _flat(x)
    if scale is None:
        scale = torch.ones(len(weight), dtype=torch.float32, device=weight.device)
    if not values.is_cuda:  # the same arithmetic without the units
        y = (values.float() @ weight.float().T).mul_(row_scale).mul_(scale)
        y = y if bias is None else y.add_(bias.float())
        return y.to(x.dtype).view(*x.values.shape[:-1], -1)
    y = _result(weight, x, out)
    flat = y.flatten(0, -2)
    bias = None if bias is None else bias.to(y.dtype)  # unscaled files keep it in float8 too
    if kernels.float8_takes_row_scales(y.device):
        scaled_product(values, row_scale, weight, scale, bias, flat)
        return y
    one = torch.ones((), dtype=torch.float32, device=y.device)
    _scaled_mm(values, weight.T, one, one, out_dtype=flat.dtype, use_fast_accum=True, out=flat)
    rescale_(flat, row_scale, scale, bias)
    return y


def rescale_(y: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """y [rows, columns] = y * row_scale * scale + bias, in place.

    row_scale: float32 [rows, 1]; scale: float32 [columns]; bias: [columns].
    """
    if kernels.fused(y):
        from . import triton_kernels

        triton_kernels.rescale_(y, row_scale, scale, bias)
        return
    y.mul_(row_scale)
    if bias is None:
        y.mul_(scale)
    else:
        torch.addcmul(bias, y, scale, out=y)


def scaled_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """out [rows, columns] = (x * x_scale) (weight * scale)^T + bias, by PyTorch's float8 product.

    x: float8_e4m3fn [rows, depth], x_scale: float32 [rows, 1]; weight: float8_e4m3fn [columns,
    depth], scale: float32 [columns]; depth and columns multiples of 16.
    """
    _scaled_mm(
        x, weight.T, x_scale, scale[None], bias=bias, out_dtype=out.dtype, use_fast_accum=True,
        out=out,
    )  # fmt: skip


def _int8_product(layer: StoredLinear, x: Rows, out: Tensor | None, columns: slice) -> Tensor:
    weight, scale, bias = layer.matrix(columns)
    assert scale is not None, "int8 weights have a scale"
    values, row_scale = _flat(x)
    y = _result(weight, x, out)
    if kernels.fused(values) and kernels.int8_product_works(values.device):
        from . import triton_kernels

        triton_kernels.int8_product(values, row_scale, weight, scale, bias, y.flatten(0, -2))
    else:
        for first in range(0, len(values), ROWS_AT_ONCE):
            rows = values[first : first + ROWS_AT_ONCE]
            some = slice(first, first + len(rows))
            more = max(0, FEWEST_ROWS - len(rows))
            padded = F.pad(rows, (0, 0, 0, more)) if more else rows
            sums = _int_mm(padded, weight.T)[: len(rows)].float()
            sums.mul_(row_scale[some]).mul_(scale)
            y.flatten(0, -2)[some] = sums if bias is None else sums.add_(bias)
    return y


def kitchen_product(layer: StoredLinear, x: Tensor, columns: slice) -> Tensor:
    import comfy_kitchen

    weight, scale, bias = layer.matrix(columns)
    assert scale is not None, "int8 weights have a scale"
    bias = None if bias is None else bias.to(x.dtype)
    return comfy_kitchen.int8_linear(
        x, weight, scale, bias, x.dtype,
        convrot=layer.group > 0, convrot_groupsize=layer.group or 256,
    )  # fmt: skip


def _flat(x: Rows) -> tuple[Tensor, Tensor]:
    """The values [rows, n] and their scale [rows, 1]."""
    assert x.scale is not None, "these rows have not been quantized"
    return x.values.flatten(0, -2), x.scale.reshape(-1, 1)


def _result(weight: Tensor, x: Rows, out: Tensor | None) -> Tensor:
    """Memory for the product: `out` if its rows lie one after the other, or new."""
    if out is not None and out.is_contiguous():
        return out
    return x.values.new_empty(*x.values.shape[:-1], len(weight), dtype=x.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """With its compute capability, where it has one."""
    found = kernels.capability(device)
    if found is None:
        return device.type.upper()
    return say(
        "{card}, compute capability {found}",
        card=torch.cuda.get_device_name(device),
        found=f"{found[0]}.{found[1]}",
    )
