"""Prompt -> picture: the three components, in turn, inside one VRAM budget."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .card import card_of
from .denoise import OnStep, conditions_of, euler, flux_velocity
from .flux_dit import DiT
from .latents import CHANNELS, draw_noise
from .memory import Memory, PhaseReport, Report
from .offload import CPU, BeforeBlock
from .plan import (
    GB,
    BudgetError,
    Job,
    Phase,
    Plan,
    plan_decode,
    plan_denoising,
    plan_text,
    step_seconds,
)
from .products import Computing
from .schedule import shifted_sigmas
from .sizes import PATCH, size_problem
from .text_encoders import TextEmbedding, TextEncoders
from .vae import VAE
from .work import Work

log = logging.getLogger("majicflux")

MAX_STEPS = 100
MAX_SEED = 2**64 - 1
RELIEF_BLOCKS = 3  # that leave the card at a time when memory is short; a ring takes two


@dataclass(frozen=True)
class Pipeline:
    """Three components and how they may use the compute device.

    budget_bytes: upper limit for weights and working memory together, or None for whatever the
    host grants.
    """

    dit: DiT
    text_encoders: TextEncoders
    vae: VAE
    budget_bytes: int | None
    computing: Computing

    def __post_init__(self) -> None:
        channels = self.dit.geometry.in_channels
        if channels != CHANNELS * PATCH**2:
            raise ValueError(
                f"This transformer takes {channels} input channels, so it is a fill, depth or "
                "canny model, which needs a picture too. Choose a text-to-image model."
            )

    @property
    def components(self) -> tuple[DiT, TextEncoders, VAE]:
        return self.dit, self.text_encoders, self.vae

    def plan(self, job: Job, rates: bool = False) -> Plan:
        """How the three phases would use the device, as far as it is free now.

        rates: predict the seconds of a step too, from rates that are measured the first time.
        """
        dit, computing = self.dit, self.computing
        device = dit.patcher.device
        itemsize = computing.dtype.itemsize
        card = card_of(device, computing, rates)
        budget = self._budget(dit)
        others = dit.weights.travelling_bytes + self.vae.weights.travelling_bytes
        encoders = self.text_encoders
        text = plan_text(
            encoders.weights, encoders.t5_geometry, encoders.itemsize, self._budget(encoders),
            card_of(encoders.patcher.device), others,
        )  # fmt: skip
        denoising = plan_denoising(
            dit.weights, dit.geometry, job, itemsize, bool(computing.eight_bit),
            computing.conversion_bytes(dit.weights.module), budget, card,
        )  # fmt: skip
        decode = plan_decode(
            self.vae.weights, job, self.vae.dtype.itemsize, self._budget(self.vae),
            card_of(self.vae.patcher.device),
        )  # fmt: skip
        seconds = step_seconds(denoising, dit.geometry, job, card)
        phases = tuple(
            phase if component.patcher.device == device else replace(phase, smallest=0)
            for phase, component in zip(
                (text, denoising, decode), (encoders, dit, self.vae), strict=True
            )
        )
        return Plan(job, budget, phases, seconds, budget == self.budget_bytes)

    def _budget(self, component: DiT | TextEncoders | VAE) -> int | None:
        """Bytes for weights and working memory; None where nothing is counted, as on a CPU."""
        if component.patcher.device == CPU:
            return None
        limits = (component.patcher.available(), self.budget_bytes)
        return min((limit for limit in limits if limit is not None), default=None)


@dataclass(frozen=True)
class Request:
    """What to paint. Sizes in pixels, multiples of 16."""

    prompt: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name, size in (("Width", self.width), ("Height", self.height)):
            if problem := size_problem(name, size):
                raise ValueError(problem)
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"Steps must be 1 to {MAX_STEPS}, not {self.steps}.")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"The seed must be 0 to {MAX_SEED}, not {self.seed}.")
        if self.batch_size < 1:
            raise ValueError(f"The batch size must be at least 1, not {self.batch_size}.")

    @property
    def job(self) -> Job:
        return Job(self.width, self.height, self.batch_size, self.steps)


@torch.inference_mode()
def paint(
    pipeline: Pipeline,
    request: Request,
    on_step: OnStep,
    before_block: BeforeBlock,
    latents_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Report]:
    """Run the request; `before_block` is called before each block of weights and may raise.

    Returns float32 RGB [batch, height, width, 3] in 0..1 and the float32 latents
    [batch, 16, height/8, width/8] in model space, both on the CPU, and what the run used.
    Raises BudgetError when the memory does not suffice for a phase, before that phase has begun
    where that can be known.
    """
    run = _Run(pipeline, request.job)
    text_plan, dit_plan, vae_plan = run.plan.phases
    encoders, dit, vae = pipeline.text_encoders, pipeline.dit, pipeline.vae

    text = encoders.recall(request.prompt)
    if text is None:
        with run.phase(encoders, text_plan) as work:
            text, moved = encoders.encode(request.prompt, before_block, text_plan.ring, work)
            run.report.phases[-1].moved_bytes += moved

    with run.phase(dit, dit_plan) as work:
        latents = _denoise(run, request, text, work, on_step, before_block, latents_dtype)

    with run.phase(vae, vae_plan) as work:
        limit = float("inf") if run.plan.budget_bytes is None else vae_plan.values - latents.nbytes
        picture, moved = vae.decode(latents, before_block, limit, vae_plan.ring, work)
        run.report.phases[-1].moved_bytes += moved
    if run.report.peak_bytes is not None:
        log.info(run.report.summary)
    return picture, latents.float().cpu(), run.report


def _denoise(
    run: "_Run",
    request: Request,
    text: TextEmbedding,
    work: Work,
    on_step: OnStep,
    before_block: BeforeBlock,
    latents_dtype: torch.dtype,
) -> Tensor:
    pipeline, plan = run.pipeline, run.plan.phases[1]
    dit, computing = pipeline.dit, pipeline.computing
    device, module = dit.patcher.device, dit.weights.module
    sigmas = shifted_sigmas(request.steps)
    noise = draw_noise(request.seed, request.batch_size, request.width, request.height)
    latents = noise.to(device, latents_dtype)
    visits = dit.weights.running_on(device, before_block, request.steps, plan.ring, work)
    with visits as stream:
        with computing.applied_to(module, device):
            given = (module, text, request.guidance, computing.dtype, latents, sigmas)
            conditions = work.attempt(lambda: conditions_of(*given))
        with computing.applied_to(module, device):  # with a new buffer for what is converted
            latents = euler(flux_velocity(module, conditions, work), latents, sigmas, on_step)
        run.report.phases[-1].moved_bytes += stream.moved_bytes
    return latents


class _Run:
    """A run of a pipeline: its plan, its report, and the memory that it moves about."""

    def __init__(self, pipeline: Pipeline, job: Job):
        self.pipeline = pipeline
        self.plan = pipeline.plan(job)
        self.plan.require_budget()
        self.report = Report(self.plan.budget_bytes)

    @contextmanager
    def phase(self, component: DiT | TextEncoders | VAE, plan: Phase) -> Iterator[Work]:
        """Memory as planned for one component; the others give way as far as it takes."""
        device = component.patcher.device
        report = PhaseReport(plan.name, plan.peak)
        self.report.phases.append(report)
        start = time.perf_counter()
        own = [c for c in self.pipeline.components if c.patcher.device == device]
        memory = Memory(device, [place for c in own for place in c.weights.resident_places])
        before = component.weights.resident_bytes
        finished = False
        try:
            with memory.held_to(self.plan.budget_bytes):
                self._make_room(component, plan, own)
                if component is self.pipeline.dit and plan.visiting and memory.counted:
                    component.patcher.pin()  # the text encoders and the VAE run once: not worth it
                memory.begin()
                yield Work(plan.tokens, plan.groups, lambda: self._relieve(component, own, memory))
            finished = True
        except torch.OutOfMemoryError as error:
            raise BudgetError(
                f"The card ran out of memory in the phase '{plan.name}', which needs "
                f"{plan.smallest / GB:.2f} GB at least. Close other programs that use the card, "
                "or choose a smaller picture or batch."
            ) from error
        finally:
            report.peak_bytes = memory.peak_bytes()
            report.seconds = time.perf_counter() - start
            if device != CPU:  # where weights are computed with at home
                report.moved_bytes += max(0, component.weights.resident_bytes - before)
            if finished:
                log.info("%s", report)

    def _make_room(
        self,
        component: DiT | TextEncoders | VAE,
        plan: Phase,
        own: list[DiT | TextEncoders | VAE],
    ) -> None:
        budget = self.plan.budget_bytes
        working = plan.values + plan.overhead + plan.ring
        if budget is None:
            component.patcher.load(working, weight_cap=None)
            return
        spare = max(0, budget - plan.peak)
        for other in own:
            if other is not component:
                other.patcher.release(max(0, other.weights.resident_bytes - spare))
                spare -= other.weights.resident_bytes
                self.report.phases[-1].planned_bytes += other.weights.resident_bytes
        component.patcher.load(working, weight_cap=plan.resident)

    def _relieve(
        self,
        component: DiT | TextEncoders | VAE,
        own: list[DiT | TextEncoders | VAE],
        memory: Memory,
    ) -> bool:
        """Free memory for a phase that found less than was planned. False: there is none."""
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
