"""Weights that live in CPU memory: some resident on the compute device, the others visiting it."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..allocator import is_out_of_memory
from .chunking import Chunking
from .pinned import PinnedTogether, PinnedWeights
from .prefetch import BeforeBlock, PrefetchRing
from .transfers import PlainTransfers, Transfers, transfers_to
from .weight_block import CPU, WeightBlock
from .weight_sizes import WeightSizes, fitting, preferred

Blocks = Sequence[Sequence[nn.Module]]
_kept: "weakref.WeakSet[OffloadedModule]" = weakref.WeakSet()


class Unpins(Protocol):
    """What may be pinned, and holds the same in plain memory afterwards."""

    def unpin(self) -> None: ...


def resident_on(device: torch.device) -> "list[OffloadedModule]":
    """All of this process with weights that stay on `device`."""
    return [each for each in _kept if each.device == device and each.resident_bytes]


class OffloadedModule:
    """A module whose weights live in CPU memory, one buffer per block.

    A block is what is needed at the same time. Some may be resident on a compute device; the
    others visit it. What belongs to no block (norms, a last layer) is the root, which is on the
    device for the length of a run.

    module: built on the meta device, without buffers. Its parameters stay there until `allocate`
    or `live_in` gives them memory.
    blocks: the submodules of each block, in the order in which a pass through the module needs
    them, none inside another.
    once: blocks that a run needs once, before its passes; the last to become resident.
    on_host: submodules that compute on the CPU.
    scoped: whether whoever runs `blocks` asks for them with `at_hand`. Otherwise each of their
    modules is at hand while its own forward runs.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Blocks,
        once: Blocks = (),
        on_host: Sequence[nn.Module] = (),
        scoped: bool = False,
    ):
        self.module: Any = module.eval()  # Any: its parts are reached by name
        self._modules = [*map(tuple, blocks), *map(tuple, once)]
        claimed: set[nn.Parameter] = set()
        # All parameters are shared out before the first block replaces its own by views.
        parts = [*self._modules, tuple(on_host), (module,)]
        *found, self.host_only, self.root = [
            WeightBlock([p for part in parts_of for p in _unclaimed_parameters(part, claimed)])
            for parts_of in parts
        ]
        self.blocks, self.once = found[: len(blocks)], found[len(blocks) :]
        self.sizes = WeightSizes(
            self.root.size,
            [block.size for block in self.blocks],
            [block.size for block in self.once],
            any(getattr(layer, "group", 0) for layer in module.modules()),
            any(not weight.is_floating_point() for weight in module.parameters()),
        )
        self._scoped = scoped
        self.anonymous = False  # whether the weights are in memory of the process, not in a file
        self._pinned: PinnedWeights | None = None
        self.pinned_beside: weakref.WeakSet[Unpins] = weakref.WeakSet()  # for runs of the module
        self.device: torch.device | None = None  # where blocks were kept last
        self.report = ""  # what was loaded, for the log and the canvas

    def allocate(self) -> "OffloadedModule":
        """Give the weights CPU memory of their own, uninitialised."""
        for block in self.all_blocks:
            block.live_in(torch.empty(block.nbytes, dtype=torch.uint8))
        self.anonymous = True
        return self

    def live_in(self, buffers: Sequence[Tensor]) -> None:
        """Let the weights live in these buffers, one for each of `all_blocks`, filled already."""
        for block, buffer in zip(self.all_blocks, buffers, strict=True):
            block.live_in(buffer)
        self.anonymous = False

    def forget(self) -> None:
        """Give up the memory of the weights, which are then on the meta device again."""
        for block in self.all_blocks:
            block.live_in(torch.empty(block.nbytes, dtype=torch.uint8, device="meta"))

    def pin(self, pin: Callable[[Tensor], bool], unpin: Callable[[Tensor], object]) -> None:
        """Let what travels at every pass be pinned as it travels, until `pin` refuses.

        `unpin` is called for each piece when `unpin` is, or when the weights are dropped.
        """
        if self._pinned is None:
            host_buffers = [b.host_buffer for b in self.blocks if b.host_buffer is not None]
            self._pinned = PinnedWeights(host_buffers, not self.anonymous, pin, unpin)
            # Not at exit: CUDA may be gone by then, and the memory goes anyway.
            weakref.finalize(self, self._pinned.release).atexit = False

    def unpin(self) -> None:
        """Give pinned memory back to the system's free use, of what is `pinned_beside` too."""
        if self._pinned is not None:
            self._pinned.release()
        for each in self.pinned_beside:
            each.unpin()

    @property
    def pinned_bytes(self) -> int:
        return 0 if self._pinned is None else self._pinned.nbytes

    @property
    def travelling(self) -> list[WeightBlock]:
        """What may be resident, in the order of preference."""
        return preferred(self.root, self.blocks, self.once)

    @property
    def all_blocks(self) -> list[WeightBlock]:
        """The root, the blocks of a pass in their order, those of once, what stays on the host."""
        return [self.root, *self.blocks, *self.once, self.host_only]

    @property
    def total_bytes(self) -> int:
        return sum(block.nbytes for block in self.all_blocks)

    @property
    def travelling_bytes(self) -> int:
        """Of the device, if all that can be resident is."""
        return self.sizes.travelling_bytes

    @property
    def largest_bytes(self) -> int:
        """Of a block that can visit."""
        return self.sizes.largest_bytes

    @property
    def resident_bytes(self) -> int:
        return sum(block.footprint for block in self.all_blocks if block.resident)

    @property
    def resident_places(self) -> dict[int, int]:
        """Addresses on the device of what is resident, and its bytes."""
        return {block.address: block.nbytes for block in self.all_blocks if block.resident}

    def fitting(self, budget_bytes: float) -> list[WeightBlock]:
        """The blocks that `keep_resident` would keep in that many bytes."""
        return fitting(self.travelling, budget_bytes)

    def keep_resident(self, device: torch.device, budget_bytes: float) -> None:
        """Keep the root and as many blocks as fit into `budget_bytes` on `device`.

        Fewer become resident when the device has less memory than that.
        """
        self.device = device
        _kept.add(self)
        chosen = self.fitting(budget_bytes)
        for block in {*self.all_blocks} - {*chosen}:  # leave before others come
            if block.resident:
                block.leave()
        transfers = transfers_to(device, PinnedTogether(_pinned_of([self])))
        begun: list[Callable[[], None]] = []
        try:
            try:
                for block in chosen:
                    if not block.resident:
                        begun.append(block.stay_on(device, transfers))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            for arrive in begun:
                arrive()
        finally:
            transfers.close()

    def release(self, weight_bytes: float) -> int:
        """Give back residency, the least preferred block first; returns the bytes that left.

        A block that is being computed with stays.
        """
        freed = 0
        for block in reversed(self.travelling):
            if freed >= weight_bytes:
                break
            if block.resident and not block.visitors:
                block.leave()
                freed += block.footprint
        return freed

    @contextmanager
    def running_on(
        self,
        device: torch.device,
        before_block: BeforeBlock | None = None,
        passes: int = 1,
        ring_bytes: int = 0,
        chunking: Chunking | None = None,
        transfers: Transfers | None = None,
    ) -> Iterator[PrefetchRing]:
        """The module can run on `device`, `passes` times; 0: some of its blocks, in any order."""
        order = [*self.once, *self.blocks * passes] if passes else []
        given = (device, before_block, ring_bytes, chunking, transfers)
        with running_together([self], order, *given) as stream:
            yield stream

    def block_of(self, module: nn.Module) -> WeightBlock:
        """The block that a module given as part of one is in."""
        blocks = zip(self._modules, (*self.blocks, *self.once), strict=True)
        return next(block for modules, block in blocks if module in modules)

    @contextmanager
    def visiting(self, stream: PrefetchRing, chunking: Chunking) -> Iterator[None]:
        """The root is on the device of `stream`, and the blocks ask that for themselves."""
        hooks = []
        root_was_resident = self.root.resident
        try:
            if not root_was_resident and stream.device != CPU:
                chunking.retry(lambda: self.root.stay_on(stream.device, PlainTransfers()))()
                stream.moved_bytes += self.root.nbytes
            self.root.visitors += 1
            for index, modules in enumerate(self._modules):
                onload = _Onload(stream, [*self.blocks, *self.once][index])
                for module in modules:
                    module.onload = onload  # pyright: ignore[reportArgumentType]
                    if not self._scoped or index >= len(self.blocks):
                        hooks.append(module.register_forward_pre_hook(onload.enter))
                        hooks.append(module.register_forward_hook(onload.leave, always_call=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for modules in self._modules:
                for module in modules:
                    module.__dict__.pop("onload", None)
            if self._pinned is not None:
                self._pinned.grows = False
            for block in self.all_blocks:
                block.visitors = 0
                if not block.resident:
                    block.point_to_host()
            if not root_was_resident:
                self.root.leave()


@contextmanager
def running_together(
    modules: Sequence[OffloadedModule],
    order: Sequence[WeightBlock],
    device: torch.device,
    before_block: BeforeBlock | None = None,
    ring_bytes: int = 0,
    chunking: Chunking | None = None,
    transfers: Transfers | None = None,
) -> Iterator[PrefetchRing]:
    """The modules can run on `device`, and their blocks visit it through one ring.

    order: of the blocks, as far as it is known; ring_bytes: memory for those that visit, taken when
    the first comes; 0: as little as lets one be copied while another computes.
    """
    ring_bytes = ring_bytes or 2 * max(module.largest_bytes for module in modules)
    pinned = _pinned_of(modules)
    if len(order) > len(set(order)):  # for one visit it is not worth the while
        for each in pinned:
            each.begin()
    stream = PrefetchRing(
        order, device, ring_bytes, before_block, chunking, transfers, PinnedTogether(pinned)
    )
    with ExitStack() as stack:
        stack.callback(stream.close)
        for module in modules:
            stack.enter_context(module.visiting(stream, chunking or Chunking()))
        yield stream


def _pinned_of(modules: Sequence[OffloadedModule]) -> list[PinnedWeights]:
    return [module._pinned for module in modules if module._pinned is not None]


class _Onload:
    """A block is on the device inside `with`."""

    def __init__(self, stream: PrefetchRing, block: WeightBlock):
        self.stream, self.block = stream, block

    def enter(self, *_: object) -> None:
        self.stream.enter(self.block)

    def leave(self, *_: object) -> None:
        self.stream.leave(self.block)

    __enter__, __exit__ = enter, leave


def onloaded(module: nn.Module) -> Any:
    """A context in which the whole block that `module` belongs to is on the device.

    For layers of one block that take turns; a layer's own forward looks after itself.
    """
    return getattr(module, "onload", None) or nullcontext()


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
