"""The card's memory during a run: held to a budget, measured, and given back when it is short."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..messages import say
from .allocator import allocator_of
from .plan import GB


@dataclass
class PhaseReport:
    """What a phase was planned to hold on the card and did, None where it is not counted."""

    name: str
    planned_bytes: int
    peak_bytes: int | None = None
    seconds: float = 0.0
    moved_bytes: int = 0

    def __str__(self) -> str:
        if self.peak_bytes is None:
            return say("{phase}: {seconds:.1f} s", phase=say(self.name), seconds=self.seconds)
        return say(
            "{phase}: {seconds:.1f} s, used {used:.2f} of {planned:.2f} GB, moved {moved:.1f}",
            phase=say(self.name),
            seconds=self.seconds,
            used=self.peak_bytes / GB,
            planned=self.planned_bytes / GB,
            moved=self.moved_bytes / GB,
        )


@dataclass
class Report:
    """A run, phase by phase. budget_bytes: what it was held to, None on a CPU."""

    budget_bytes: int | None = None
    phases: list[PhaseReport] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int | None:
        peaks = [p.peak_bytes for p in self.phases if p.peak_bytes is not None]
        return max(peaks, default=None)

    def as_dict(self) -> dict[str, Any]:
        """For the metadata of a picture; sizes in bytes."""
        return {**asdict(self), "peak_bytes": self.peak_bytes}

    @property
    def summary(self) -> str:
        if self.peak_bytes is None or self.budget_bytes is None:
            return ""
        return say(
            "VRAM: used {peak:.2f} of {budget:.2f} GB, planned {planned:.2f}, moved {moved:.1f}",
            peak=self.peak_bytes / GB,
            budget=self.budget_bytes / GB,
            planned=max(phase.planned_bytes for phase in self.phases) / GB,
            moved=sum(phase.moved_bytes for phase in self.phases) / GB,
        )

    def __str__(self) -> str:
        """Short lines, for a node of the canvas."""
        seconds = [
            say("{phase} {seconds:.1f} s", phase=say(phase.name), seconds=phase.seconds)
            for phase in self.phases
        ]
        return "\n".join([*filter(None, [self.summary]), ", ".join(seconds)])


class Memory:
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


def give_back_pinned() -> None:
    """Give back to the system what PyTorch keeps of pinned memory, as what decoding used."""
    if torch.cuda.is_initialized() and hasattr(torch._C, "_host_emptyCache"):
        torch._C._host_emptyCache()
