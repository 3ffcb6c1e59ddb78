"""A run of a pipeline: the memory of one stage after another, held to the plan and reported."""

import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Protocol

from ...messages import log
from ..allocator import is_out_of_memory
from ..errors import OutOfVramError
from ..offload.chunking import Chunking
from ..offload.offloaded_module import OffloadedModule, resident_on
from ..offload.patcher import Patcher
from ..offload.pinned import trim_grown_heap
from ..offload.prefetch import BeforeBlock
from ..offload.vram import HeldVram
from ..offload.weight_block import CPU
from ..offload.weight_sizes import shares
from ..plan.plan import Plan, StagePlan, Workload
from ..plan.units import GB
from .report import Report, ReuseReport, StageReport

RELIEF_BLOCKS = 3  # that leave the card at a time when memory is short; a ring takes two
# Called when a stage begins, with its name for the user and its seconds where they are predicted.
OnStage = Callable[[str, float | None], None]


def ignore_stage(label: str, seconds: float | None) -> None:
    pass


class Component(Protocol):
    """Weights, and who moves them: the transformer, a control net, the text encoders or the VAE."""

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

    @property
    def beside(self) -> Sequence[Component]:
        """Others that compute in the same stage."""
        ...

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

    def reused(self, report: ReuseReport) -> None:
        """Steps of this stage that might have been."""
        self.report.stages[-1].reuse = report

    @contextmanager
    def memory_of(
        self, stage: Stage, seconds: float | None = None
    ) -> Iterator[tuple[StagePlan, Chunking]]:
        """Memory as planned for one stage; other weights give way as far as it takes."""
        plan = self.plan.of(stage.name)
        self.on_stage(plan.label, seconds)
        running = [stage.component, *stage.beside]
        device = stage.component.patcher.device
        report = StageReport(plan.name, plan.peak)
        self.report.stages.append(report)
        start, before = time.perf_counter(), _resident(running)
        own = [c.weights for c in self.components if c.patcher.device == device]
        if plan.budget_bytes is not None:  # which is for what other runs have left there, too
            own = [*dict.fromkeys([*own, *resident_on(device)])]
        others = [weights for weights in own if all(weights is not c.weights for c in running)]
        memory, finished = None, False
        try:
            report.planned_bytes += _make_room(running, plan, others)
            plan = _with_ring(running, plan)
            if stage.repeats and plan.ring:
                for each in running:
                    each.patcher.pin()
            memory = HeldVram(device, ChainMap(*(weights.resident_places for weights in own)))
            with memory.held_to(report.planned_bytes, plan.budget_bytes):
                relieve = partial(_relieve, running, others, memory)
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
            trim_grown_heap()  # likewise
            report.seconds = time.perf_counter() - start
            if device != CPU:  # where weights are computed with at home
                report.moved_bytes += max(0, _resident(running) - before)
            if finished:
                log.info("%s", report)


def _resident(components: Sequence[Component]) -> int:
    return sum(each.weights.resident_bytes for each in components)


def _make_room(
    running: Sequence[Component], plan: StagePlan, others: Sequence[OffloadedModule]
) -> int:
    """Have the host load what is planned; returns the bytes of other weights that may stay."""
    (first, *beside), working = running, plan.values + plan.overhead + plan.ring
    if plan.budget_bytes is None:
        first.patcher.load(working, None, *((each.patcher, None) for each in beside))
        return 0
    spare, staying = max(0, plan.budget_bytes - plan.peak), 0
    for other in others:
        other.release(max(0, other.resident_bytes - spare))
        spare -= other.resident_bytes
        staying += other.resident_bytes
    cap, *caps = shares([each.weights.sizes for each in running], plan.resident)
    patchers = (each.patcher for each in beside)
    first.patcher.load(working, cap, *zip(patchers, caps, strict=True))
    return staying


def _with_ring(running: Sequence[Component], plan: StagePlan) -> StagePlan:
    """The plan with a ring in place of weights that the host kept from becoming resident.

    As ComfyUI with --novram does with all of them.
    """
    absent = plan.resident - _resident(running)
    if plan.ring or absent <= 0:
        return plan
    largest = max(each.weights.largest_bytes for each in running)
    ring = max(largest, min(2 * largest, absent))
    _release(running, ring - absent)
    return replace(plan, ring=ring)


def _release(running: Sequence[Component], weight_bytes: float) -> int:
    """Have so many bytes leave, the transformer's last; returns how many did."""
    freed = 0
    for each in reversed(running):
        freed += each.weights.release(weight_bytes - freed)
    return freed


def _relieve(
    running: Sequence[Component], others: Sequence[OffloadedModule], memory: HeldVram
) -> bool:
    """Free memory for a stage that found less than was planned. False: there is none."""
    if memory.lift():
        return True
    freed = sum(other.release(float("inf")) for other in others)
    if not freed:
        largest = max(each.weights.largest_bytes for each in running)
        freed = _release(running, RELIEF_BLOCKS * largest)
    memory.give_back()
    if freed:
        log.warning(
            "The card has less memory than planned; %.2f GB of weights left it, and visit it "
            "when they are needed.", freed / GB,
        )  # fmt: skip
    return freed > 0
