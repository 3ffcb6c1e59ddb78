"""In what a device multiplies each format of weights, and why; and what its blocks attend by."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ...messages import say
from ..errors import NoEightBitWeightsError
from ..kernels import dispatch
from ..kernels.row_format import FLOAT8_DTYPE, LIMITS
from .attention import PYTORCH, Attends, Attention
from .linear import LinearMethod, stored_linears
from .methods import Dequantized, EightBit


@dataclass(frozen=True)
class ComputePrecision:
    """What a run computes in. dtype: of the activations; eight_bit: weights that are multiplied
    by rows in their own format; device: that this was chosen for; obstacles: why other weights
    are not, or slowly; attention: of the blocks."""

    dtype: torch.dtype
    eight_bit: frozenset[torch.dtype] = frozenset()
    device: torch.device | None = None
    obstacles: tuple[str, ...] = ()
    attention: Attention = PYTORCH

    @property
    def report(self) -> str:
        """The choice and its reason, for the log and the canvas."""
        if self.device is None:
            return self.choice
        values = {"formats": self._formats, "device": device_name(self.device)}
        return say("computes in {formats} on {device}", **values) + self._reasons + self._attention

    @property
    def choice(self) -> str:
        """The report without the name of the device."""
        return say("computes in {formats}", formats=self._formats) + self._reasons + self._attention

    @property
    def _formats(self) -> str:
        return ", ".join(sorted(map(_name, self.eight_bit))) or _name(self.dtype)

    @property
    def _reasons(self) -> str:
        return f" ({'; '.join(self.obstacles)})" if self.obstacles else ""

    @property
    def _attention(self) -> str:
        return self.attention.report and f"; {self.attention.report}"

    def conversion_bytes(self, module: nn.Module) -> int:
        """Of the buffer for matrices that are multiplied in another format than they are kept."""
        others = [x for x in stored_linears(module) if x.weight.dtype not in self.eight_bit]
        return Dequantized(others, torch.device("cpu"), self.dtype).largest * self.dtype.itemsize

    def method(self, module: nn.Module, device: torch.device) -> LinearMethod:
        """How the layers of `module` multiply on `device`, for one run."""
        product: LinearMethod = Dequantized(stored_linears(module), device, self.dtype)
        return EightBit(self.eight_bit, device, product) if self.eight_bit else product

    @contextmanager
    def applied_to(self, module: nn.Module, device: torch.device) -> Iterator[None]:
        """Let the layers of `module` multiply, and its blocks attend, this way on `device`."""
        layers, method = stored_linears(module), self.method(module, device)
        blocks = [block for block in module.modules() if isinstance(block, Attends)]
        for layer in layers:
            layer.method = method
        for block in blocks:
            block.attention = self.attention
        try:
            yield
        finally:
            for block in blocks:
                block.attention = PYTORCH
            for layer in layers:
                layer.method = None


def choose_compute(
    module: nn.Module, device: torch.device, mode: str, native: torch.dtype
) -> ComputePrecision:
    """The computing for a mode of the pipeline node; `native`: the device's own floating dtype.

    auto: 8 bits where the device has matrix units for the format of the weights, and for int8
    fused kernels, `native` elsewhere. 8-bit: 8 bits wherever they can be had, also by slow
    arithmetic, such as on a CPU. Other modes are the dtype that they name.
    Raises NoEightBitWeightsError when 8-bit finds no weight in 8 bits.
    """
    if mode not in ("auto", "8-bit"):
        return ComputePrecision(getattr(torch, mode))
    stored = {layer.weight.dtype for layer in stored_linears(module)} & LIMITS.keys()
    if mode == "8-bit" and not stored:
        raise NoEightBitWeightsError
    obstacles = {dtype: _obstacle(dtype, device, mode == "8-bit") for dtype in stored}
    chosen = frozenset(dtype for dtype, obstacle in obstacles.items() if not obstacle)
    reasons = set(filter(None, obstacles.values()))
    if FLOAT8_DTYPE in chosen and device.type == "cuda" and not dispatch.triton_works(device):
        reasons.add(_unfused(_name(FLOAT8_DTYPE)))  # still faster than in `native`
    return ComputePrecision(native, chosen, device, tuple(sorted(reasons)))


def _obstacle(dtype: torch.dtype, device: torch.device, forced: bool) -> str:
    """Why weights in `dtype` are not multiplied in it on `device`; "" when they are."""
    name = _name(dtype)
    if device.type != "cuda":
        return "" if forced else say("no 8-bit matrix units for {format} weights", format=name)
    found = dispatch.capability(device)
    needed = dispatch.UNITS[dtype]
    if found is None or found < needed:
        values = {"format": name, "needed": f"{needed[0]}.{needed[1]}"}
        if dtype == FLOAT8_DTYPE and found is not None and found >= dispatch.UNITS[torch.int8]:
            return say(
                "{format} matrix units begin with compute capability {needed}, int8 rotated "
                "weights would be faster",
                **values,
            )
        return say("{format} matrix units begin with compute capability {needed}", **values)
    if forced or dtype == FLOAT8_DTYPE or dispatch.kitchen_works(device):
        return ""
    works = dispatch.triton_works(device) and dispatch.int8_product_works(device)
    return "" if works else _unfused(name)


def _unfused(name: str) -> str:
    return say(
        "no fused kernels for {format}: Triton is not installed or does not work", format=name
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """With its compute capability, where it has one."""
    found = dispatch.capability(device)
    if found is None:
        return device.type.upper()
    return say(
        "{card}, compute capability {found}",
        card=torch.cuda.get_device_name(device),
        found=f"{found[0]}.{found[1]}",
    )
