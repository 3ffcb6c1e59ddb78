"""A card's memory under each of PyTorch's allocators, which are simulated by their own rules."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from majicflux.engine import allocator as allocators
from majicflux.engine.offload.vram import HeldVram
from majicflux.engine.plan.units import GB, MB
from majicflux.host import standalone

CARD = torch.device("cuda", 0)
TOTAL = 12 * GB


class Simulated:
    """`torch.cuda` as PyTorch 2.11 has it with one allocator, by what its sources say."""

    backend = "native"

    def __init__(self) -> None:
        self.used: dict[int, int] = {}  # by address
        self.holes = 0  # reserved, and used by nothing
        self.share: float | None = None
        self.high = 0
        self.end = 1024  # of the addresses

    @property
    def reserved(self) -> int:
        return sum(self.used.values()) + self.holes

    def take(self, nbytes: int, fits: bool = True) -> int:
        """Memory, out of a hole that `fits` if there is one; refused above the limit."""
        filled = min(nbytes, self.holes) if fits else 0
        if self.share is not None and self.reserved + nbytes - filled > self.share * TOTAL:
            self.holes = filled = 0  # it gives back before it refuses
            if self.reserved + nbytes > self.share * TOTAL:
                raise torch.OutOfMemoryError
        self.holes -= filled
        address, self.end = self.end, self.end + nbytes
        self.used[address] = nbytes
        self.high = max(self.high, self.reserved)
        return address

    def free(self, address: int) -> None:
        self.holes += self.used.pop(address)

    def empty_cache(self) -> None:
        self.holes = 0

    def memory_reserved(self, _: Any) -> int:
        return self.reserved

    def memory_allocated(self, _: Any) -> int:
        return self.reserved - self.holes

    def max_memory_reserved(self, _: Any) -> int:
        return self.high

    def reset_peak_memory_stats(self, _: Any) -> None:
        self.high = self.reserved

    def get_device_properties(self, _: Any) -> SimpleNamespace:
        return SimpleNamespace(total_memory=TOTAL)

    def mem_get_info(self, _: Any) -> tuple[int, int]:
        return TOTAL - self.reserved, TOTAL

    def get_per_process_memory_fraction(self, _: Any) -> float:
        return 1.0 if self.share is None else self.share

    def set_per_process_memory_fraction(self, share: float, _: Any) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"Invalid fraction value: {share}. Allowed range: 0~1")
        self.share = share

    def memory_snapshot(self) -> list[dict[str, Any]]:
        return [
            {"device": 0, "address": address, "total_size": nbytes, "is_expandable": False}
            for address, nbytes in self.used.items()
        ]

    def get_allocator_backend(self) -> str:
        return self.backend


class Expandable(Simulated):
    def memory_snapshot(self) -> list[dict[str, Any]]:
        return [{"device": 0, "address": 0, "total_size": self.end, "is_expandable": True}]


class StreamOrdered(Simulated):
    backend = "cudaMallocAsync"

    def take(self, nbytes: int, fits: bool = True) -> int:
        """What is in use is limited, what is reserved is not, and nothing is given back."""
        used, share = sum(self.used.values()), self.share
        self.share = None
        try:
            if share is not None and used + nbytes > share * TOTAL:
                raise torch.OutOfMemoryError
            return super().take(nbytes, fits)
        finally:
            self.share = share

    def get_per_process_memory_fraction(self, _: Any) -> float:
        return 2**64 / TOTAL if self.share is None else self.share

    def memory_snapshot(self) -> list[dict[str, Any]]:
        raise RuntimeError("Calling snapshot with backend:cudaMallocAsync is not meaningful.")


class Silent(StreamOrdered):
    """In some versions it does not name its limit."""

    def get_per_process_memory_fraction(self, _: Any) -> float:
        raise RuntimeError("getMemoryFraction is not supported")


class Pluggable(Simulated):
    backend = "pluggable"

    def refused(self, *_: Any) -> Any:
        raise RuntimeError("CUDAPluggableAllocator does not yet support this")


for name in ("memory_reserved", "memory_allocated", "max_memory_reserved", "memory_snapshot",
             "reset_peak_memory_stats", "get_per_process_memory_fraction", "empty_cache",
             "set_per_process_memory_fraction"):  # fmt: skip
    setattr(Pluggable, name, Pluggable.refused)

NAMES = [name for name in vars(Simulated) if name not in ("take", "free", "backend", "reserved")]
COUNTED = [Simulated, Expandable, StreamOrdered, Silent]


@contextmanager
def simulated(kind: type[Simulated]) -> Iterator[Simulated]:
    card = kind()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.memory, "get_allocator_backend", card.get_allocator_backend)
        for name in NAMES:
            if not name.startswith("_") and hasattr(torch.cuda, name):
                patch.setattr(torch.cuda, name, getattr(card, name))
        yield card


@pytest.mark.parametrize("kind", COUNTED)
def test_the_budget_is_kept_above_what_others_hold(kind: type[Simulated]) -> None:
    with simulated(kind) as card:
        card.take(3 * GB)  # another model's
        own = card.take(2 * GB)  # ours, from the run before
        memory = HeldVram(CARD, {own: 2 * GB})
        with memory.held_to(5 * GB, 5 * GB):
            card.take(3 * GB)
            assert memory.peak_bytes() == 5 * GB
            with pytest.raises(torch.OutOfMemoryError):
                card.take(MB)
        card.take(4 * GB)  # afterwards nothing is limited


@pytest.mark.parametrize("kind", COUNTED)
def test_what_was_evicted_before_is_not_in_the_base(kind: type[Simulated]) -> None:
    """With 9.5 GB of another model evicted a budget of 8 GB was a limit of 12, and the peak
    negative: the base has to be taken after the eviction, from what nothing uses any more."""
    with simulated(kind) as card:
        evicted = card.take(9 * GB)
        card.free(evicted)
        memory = HeldVram(CARD, {})
        with memory.held_to(8 * GB, 8 * GB):
            card.take(7 * GB)
            assert memory.peak_bytes() == 7 * GB
            with pytest.raises(torch.OutOfMemoryError):
                card.take(2 * GB)


@pytest.mark.parametrize("kind", COUNTED)
def test_a_peak_is_never_negative(kind: type[Simulated]) -> None:
    with simulated(kind) as card:
        other = card.take(4 * GB)
        memory = HeldVram(CARD, {})
        with memory.held_to(GB, GB):
            card.free(other)
            card.empty_cache()
            card.reset_peak_memory_stats(CARD)
            assert memory.peak_bytes() == 0


@pytest.mark.parametrize("kind", COUNTED)
def test_the_plan_is_held_to_before_the_budget(kind: type[Simulated]) -> None:
    with simulated(kind) as card:
        memory = HeldVram(CARD, {})
        assert not memory.lift()
        with memory.held_to(2 * GB, 6 * GB):
            with pytest.raises(torch.OutOfMemoryError):
                card.take(3 * GB)
            assert memory.lift()
            card.take(3 * GB)
            assert not memory.lift()
            with pytest.raises(torch.OutOfMemoryError):
                card.take(4 * GB)


@pytest.mark.parametrize("kind", COUNTED)
def test_holes_do_not_add_up_beyond_the_plan(kind: type[Simulated]) -> None:
    """cudaMallocAsync would reserve 5.4 GB of a budget of 4 while 3.7 are in use."""
    with simulated(kind) as card:
        memory = HeldVram(CARD, {})
        with memory.held_to(4 * GB, 8 * GB):
            for _ in range(5):  # maps of growing size
                memory.make_way(3 * GB)
                card.free(card.take(3 * GB, fits=False))
            assert memory.peak_bytes() <= 4 * GB


@pytest.mark.parametrize("kind", COUNTED)
def test_what_nothing_uses_goes_back_to_the_card(kind: type[Simulated]) -> None:
    with simulated(kind) as card:
        card.free(card.take(5 * GB))
        assert standalone.free_memory(CARD) == TOTAL
        HeldVram(CARD, {}).give_back()
        assert card.reserved == 0


@pytest.mark.parametrize("kind", COUNTED)
def test_the_limit_of_before_is_restored(kind: type[Simulated]) -> None:
    with simulated(kind) as card:
        card.set_per_process_memory_fraction(0.5, CARD)
        expected = 1.0 if kind is Silent else 0.5  # what cannot be asked is taken for none
        memory = HeldVram(CARD, {})
        with memory.held_to(9 * GB, 9 * GB):
            assert card.share == min(expected, 9 * GB / TOTAL)
        assert card.share == expected


def test_an_unknown_allocator_is_let_alone() -> None:
    with simulated(Pluggable) as card:
        memory = HeldVram(CARD, {1: GB})
        with memory.held_to(GB, GB):
            card.take(2 * GB)
            memory.make_way(GB)
            assert not memory.lift()
        memory.give_back()
        assert memory.peak_bytes() is None
        assert standalone.free_memory(CARD) == TOTAL - 2 * GB


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_has_many_names(error: Exception, expected: bool) -> None:
    assert allocators.is_out_of_memory(error) == expected
