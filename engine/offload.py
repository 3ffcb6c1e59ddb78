"""Weights that live in CPU memory and visit the compute device block by block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")
BeforeBlock = Callable[[], None]  # called before each block runs; may raise to stop there
ALIGNMENT = 256  # bytes; what CUDA's allocator and vector loads expect of a tensor's start


class Patcher(Protocol):
    """How the host's memory manager sees one component's weights (see `host/`)."""

    device: torch.device

    def load(self, working_bytes: int, weight_cap: int | None) -> None:
        """Make room for `working_bytes`, then keep up to `weight_cap` bytes of weights resident."""

    def release(self, weight_bytes: int) -> None:
        """Move at least `weight_bytes` of resident weights back to CPU memory."""


@dataclass(frozen=True)
class _View:
    owner: nn.Module
    name: str
    offset: int  # bytes into the block's buffer
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def point_into(self, buffer: Tensor) -> None:
        data = buffer[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)
        setattr(self.owner, self.name, nn.Parameter(data, requires_grad=False))


class WeightBlock:
    """Parameters in one contiguous CPU buffer, so that moving the block is one copy."""

    def __init__(self, parameters: Sequence[tuple[nn.Module, str, nn.Parameter]]):
        self.resident = False
        self._views: list[_View] = []
        end = 0
        for owner, name, meta in parameters:
            view = _View(owner, name, end, meta.shape, meta.dtype)
            self._views.append(view)
            end += -(-view.nbytes // ALIGNMENT) * ALIGNMENT
        self.nbytes = end
        self.home: Tensor | None = None

    def live_in(self, buffer: Tensor) -> None:
        """Make `buffer`, uint8 [nbytes] in CPU memory, the place where the parameters are kept."""
        self.home = buffer
        self._point_into(buffer)

    def move_to(self, device: torch.device) -> None:
        assert self.home is not None, "the weights have not been given memory"
        if device != CPU:
            self._point_into(self.home.to(device, copy=True))

    def move_home(self) -> None:
        assert self.home is not None, "the weights have not been given memory"
        self._point_into(self.home)

    def _point_into(self, buffer: Tensor) -> None:
        for view in self._views:
            view.point_into(buffer)


class OffloadedModule:
    """A module whose weights live in CPU memory, one buffer per block.

    Some blocks may be resident on a compute device; the others are copied there when their
    forward begins and dropped when it ends. What belongs to no block (embedders, last layers)
    is the root, which stays on the device for the length of a run.

    module: built on the meta device, without buffers. Its parameters stay there until `allocate`
    or `live_in` gives them memory.
    blocks: submodules of `module`, in the order in which they run, none inside another.
    rare: submodules that run once in a while, blocks of their own also where they are inside one
    of `blocks`; the last to become resident.
    """

    def __init__(
        self, module: nn.Module, blocks: Sequence[nn.Module], rare: Sequence[nn.Module] = ()
    ):
        self.module: Any = module.eval()  # Any: its parts are reached by name
        claimed: set[nn.Parameter] = set()
        # All parameters are shared out before the first block replaces its own by views.
        shares = [_unclaimed_parameters(part, claimed) for part in (*rare, *blocks, module)]
        *found, self.root = [WeightBlock(share) for share in shares]
        self.blocks = [*found[len(rare) :], *found[: len(rare)]]
        self._block_modules = [*blocks, *rare]
        self.report = ""  # what was loaded, for the log and the canvas

    def allocate(self) -> "OffloadedModule":
        """Give the weights CPU memory of their own, uninitialised."""
        for block in self.all_blocks:
            block.live_in(torch.empty(block.nbytes, dtype=torch.uint8))
        return self

    def live_in(self, buffers: Sequence[Tensor]) -> None:
        """Let the weights live in these buffers, one for each of `all_blocks`, filled already."""
        for block, buffer in zip(self.all_blocks, buffers, strict=True):
            block.live_in(buffer)

    def forget(self) -> None:
        """Give up the memory of the weights, which are then on the meta device again."""
        for block in self.all_blocks:
            block.live_in(torch.empty(block.nbytes, dtype=torch.uint8, device="meta"))

    @property
    def all_blocks(self) -> list[WeightBlock]:
        """The root, then the blocks in the order in which they run, then the rare ones."""
        return [self.root, *self.blocks]

    @property
    def total_bytes(self) -> int:
        return sum(block.nbytes for block in self.all_blocks)

    @property
    def resident_bytes(self) -> int:
        return sum(block.nbytes for block in self.all_blocks if block.resident)

    @property
    def largest_block_bytes(self) -> int:
        return max((block.nbytes for block in self.blocks), default=0)

    def keep_resident(self, device: torch.device, budget_bytes: float) -> None:
        """Keep the root and the first blocks on `device`, as many as fit into `budget_bytes`."""
        used = 0
        chosen = []
        for block in self.all_blocks:
            used += block.nbytes
            if used <= budget_bytes:
                chosen.append(block)
            elif block.resident:  # leave before others come
                self._send_home(block)
        for block in chosen:
            if not block.resident:
                block.move_to(device)
                block.resident = True

    def release(self, weight_bytes: float) -> int:
        """Give back residency from the last block on; returns the bytes that left the device."""
        freed = 0
        for block in reversed(self.all_blocks):
            if freed >= weight_bytes:
                break
            if block.resident:
                self._send_home(block)
                freed += block.nbytes
        return freed

    @contextmanager
    def running_on(
        self, device: torch.device, before_block: BeforeBlock | None = None
    ) -> Iterator[Any]:
        """The module, ready to run on `device`."""
        hooks = []
        try:
            if not self.root.resident:
                self.root.move_to(device)
            for block, module in zip(self.blocks, self._block_modules, strict=True):
                arrive, leave = _visit(block, device, before_block)
                hooks.append(module.register_forward_pre_hook(arrive))
                hooks.append(module.register_forward_hook(leave))
            yield self.module
        finally:  # a block that was interrupted has not left by itself
            for hook in hooks:
                hook.remove()
            for block in self.all_blocks:
                if not block.resident:
                    block.move_home()

    @staticmethod
    def _send_home(block: WeightBlock) -> None:
        block.move_home()
        block.resident = False


def _visit(
    block: WeightBlock, device: torch.device, before_block: BeforeBlock | None
) -> tuple[Callable[..., None], Callable[..., None]]:
    def arrive(*_: object) -> None:
        if before_block is not None:
            before_block()
        if not block.resident:
            block.move_to(device)

    def leave(*_: object) -> None:
        if not block.resident:
            block.move_home()

    return arrive, leave


def _unclaimed_parameters(
    module: nn.Module, claimed: set[nn.Parameter]
) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Each parameter below `module` that no block has yet, with its owner and name."""
    found = []
    for owner in module.modules():
        if any(True for _ in owner.buffers(recurse=False)):
            raise ValueError(f"{type(owner).__name__} has buffers, which would not move with it")
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter not in claimed:
                claimed.add(parameter)
                found.append((owner, name, parameter))
    return found
