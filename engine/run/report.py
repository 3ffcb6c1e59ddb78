"""What a run used, for the log, the canvas and the picture."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ...messages import say
from ..plan.plan import LABELS
from ..plan.units import GB


@dataclass(frozen=True)
class ReuseReport:
    """Steps of a run, those of them that were reused, bytes of weights that needed no journey, and
    seconds: measured, and of as many computed steps."""

    steps: int
    reused: tuple[int, ...]
    unmoved_bytes: int
    seconds: float
    all_computed: float

    def __str__(self) -> str:
        return say(
            "{steps} steps: {computed} computed, {reused} reused ({which}); {unmoved:.1f} GB not "
            "moved, {seconds:.1f} s instead of {all_computed:.1f} s",
            steps=self.steps,
            computed=self.steps - len(self.reused),
            reused=len(self.reused),
            which=" ".join(map(str, self.reused)) or "-",
            unmoved=self.unmoved_bytes / GB,
            seconds=self.seconds,
            all_computed=self.all_computed,
        )


@dataclass
class StageReport:
    """What a stage was planned to hold on the card and did, None where it is not counted.

    reuse: of its steps, where any might be reused.
    """

    name: str
    planned_bytes: int
    peak_bytes: int | None = None
    seconds: float = 0.0
    moved_bytes: int = 0
    reuse: ReuseReport | None = None

    @property
    def label(self) -> str:
        """Its name for the user."""
        return say(LABELS[self.name])

    def __str__(self) -> str:
        if self.peak_bytes is None:
            return say("{phase}: {seconds:.1f} s", phase=self.label, seconds=self.seconds)
        return say(
            "{phase}: {seconds:.1f} s, used {used:.2f} of {planned:.2f} GB, moved {moved:.1f}",
            phase=self.label,
            seconds=self.seconds,
            used=self.peak_bytes / GB,
            planned=self.planned_bytes / GB,
            moved=self.moved_bytes / GB,
        )


@dataclass
class Report:
    """A run, stage by stage. budget_bytes: what it was held to, None on a CPU."""

    budget_bytes: int | None = None
    stages: list[StageReport] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int | None:
        peaks = [p.peak_bytes for p in self.stages if p.peak_bytes is not None]
        return max(peaks, default=None)

    def as_dict(self) -> dict[str, Any]:
        """For the metadata of a picture; sizes in bytes."""
        phases = [{**asdict(stage), "name": LABELS[stage.name]} for stage in self.stages]
        totals = {"budget_bytes": self.budget_bytes, "peak_bytes": self.peak_bytes}
        return {"phases": phases, **totals}

    @property
    def summary(self) -> str:
        if self.peak_bytes is None or self.budget_bytes is None:
            return ""
        return say(
            "VRAM: used {peak:.2f} of {budget:.2f} GB, planned {planned:.2f}, moved {moved:.1f}",
            peak=self.peak_bytes / GB,
            budget=self.budget_bytes / GB,
            planned=max(stage.planned_bytes for stage in self.stages) / GB,
            moved=sum(stage.moved_bytes for stage in self.stages) / GB,
        )

    def __str__(self) -> str:
        """Short lines, for a node of the canvas."""
        seconds = [
            say("{phase} {seconds:.1f} s", phase=stage.label, seconds=stage.seconds)
            for stage in self.stages
        ]
        reused = [str(stage.reuse) for stage in self.stages if stage.reuse is not None]
        return "\n".join([*filter(None, [self.summary]), ", ".join(seconds), *reused])
