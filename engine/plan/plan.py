"""The VRAM plan: what a run keeps on the card, before anything is moved there.

A pure function of the modules' sizes, the picture, the budget and the card. Bytes are those of
PyTorch's allocator; the CUDA context (0.3 to 0.6 GB, for every program on the card) is not in it.
"""

from dataclasses import asdict, dataclass
from typing import Any

from ...messages import later, say
from ..errors import BudgetError, BudgetTooSmallError, TooLittleVramError
from ..flux.prompts import T5_TOKENS
from ..sizes import PIXELS_PER_LATENT, STEP
from .units import GB, in_gb_above

# The phases of a run.
TEXT, DENOISING = later("text encoders"), later("denoising")
ENCODE, DECODE = later("VAE encode"), later("VAE decode")


@dataclass(frozen=True)
class Workload:
    """The picture: pixels, pictures at once, denoising steps, prompts that each step follows, T5's
    tokens of each, and bytes that a preview takes on the device."""

    width: int
    height: int
    batch_size: int = 1
    steps: int = 20
    prompts: int = 1
    words: int = T5_TOKENS
    preview_bytes: int = 0

    @property
    def image_tokens(self) -> int:
        return (self.width // STEP) * (self.height // STEP)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT


@dataclass(frozen=True)
class StagePlan:
    """One phase of a run, in bytes of the card.

    values: activations and buffers; overhead: of libraries; ring: for visiting weights, 0 where all
    stay; resident: weights that stay; visiting: weights that are copied at each pass; once: weights
    that are copied once; tokens: computed at once, 0 for all; smallest: what the phase needs;
    groups: of heads that attend one after another.
    """

    name: str
    values: int
    overhead: int
    ring: int
    resident: int
    visiting: int
    once: int
    tokens: int
    smallest: int
    groups: int = 1

    @property
    def peak(self) -> int:
        return self.values + self.overhead + self.ring + self.resident


@dataclass(frozen=True)
class Plan:
    """phases: text encoders, denoising, VAE decode; seconds: of a denoising step, if predicted."""

    job: Workload
    budget_bytes: int | None
    phases: tuple[StagePlan, ...]
    seconds: float | None
    chosen: bool = True  # whether the budget was set by the user, not by what the device has left

    @property
    def peak_bytes(self) -> int:
        return max(phase.peak for phase in self.phases)

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget that works."""
        return max(phase.smallest for phase in self.phases)

    def require_budget(self) -> None:
        """Raises BudgetError when the run cannot work in its budget."""
        if self.budget_bytes is None or self.smallest_bytes <= self.budget_bytes:
            return
        worst = max(self.phases, key=lambda phase: phase.smallest)
        kind: type[BudgetError] = BudgetTooSmallError if self.chosen else TooLittleVramError
        raise kind(
            *map(_least, self.phases),
            budget=self.budget_bytes / GB,
            picture=self._picture,
            phase=say(worst.name),
            needed=worst.smallest / GB,
            enough=in_gb_above(worst.smallest),
            smaller=self._smaller,
        )

    @property
    def _picture(self) -> str:
        job = self.job
        return f"{job.batch_size} x {job.width}x{job.height}"

    @property
    def _smaller(self) -> str:
        if self.job.words > T5_TOKENS:
            return say("a smaller picture or batch, or a shorter prompt")
        return say("a smaller picture or batch")

    def bar(self) -> list[tuple[str, int]]:
        """What the largest phase takes of the budget, by name, in bytes; the last is what is left.

        Empty without a budget.
        """
        if self.budget_bytes is None:
            return []
        largest = max(self.phases, key=lambda phase: phase.peak)
        return [
            (say("weights that stay"), largest.resident),
            (say("for weights that visit"), largest.ring),
            (say("calculation"), largest.values + largest.overhead),
            (say("free"), max(0, self.budget_bytes - largest.peak)),
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; sizes in bytes."""
        phases = [{**asdict(phase), "peak": phase.peak} for phase in self.phases]
        totals = {"peak_bytes": self.peak_bytes, "smallest_bytes": self.smallest_bytes}
        return {**asdict(self), "phases": phases, **totals}

    def __str__(self) -> str:
        """Short lines, for a node of the canvas."""
        values: dict[str, Any] = {"picture": self._picture, "steps": self.job.steps}
        if self.budget_bytes is None:
            lines = [say("{picture}, {steps} steps", **values)]
        else:
            budget = self.budget_bytes / GB
            lines = [
                say("{picture}, {steps} steps, budget {budget:.2f} GB", **values, budget=budget)
            ]
        for phase in self.phases:
            values = {"phase": say(phase.name), "peak": phase.peak / GB}
            text = say("{phase}: {peak:.2f} GB", **values)
            if phase.visiting:
                text = say(
                    "{phase}: {peak:.2f} GB; {visiting:.2f} GB of weights visit at each pass",
                    **values,
                    visiting=phase.visiting / GB,
                )
            lines.append(text)
        smallest = in_gb_above(self.smallest_bytes)
        lines.append(say("smallest budget that works: {smallest} GB", smallest=smallest))
        if self.seconds is not None:
            lines.append(say("predicted: {seconds:.2f} s a step", seconds=self.seconds))
        return "\n".join(lines)


def _least(phase: StagePlan) -> str:
    least = in_gb_above(phase.smallest)
    return say("{phase}: {least} GB at least", phase=say(phase.name), least=least)
