"""The card's memory during a run: held to a budget, measured, and given back when it is short."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from ..allocator import allocator_of


class HeldVram:
    """The memory of one device, beyond what others hold of it when a phase begins.

    Made once others have given way: what leaves later would be counted against what comes.
    """

    def __init__(self, device: torch.device, own: Mapping[int, int]):
        """own: address and bytes of what is there and counts nevertheless."""
        self._allocator = allocator_of(device)
        self._allocator.give_back()
        self._base = self._allocator.reserved() - self._allocator.own(own)
        self._limit = self._budget = None
        self._allocator.begin()

    @contextmanager
    def held_to(self, planned_bytes: int, budget_bytes: int | None) -> Iterator[None]:
        """No more than planned is taken inside this, or than the budget after `lift`.

        Held to the plan first, an allocator uses the holes that it has; without need it would
        rather take more of the card than have any.
        """
        if budget_bytes is None or not self._allocator.counts:
            yield
            return
        self._budget = budget_bytes
        with self._allocator.limited():
            self._hold_to(min(planned_bytes, budget_bytes))
            yield
        self._limit = self._budget = None

    def lift(self) -> bool:
        """Hold to the budget instead of the plan; False: that is so already."""
        if self._limit is None or self._budget is None or self._limit >= self._budget:
            return False
        self._hold_to(self._budget)
        return True

    def _hold_to(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._allocator.limit(self._base + limit_bytes)

    def make_way(self, nbytes: int) -> None:
        """To be called before so many bytes are taken that no hole may be large enough for."""
        if self._limit is not None:
            self._allocator.make_way(nbytes, self._base + self._limit)

    def give_back(self) -> None:
        """Give memory that is reserved and not used back to the card."""
        self._allocator.give_back()

    def peak_bytes(self) -> int | None:
        """The most that was taken, or None where it is not counted."""
        return max(0, self._allocator.peak() - self._base) if self._allocator.counts else None
