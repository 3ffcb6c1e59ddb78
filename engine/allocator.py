"""PyTorch's allocators of a card's memory: what each can tell, and what it can be held to.

The one place that knows how they differ:

- `native`, with expandable segments or without, reserves memory of the card and keeps what is
  freed. It is limited in what it has reserved, and gives back what nothing uses before it refuses.
- `cudaMallocAsync`, which ComfyUI starts on NVIDIA cards, is a pool of the driver. It is limited in
  the sum of what is in use; what the pool has reserved besides, because a hole was too small for
  what came next, is not limited, and stays in the pool until it is asked to give it back.
- any other, such as a pluggable one, tells nothing and takes no limit.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch

# Of libraries' own allocations, which PyTorch passes on as a RuntimeError without a class.
RAN_OUT = ("out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device was short of memory, and nothing else is wrong."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in RAN_OUT)


class Allocator:
    """Of a device whose memory is not counted."""

    counts = False

    def __init__(self, device: torch.device):
        self.device = device

    def give_back(self) -> None:
        """Give memory that is reserved and not used back to the card."""
        if self.device.type == "cuda":
            with suppress(RuntimeError):
                torch.cuda.empty_cache()

    def reserved(self) -> int:
        """Bytes of the card that this process's tensors cannot be told to leave to others."""
        return 0

    def unused(self) -> int:
        """Bytes of those that no tensor uses."""
        return 0

    def peak(self) -> int:
        """The most that was reserved since `begin`."""
        return 0

    def begin(self) -> None:
        """Count the peak from here on."""

    def own(self, blocks: Mapping[int, int]) -> int:
        """Bytes that are reserved for blocks of memory, given by address and size, alone."""
        return 0

    @contextmanager
    def limited(self) -> Iterator[None]:
        """`limit` may be called inside; afterwards the limit is what it was."""
        yield

    def limit(self, reserved_bytes: int) -> None:
        """Refuse what would take more than this of the card, as far as can be known."""

    def make_way(self, nbytes: int, most_reserved: int) -> None:
        """Have so many bytes allocated next without having more than `most_reserved` reserved."""


class Native(Allocator):
    counts = True

    def reserved(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def unused(self) -> int:
        return self.reserved() - torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_reserved(self.device)

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def own(self, blocks: Mapping[int, int]) -> int:
        """Whole segments, which nothing else can use, unless they are expandable: all of a stream
        is in one of those."""
        found, places = 0, sorted(blocks)
        for segment in torch.cuda.memory_snapshot():
            if segment["device"] != self.device.index:
                continue
            start, end = segment["address"], segment["address"] + segment["total_size"]
            inside = places[bisect_left(places, start) : bisect_left(places, end)]
            if inside and segment.get("is_expandable"):
                found += sum(blocks[place] for place in inside)
            elif inside:
                found += segment["total_size"]
        return found

    @contextmanager
    def limited(self) -> Iterator[None]:
        before = 1.0
        with suppress(RuntimeError):
            # Without a limit cudaMallocAsync names a share far above 1, or refuses to name one.
            before = min(before, torch.cuda.get_per_process_memory_fraction(self.device))
        self._before = before
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self.device)

    def limit(self, reserved_bytes: int) -> None:
        total = torch.cuda.get_device_properties(self.device).total_memory
        share = min(self._before, max(0, reserved_bytes) / total)
        torch.cuda.set_per_process_memory_fraction(share, self.device)


class StreamOrdered(Native):
    """`cudaMallocAsync`. After `give_back`, what is reserved is what is in use, up to rounding."""

    def own(self, blocks: Mapping[int, int]) -> int:
        return min(sum(blocks.values()), self.reserved())

    def make_way(self, nbytes: int, most_reserved: int) -> None:
        if self.reserved() + nbytes > most_reserved and self.unused() > 0:
            self.give_back()


KINDS: dict[Any, type[Allocator]] = {"native": Native, "cudaMallocAsync": StreamOrdered}


def allocator_of(device: torch.device) -> Allocator:
    if device.type != "cuda":
        return Allocator(device)
    return KINDS.get(torch.cuda.memory.get_allocator_backend(), Allocator)(device)
