"""The VRAM plan: what a run keeps on the card, before anything is moved there.

A pure function of the modules' sizes, the picture, the budget and the card. Bytes are those of
PyTorch's allocator; the CUDA context (0.3 to 0.6 GB, for every program on the card) is not in it.
"""

from dataclasses import asdict, dataclass
from typing import Any

from ...messages import later, say
from ..errors import BudgetError, BudgetTooSmallError, TooLittleVramError
from ..flux.prompts import T5_TOKENS
from ..flux.vae_band_plan import BandPlan
from ..sizes import PIXELS_PER_LATENT, STEP
from .units import GB, in_gb_above

TEXT, ENCODE, DENOISE, DECODE = "text", "encode", "denoise", "decode"  # the stages of a run
LABELS = {
    TEXT: later("text encoders"),
    ENCODE: later("VAE encode"),
    DENOISE: later("denoising"),
    DECODE: later("VAE decode"),
}


@dataclass(frozen=True)
class Workload:
    """The picture: pixels, pictures at once, denoising steps, prompts that each step follows, T5's
    tokens of each, bytes that a preview takes on the device, and tokens of the reference pictures
    of a prompt."""

    width: int
    height: int
    batch_size: int = 1
    steps: int = 20
    prompts: int = 1
    text_tokens: int = T5_TOKENS
    preview_bytes: int = 0
    reference_tokens: int = 0

    @property
    def image_tokens(self) -> int:
        return (self.width // STEP) * (self.height // STEP)

    @property
    def tokens(self) -> int:
        """Of a picture and a prompt in the transformer."""
        return self.image_tokens + self.text_tokens + self.reference_tokens

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run, in bytes of the card.

    budget_bytes: what it may hold, None where nothing is counted; values: activations and buffers;
    overhead: of libraries; ring: for visiting weights, 0 where all stay; resident: weights that
    stay; visiting: weights that are copied at each pass; once: weights that are copied once;
    tokens: computed at once, 0 for all; smallest: what the stage needs; groups: of heads that
    attend one after another; bands: in which the VAE runs, None for the whole picture at once;
    prompts: encoded together. kept_on_host: whether what reused steps take waits in the host's
    memory.
    """

    name: str
    budget_bytes: int | None
    values: int
    overhead: int
    ring: int
    resident: int
    visiting: int
    once: int
    tokens: int
    smallest: int
    groups: int = 1
    bands: BandPlan | None = None
    prompts: int = 1
    kept_on_host: bool = False

    @property
    def peak(self) -> int:
        return self.values + self.overhead + self.ring + self.resident

    @property
    def label(self) -> str:
        """Its name for the user."""
        return say(LABELS[self.name])


@dataclass(frozen=True)
class Plan:
    """stages: in their order; seconds: of a denoising step, if predicted."""

    workload: Workload
    budget_bytes: int | None
    stages: tuple[StagePlan, ...]
    seconds: float | None
    chosen: bool = True  # whether the budget was set by the user, not by what the device has left

    @property
    def peak_bytes(self) -> int:
        return max(stage.peak for stage in self.stages)

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget that works."""
        return max(stage.smallest for stage in self.stages)

    def of(self, name: str) -> StagePlan:
        return next(stage for stage in self.stages if stage.name == name)

    def require_budget(self) -> None:
        """Raises BudgetError when the run cannot work in its budget."""
        if self.budget_bytes is None or self.smallest_bytes <= self.budget_bytes:
            return
        worst = max(self.stages, key=lambda stage: stage.smallest)
        kind: type[BudgetError] = BudgetTooSmallError if self.chosen else TooLittleVramError
        raise kind(
            *map(_least, self.stages),
            budget=self.budget_bytes / GB,
            picture=self._picture,
            phase=worst.label,
            needed=worst.smallest / GB,
            enough=in_gb_above(worst.smallest),
            smaller=self._smaller,
        )

    @property
    def _picture(self) -> str:
        picture = self.workload
        return f"{picture.batch_size} x {picture.width}x{picture.height}"

    @property
    def _smaller(self) -> str:
        if self.workload.reference_tokens:
            return say("a smaller picture or batch, or fewer or smaller reference pictures")
        if self.workload.text_tokens > T5_TOKENS:
            return say("a smaller picture or batch, or a shorter prompt")
        return say("a smaller picture or batch")

    def bar(self) -> list[tuple[str, int]]:
        """What the largest phase takes of the budget, by name, in bytes; the last is what is left.

        Empty without a budget.
        """
        if self.budget_bytes is None:
            return []
        largest = max(self.stages, key=lambda stage: stage.peak)
        return [
            (say("weights that stay"), largest.resident),
            (say("for weights that visit"), largest.ring),
            (say("calculation"), largest.values + largest.overhead),
            (say("free"), max(0, self.budget_bytes - largest.peak)),
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; sizes in bytes."""
        values = {name: value for name, value in asdict(self).items() if name != "stages"}
        phases = [{**asdict(s), "name": LABELS[s.name], "peak": s.peak} for s in self.stages]
        totals = {"peak_bytes": self.peak_bytes, "smallest_bytes": self.smallest_bytes}
        return {**values, "phases": phases, **totals}

    def __str__(self) -> str:
        """Short lines, for a node of the canvas."""
        values: dict[str, Any] = {"picture": self._picture, "steps": self.workload.steps}
        lines = [say("{picture}, {steps} steps", **values)]
        if self.budget_bytes is not None:
            values["budget"] = self.budget_bytes / GB
            lines = [say("{picture}, {steps} steps, budget {budget:.2f} GB", **values)]
        visits = later("{phase}: {peak:.2f} GB; {visiting:.2f} GB of weights visit at each pass")
        for stage in self.stages:
            text = visits if stage.visiting else later("{phase}: {peak:.2f} GB")
            sizes = {"peak": stage.peak / GB, "visiting": stage.visiting / GB}
            lines.append(say(text, phase=stage.label, **sizes))
        smallest = in_gb_above(self.smallest_bytes)
        lines.append(say("smallest budget that works: {smallest} GB", smallest=smallest))
        if self.seconds is not None:
            lines.append(say("predicted: {seconds:.2f} s a step", seconds=self.seconds))
        return "\n".join(lines)


def _least(stage: StagePlan) -> str:
    least = in_gb_above(stage.smallest)
    return say("{phase}: {least} GB at least", phase=stage.label, least=least)
