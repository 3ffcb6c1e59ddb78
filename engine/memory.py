"""The card's memory during a run: held to a budget, measured, and given back when it is short."""

from bisect import bisect_left
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..messages import say
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
            "peak {peak:.2f} GB of {budget:.2f} GB of VRAM",
            peak=self.peak_bytes / GB,
            budget=self.budget_bytes / GB,
        )

    def __str__(self) -> str:
        return "\n".join([*map(str, self.phases), *filter(None, [self.summary])])


class Memory:
    """The memory of one device, above what others held in it when the run began."""

    def __init__(self, device: torch.device, own_places: Collection[int]):
        """own_places: addresses of what is there and counts nevertheless."""
        self.device = device
        self.counted = device.type == "cuda"
        if self.counted:
            self.give_back()
            self.base = torch.cuda.memory_reserved(device) - _reserved_for(own_places, device)

    @contextmanager
    def held_to(self, budget_bytes: int | None) -> Iterator[None]:
        """The allocator refuses to reserve more than `budget_bytes` above the base inside this.

        Before it refuses it gives back what it keeps unused, so nothing is planned too tightly.
        """
        if not self.counted or budget_bytes is None:
            yield
            return
        total = torch.cuda.get_device_properties(self.device).total_memory
        before = torch.cuda.get_per_process_memory_fraction(self.device)
        share = min(before, (self.base + budget_bytes) / total)
        with suppress(RuntimeError):  # allocators of other makers know no limit
            torch.cuda.set_per_process_memory_fraction(share, self.device)
        try:
            yield
        finally:
            with suppress(RuntimeError):
                torch.cuda.set_per_process_memory_fraction(before, self.device)

    def give_back(self) -> None:
        """Give memory that is reserved and not used back to the card."""
        if self.counted:
            torch.cuda.empty_cache()

    def begin(self) -> None:
        """Count the peak from here on."""
        self.give_back()
        if self.counted:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        if not self.counted:
            return None
        return torch.cuda.max_memory_reserved(self.device) - self.base


def give_back_pinned() -> None:
    """Give back to the system what PyTorch keeps of pinned memory, as what decoding used."""
    if torch.cuda.is_initialized() and hasattr(torch._C, "_host_emptyCache"):
        torch._C._host_emptyCache()


def _reserved_for(places: Collection[int], device: torch.device) -> int:
    """Bytes of the allocator's segments that any of these addresses is in."""
    found, wanted = 0, sorted(places)
    for segment in torch.cuda.memory_snapshot():
        if segment["device"] == device.index:
            start = segment["address"]
            index = bisect_left(wanted, start)
            if index < len(wanted) and wanted[index] < start + segment["total_size"]:
                found += segment["total_size"]
    return found
