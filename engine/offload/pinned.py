"""Pinned memory for weights that travel at every pass, which a device copies by itself."""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

# Of the machine's memory: what copies of mapped weights leave to others, and what others must have
# left for the copies not to be given back when the next run begins.
RAM_LEFT, RAM_WANTED = 0.25, 0.1
GROWN = 32 * 2**20  # bytes more of this process, for which its heap is trimmed
_resident = 0  # bytes of it after that was done last, or fewer since


class PinnedWeights:
    """Pins weights as they travel, so what travels first is pinned first, until memory is short.

    host_buffers: uint8, where the weights that travel at every pass live. mapped: whether that is a
    file, whose weights are copied; others are pinned where they are. pin: the host's; False: it
    refuses.
    """

    def __init__(
        self,
        host_buffers: Iterable[Tensor],
        mapped: bool,
        pin: Callable[[Tensor], bool],
        unpin: Callable[[Tensor], object],
    ):
        self._wanted = {buffer.data_ptr() for buffer in host_buffers if buffer.nbytes}
        self._mapped, self._pin, self._unpin = mapped, pin, unpin
        self._memory: dict[int, Tensor] = {}  # by the address of where the weights live
        self.grows = False  # whether more may be pinned

    def begin(self) -> None:
        """A run begins whose weights travel at every pass: more may be pinned, unless the machine
        is short of memory. Then all copies go."""
        self.grows = not self._mapped or _is_free(0, RAM_WANTED)
        if not self.grows:
            self.release()

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in self._memory.values())

    def known(self, host_buffer: Tensor) -> Tensor | None:
        """Pinned memory with the contents of `host_buffer`, if there is some already."""
        return host_buffer if host_buffer.is_pinned() else self._memory.get(host_buffer.data_ptr())

    def of(self, host_buffer: Tensor) -> Tensor | None:
        """The same, made if it is worth it and there is room for it."""
        memory = self.known(host_buffer)
        if memory is None and self.grows and host_buffer.data_ptr() in self._wanted:
            memory = self._new(host_buffer)
            self.grows = memory is not None
        return memory

    def _new(self, host_buffer: Tensor) -> Tensor | None:
        memory = host_buffer
        if self._mapped:
            if not _is_free(host_buffer.nbytes, RAM_LEFT):
                return None
            # Filled before it is pinned: that is twice as fast as pinning pages that are not there.
            memory = torch.empty_like(host_buffer).copy_(host_buffer)
        if not self._pin(memory):
            return None
        self._memory[host_buffer.data_ptr()] = memory
        return memory

    def release(self) -> None:
        """Give all of it back."""
        while self._memory:
            self._unpin(self._memory.popitem()[1])


class PinnedTogether:
    """The pinned weights of several modules."""

    def __init__(self, parts: Sequence[PinnedWeights]):
        self._parts = parts

    def known(self, host_buffer: Tensor) -> Tensor | None:
        if host_buffer.is_pinned():
            return host_buffer
        found = (part.known(host_buffer) for part in self._parts)
        return next((memory for memory in found if memory is not None), None)

    def of(self, host_buffer: Tensor) -> Tensor | None:
        if (memory := self.known(host_buffer)) is not None:
            return memory
        found = (part.of(host_buffer) for part in self._parts)
        return next((memory for memory in found if memory is not None), None)


def _is_free(nbytes: int, share_left: float) -> bool:
    import psutil

    ram = psutil.virtual_memory()
    return ram.available - nbytes >= share_left * ram.total


def give_back_host_memory() -> None:
    """Give back to the system what PyTorch keeps of pinned memory, as what decoding used, and what
    the C library keeps."""
    if torch.cuda.is_initialized() and hasattr(torch._C, "_host_emptyCache"):
        torch._C._host_emptyCache()
    trim_heap()


def trim_heap() -> None:
    """Give back to the system what the C library keeps of all that was freed: some hundred MB in a
    server that paints all day, and more with every size of picture."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


def trim_grown_heap() -> None:
    """The same once this process has grown: the next picture asks for much of it again, and gets
    it page by page."""
    global _resident
    import psutil

    process = psutil.Process()
    resident = process.memory_info().rss
    if resident > _resident + GROWN:
        trim_heap()
        _resident = process.memory_info().rss
    _resident = min(_resident, resident)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """That of glibc, the C library of most Linux systems; others have none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # the last on Windows
        return None
