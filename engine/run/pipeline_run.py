"""A run of a pipeline: the memory of one stage after another, held to the plan and reported."""

import logging
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Protocol

from ..allocator import is_out_of_memory
from ..errors import OutOfVramError
from ..offload.chunking import Chunking
from ..offload.offloaded_module import OffloadedModule
from ..offload.patcher import Patcher
from ..offload.prefetch import BeforeBlock
from ..offload.vram import HeldVram
from ..offload.weight_block import CPU
from ..plan.plan import Plan, StagePlan, Workload
from ..plan.units import GB
from .report import Report, StageReport

log = logging.getLogger("majicflux")

RELIEF_BLOCKS = 3  # that leave the card at a time when memory is short; a ring takes two
# Called when a stage begins, with its name for the user and its seconds where they are predicted.
OnStage = Callable[[str, float | None], None]


def ignore_stage(label: str, seconds: float | None) -> None:
    pass


class Component(Protocol):
    """Weights, and who moves them: the transformer, the text encoders or the VAE."""

    @property
    def weights(self) -> OffloadedModule: ...

    @property
    def patcher(self) -> Patcher: ...


class Stage(Protocol):
    """A part of a run; see `stages`."""

    name: ClassVar[str]
    repeats: ClassVar[bool]  # its weights travel more than once: pinning them is worth the while

    @property
    def component(self) -> Component: ...

    def plan(self, workload: Workload, budget: int | None) -> StagePlan: ...


@dataclass
class PipelineRun:
    """components: all of the pipeline; before_block: called before each block of weights, and may
    raise. Raises BudgetError when the budget is too small for a stage of the plan."""

    components: Sequence[Component]
    plan: Plan
    before_block: BeforeBlock
    on_stage: OnStage = ignore_stage
    report: Report = field(init=False)

    def __post_init__(self) -> None:
        self.plan.require_budget()
        self.report = Report(self.plan.budget_bytes)

    def moved(self, nbytes: int) -> None:
        """So many bytes of weights have visited the device in this stage."""
        self.report.stages[-1].moved_bytes += nbytes

    @contextmanager
    def memory_of(
        self, stage: Stage, seconds: float | None = None
    ) -> Iterator[tuple[StagePlan, Chunking]]:
        """Memory as planned for one stage; the other components give way as far as it takes."""
        plan = self.plan.of(stage.name)
        self.on_stage(plan.label, seconds)
        component = stage.component
        device, weights = component.patcher.device, component.weights
        report = StageReport(plan.name, plan.peak)
        self.report.stages.append(report)
        start, before = time.perf_counter(), weights.resident_bytes
        own = [c for c in self.components if c.patcher.device == device]
        memory, finished = None, False
        try:
            report.planned_bytes += _make_room(component, plan, own)
            plan = _with_ring(weights, plan)
            if stage.repeats and plan.ring:
                component.patcher.pin()
            memory = HeldVram(device, ChainMap(*(c.weights.resident_places for c in own)))
            with memory.held_to(report.planned_bytes, plan.budget_bytes):
                relieve = partial(_relieve, component, own, memory)
                yield plan, Chunking(plan.tokens, plan.groups, relieve, memory.make_way)
            finished = True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # By PyTorch's words ComfyUI's canvas knows what to say at once.
            raise OutOfVramError(
                str(error), phase=plan.label, smallest=plan.smallest / GB
            ) from error
        finally:
            if memory is not None:
                report.peak_bytes = memory.peak_bytes()
                memory.give_back()  # for other programs; this one would keep it
            report.seconds = time.perf_counter() - start
            if device != CPU:  # where weights are computed with at home
                report.moved_bytes += max(0, weights.resident_bytes - before)
            if finished:
                log.info("%s", report)


def _make_room(component: Component, plan: StagePlan, own: Sequence[Component]) -> int:
    """Have the host load what is planned; returns the bytes of other components that may stay."""
    working = plan.values + plan.overhead + plan.ring
    if plan.budget_bytes is None:
        component.patcher.load(working, weight_cap=None)
        return 0
    spare, staying = max(0, plan.budget_bytes - plan.peak), 0
    for other in own:
        if other is not component:
            other.patcher.release(max(0, other.weights.resident_bytes - spare))
            spare -= other.weights.resident_bytes
            staying += other.weights.resident_bytes
    component.patcher.load(working, weight_cap=plan.resident)
    return staying


def _with_ring(weights: OffloadedModule, plan: StagePlan) -> StagePlan:
    """The plan with a ring in place of weights that the host kept from becoming resident.

    As ComfyUI with --novram does with all of them.
    """
    absent = plan.resident - weights.resident_bytes
    if plan.ring or absent <= 0:
        return plan
    ring = max(weights.largest_bytes, min(2 * weights.largest_bytes, absent))
    weights.release(ring - absent)
    return replace(plan, ring=ring)


def _relieve(component: Component, own: Sequence[Component], memory: HeldVram) -> bool:
    """Free memory for a stage that found less than was planned. False: there is none."""
    if memory.lift():
        return True
    freed = sum(other.weights.release(float("inf")) for other in own if other is not component)
    if not freed:
        freed = component.weights.release(RELIEF_BLOCKS * component.weights.largest_bytes)
    memory.give_back()
    if freed:
        log.warning(
            "The card has less memory than planned; %.2f GB of weights left it, and visit it "
            "when they are needed.", freed / GB,
        )  # fmt: skip
    return freed > 0
