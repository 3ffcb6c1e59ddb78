"""Prompt -> picture: the three components, in turn, inside one VRAM budget."""

import logging
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...messages import say
from ..allocator import is_out_of_memory
from ..flux.conditioning import Conditions, conditions_of
from ..flux.text_encoders import TextEmbedding, TextEncoders
from ..flux.transformer import DiT
from ..flux.vae import VAE
from ..flux.velocity import flux_velocity
from ..offload.chunking import Chunking
from ..offload.prefetch import BeforeBlock
from ..offload.vram import HeldVram
from ..offload.weight_block import CPU
from ..plan.denoising import plan_denoising, step_seconds
from ..plan.measure import MEASURING_BYTES, device_profile, measured_profile
from ..plan.plan import DECODE, DENOISING, ENCODE, TEXT, BudgetError, Plan, StagePlan, Workload
from ..plan.text import plan_text
from ..plan.units import GB
from ..plan.vae import plan_decode, plan_encode
from ..quant.compute import ComputePrecision
from ..sampling.inputs import SamplerInputs
from ..sampling.loop import OnPass, sample, unpainted
from ..sampling.solvers import passes
from ..sizes import CHANNELS, PATCH, PIXELS_PER_LATENT, STEP
from ..torch_state import own_state
from .report import Report, StageReport
from .request import GenerationRequest

log = logging.getLogger("majicflux")
PAINTING = (TEXT, DENOISING, DECODE)
RELIEF_BLOCKS = 3  # that leave the card at a time when memory is short; a ring takes two
Component: TypeAlias = DiT | TextEncoders | VAE
OnPhase: TypeAlias = Callable[[str, float | None], None]


def _ignore(name: str, seconds: float | None) -> None:
    pass


@dataclass(frozen=True)
class Pipeline:
    """The components and how they may use the compute device.

    text_encoders, vae: None where prompts come encoded or latents need no decoding. budget_bytes:
    upper limit for weights and working memory together, or None for whatever the host grants.
    """

    dit: DiT
    text_encoders: TextEncoders | None
    vae: VAE | None
    budget_bytes: int | None
    computing: ComputePrecision

    def __post_init__(self) -> None:
        g = self.dit.geometry
        channels = g.in_channels
        if channels != CHANNELS * PATCH**2:
            raise ValueError(
                say(
                    "This transformer takes {channels} input channels, so it is a fill, depth or "
                    "canny model, which needs a picture too. Choose a text-to-image model.",
                    channels=channels,
                )
            )
        if self.text_encoders is not None:
            self._require_width("CLIP-L", g.pooled_width, self.text_encoders.pooled_width)
            self._require_width("T5", g.text_width, self.text_encoders.t5_geometry.width)

    def _require_width(self, encoder: str, wanted: int, width: int) -> None:
        if width != wanted:
            raise ValueError(
                say(
                    "This transformer takes {wanted} values from {encoder}, and the {encoder} that "
                    "is connected gives {width}. Choose another one in the bf16 text encoders "
                    "node.",
                    encoder=encoder,
                    wanted=wanted,
                    width=width,
                )
            )

    @property
    def components(self) -> tuple[Component, ...]:
        return tuple(filter(None, (self.dit, self.text_encoders, self.vae)))

    @property
    def checked_text_encoders(self) -> TextEncoders:
        """Raises ValueError when there are none."""
        if self.text_encoders is None:
            raise ValueError(
                say(
                    "The pipeline has no text encoders: connect bf16 text encoders to it, or an "
                    "encoded prompt to positive and, if cfg is not 1, to negative."
                )
            )
        return self.text_encoders

    @property
    def checked_vae(self) -> VAE:
        """Raises ValueError when there is none."""
        if self.vae is None:
            raise ValueError(
                say(
                    "The pipeline has no VAE: connect a Flux VAE to it, or use denoise with "
                    "ComfyUI's own VAE nodes."
                )
            )
        return self.vae

    @property
    def painting(self) -> list[str]:
        """The phases of PAINTING whose components are there."""
        missing = {TEXT: self.text_encoders is None, DECODE: self.vae is None}
        return [name for name in PAINTING if not missing.get(name)]

    def plan(self, job: Workload, names: Sequence[str] | None = None, rates: bool = False) -> Plan:
        """How the phases of these names would use the device, as far as it is free now.

        names: all of `painting` by default; rates: have the rates that the seconds of a step are
        predicted from measured, if they are not yet.
        """
        names = self.painting if names is None else names
        phases = tuple(self._plan_phase(name, job) for name in names)
        card = measured_profile(self.dit.patcher.device, self.computing)
        if rates:
            self.dit.patcher.load(MEASURING_BYTES, self.dit.weights.resident_bytes)
            card = device_profile(self.dit.patcher.device, self.computing, rates)
        denoising = next((phase for phase in phases if phase.name == DENOISING), None)
        seconds = None
        if card is not None and denoising is not None:
            seconds = step_seconds(denoising, self.dit.geometry, job, card)
        budgets = (self._budget(self.component(name)) for name in names)
        budget = min((budget for budget in budgets if budget is not None), default=None)
        return Plan(job, budget, phases, seconds, budget == self.budget_bytes)

    def component(self, name: str) -> Component:
        """The one that a phase runs."""
        if name == DENOISING:
            return self.dit
        return self.checked_text_encoders if name == TEXT else self.checked_vae

    def _plan_phase(self, name: str, job: Workload) -> StagePlan:
        component, computing = self.component(name), self.computing
        device, budget = component.patcher.device, self._budget(component)
        if name == TEXT:
            encoders = self.checked_text_encoders
            others = sum(c.weights.travelling_bytes for c in self.components if c is not encoders)
            phase = plan_text(
                encoders.weights.sizes, encoders.t5_geometry, encoders.itemsize, budget,
                device_profile(device), others, job.words,
            )  # fmt: skip
        elif name == DENOISING:
            dit = self.dit
            phase = plan_denoising(
                dit.weights.sizes, dit.geometry, job, computing.dtype.itemsize,
                bool(computing.eight_bit), computing.conversion_bytes(dit.weights.module), budget,
                device_profile(device),
            )  # fmt: skip
        else:
            plan_vae = plan_decode if name == DECODE else plan_encode
            vae = self.checked_vae
            phase = plan_vae(
                vae.weights.sizes, job, vae.dtype.itemsize, budget, device_profile(device)
            )
        return replace(phase, smallest=0) if device == CPU else phase

    def _budget(self, component: Component) -> int | None:
        """Bytes for weights and working memory; None where nothing is counted, as on a CPU."""
        if component.patcher.device == CPU:
            return None
        limits = (component.patcher.available(), self.budget_bytes)
        return min((limit for limit in limits if limit is not None), default=None)


@own_state()
@torch.inference_mode()
def paint(
    pipeline: Pipeline,
    request: GenerationRequest,
    on_pass: OnPass,
    before_block: BeforeBlock,
    latents_dtype: torch.dtype = torch.float32,
    preview_bytes: int = 0,
    on_phase: OnPhase = _ignore,
) -> tuple[Tensor, Tensor, Report]:
    """Run the request; `before_block` is called before each block of weights, and before each part
    of a prompt that is read, and may raise.

    preview_bytes: of the device, that `on_pass` takes; on_phase: called with the name of each phase
    that begins, and its seconds where they are predicted.

    Returns float32 RGB [batch, height, width, 3] in 0..1 and the float32 latents
    [batch, 16, height/8, width/8] in model space, both on the CPU, and what the run used.
    Raises BudgetError when the memory does not suffice for a phase, before that phase has begun
    where that can be known.
    """
    names = [DECODE] if request.picture is None else [ENCODE, DECODE]
    if not request.mask_is_empty:
        names.insert(-1, DENOISING)
        if any(isinstance(prompt, str) for prompt in request.prompts):
            names.insert(0, TEXT)
    job = _job_of(pipeline, request, preview_bytes, before_block)
    run = PipelineRun(pipeline, job, names, before_block, on_phase)
    prompts = run.encode_prompts(request.prompts) if DENOISING in names else []
    clean = request.latents if request.picture is None else run.encode_pictures(request.picture)
    task = request.task(clean)
    if DENOISING in names:
        latents = run.denoise(task, prompts, request.guidance, on_pass, latents_dtype)
    else:
        latents = unpainted(task)
    picture = run.decode(latents)
    if run.report.peak_bytes is not None:
        log.info(run.report.summary)
    return picture, latents, run.report


def _job_of(
    pipeline: Pipeline, request: GenerationRequest, preview_bytes: int, before_block: BeforeBlock
) -> Workload:
    if request.mask_is_empty:
        return request.job
    words = _words(pipeline, request.prompts, before_block)
    return replace(request.job, words=words, preview_bytes=preview_bytes)


def _words(
    pipeline: Pipeline, prompts: Sequence[str | TextEmbedding], before_block: BeforeBlock
) -> int:
    """T5's tokens of the longest. Raises ValueError for one that is too long."""

    def words(prompt: str | TextEmbedding) -> int:
        if isinstance(prompt, str):
            return pipeline.checked_text_encoders.read(prompt, before_block)[1].counts.words
        return prompt.tokens.shape[1]

    return max(map(words, prompts))


@own_state()
@torch.inference_mode()
def encode_prompts(
    pipeline: Pipeline,
    prompts: Sequence[str],
    before_block: BeforeBlock,
    on_phase: OnPhase = _ignore,
) -> tuple[list[TextEmbedding], Report]:
    job = Workload(STEP, STEP, words=_words(pipeline, prompts, before_block))
    run = PipelineRun(pipeline, job, [TEXT], before_block, on_phase)
    return run.encode_prompts(prompts), run.report


@own_state()
@torch.inference_mode()
def encode_pictures(
    pipeline: Pipeline, pictures: Tensor, before_block: BeforeBlock, on_phase: OnPhase = _ignore
) -> tuple[Tensor, Report]:
    """RGB [n, height, width, 3] in 0..1 -> float32 latents in model space."""
    height, width = pictures.shape[1:3]
    run = PipelineRun(
        pipeline, Workload(width, height, len(pictures)), [ENCODE], before_block, on_phase
    )
    return run.encode_pictures(pictures), run.report


@own_state()
@torch.inference_mode()
def denoise(
    pipeline: Pipeline,
    request: GenerationRequest,
    on_pass: OnPass,
    before_block: BeforeBlock,
    latents_dtype: torch.dtype = torch.float32,
    preview_bytes: int = 0,
    on_phase: OnPhase = _ignore,
) -> tuple[Tensor, Report]:
    """The request's latents; its prompts are encoded, and it has no picture."""
    if request.mask_is_empty:
        return unpainted(request.task(request.latents)), Report()
    job = _job_of(pipeline, request, preview_bytes, before_block)
    run = PipelineRun(pipeline, job, [DENOISING], before_block, on_phase)
    prompts = run.encode_prompts(request.prompts)
    task = request.task(request.latents)
    return run.denoise(task, prompts, request.guidance, on_pass, latents_dtype), run.report


@own_state()
@torch.inference_mode()
def decode(
    pipeline: Pipeline, latents: Tensor, before_block: BeforeBlock, on_phase: OnPhase = _ignore
) -> tuple[Tensor, Report]:
    """Latents in model space -> float32 RGB [n, height, width, 3] in 0..1."""
    height, width = (PIXELS_PER_LATENT * side for side in latents.shape[2:])
    run = PipelineRun(
        pipeline, Workload(width, height, len(latents)), [DECODE], before_block, on_phase
    )
    return run.decode(latents), run.report


def _require_numbers(phase: str, *values: Tensor) -> None:
    """Raise ValueError where a phase gave NaN, which would be saved as black pixels."""
    if not all(torch.isfinite(each).all() for each in values):
        raise ValueError(
            say(
                "The phase '{phase}' gave values that are no numbers (NaN), so there is no "
                "picture. Set compute_precision to float32; if that does not help, the model file "
                "is damaged: download it again.",
                phase=say(phase),
            )
        )


def _with_ring(component: Component, plan: StagePlan) -> StagePlan:
    """The plan with a ring in place of weights that the host kept from becoming resident.

    As ComfyUI with --novram does with all of them.
    """
    weights = component.weights
    absent = plan.resident - weights.resident_bytes
    if plan.ring or absent <= 0:
        return plan
    ring = max(weights.largest_bytes, min(2 * weights.largest_bytes, absent))
    weights.release(ring - absent)
    return replace(plan, ring=ring)


class PipelineRun:
    """A run of a pipeline: its plan, its report, and the memory that it moves about.

    names: the phases it will have; before_block: called before each block of weights, may raise.
    Raises BudgetError when the budget is too small for one of them.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        job: Workload,
        names: Sequence[str],
        before_block: BeforeBlock,
        on_phase: OnPhase = _ignore,
    ):
        self.pipeline = pipeline
        self.plan = pipeline.plan(job, names)
        self.plan.require_budget()
        self.report = Report(self.plan.budget_bytes)
        self.before_block, self.on_phase = before_block, on_phase

    def encode_prompts(self, prompts: Sequence[str | TextEmbedding]) -> list[TextEmbedding]:
        """The embedding of each, without running an encoder for those that are remembered."""

        def known(prompt: str | TextEmbedding) -> TextEmbedding | None:
            if isinstance(prompt, str):
                return self.pipeline.checked_text_encoders.recall(prompt)
            return prompt

        found = [known(prompt) for prompt in prompts]
        if not all(found):
            encoders = self.pipeline.checked_text_encoders
            with self.phase(TEXT) as (plan, work):
                for index, prompt in enumerate(prompts):
                    if found[index] is None and isinstance(prompt, str):
                        found[index], moved = encoders.encode(
                            prompt, self.before_block, plan.ring, work
                        )
                        self.report.phases[-1].moved_bytes += moved
        embeddings = [embedding for embedding in found if embedding is not None]
        for embedding in embeddings:
            _require_numbers(TEXT, embedding.tokens, embedding.pooled)
        return embeddings

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """RGB [n, height, width, 3] in 0..1 -> float32 latents in model space, on the CPU."""
        return self._through_vae(ENCODE, self.pipeline.checked_vae.encode, pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents in model space -> float32 RGB [n, height, width, 3] in 0..1, on the CPU."""
        return self._through_vae(DECODE, self.pipeline.checked_vae.decode, latents)

    def _through_vae(self, name: str, through: Callable[..., Any], given: Tensor) -> Tensor:
        with self.phase(name) as (plan, work):
            limit = plan.values if self._budget(self.pipeline.checked_vae) else float("inf")
            result, moved = through(given, self.before_block, limit, plan.ring, work)
            self.report.phases[-1].moved_bytes += moved
        _require_numbers(name, result)
        return result

    def denoise(
        self,
        task: SamplerInputs,
        prompts: Sequence[TextEmbedding],
        guidance: float,
        on_pass: OnPass,
        latents_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The task's latents, float32 on the CPU; prompts: the positive one, and the negative one
        unless cfg is 1."""
        dit, computing = self.pipeline.dit, self.pipeline.computing
        device, module = dit.patcher.device, dit.weights.module
        through, seconds = passes(task.solver, task.sigmas), self.plan.seconds
        predicted = None if seconds is None else seconds * through
        with self.phase(DENOISING, predicted) as (plan, work):
            visits = dit.weights.running_on(device, self.before_block, through, plan.ring, work)
            given = (guidance, computing.dtype, device, latents_dtype, task.sigmas)

            def make() -> list[Conditions]:
                with computing.applied_to(module, device):
                    return conditions_of(module, prompts, *given)

            key = (guidance, computing, latents_dtype, *task.sigmas.tolist())
            with visits as stream:
                last = partial(dit.last_conditions.of, prompts, make, device, *key)
                conditions = work.attempt(last)
                with computing.applied_to(module, device):  # with a new buffer for conversions
                    positive, negative = [*conditions, None][:2]
                    velocity = flux_velocity(module, positive, work, negative, task.cfg)
                    latents = sample(task, velocity, on_pass, device, latents_dtype)
                self.report.phases[-1].moved_bytes += stream.moved_bytes
        latents = latents.float().cpu()
        _require_numbers(DENOISING, latents)
        return latents

    def _budget(self, component: Component) -> int | None:
        return None if component.patcher.device == CPU else self.plan.budget_bytes

    @contextmanager
    def phase(
        self, name: str, seconds: float | None = None
    ) -> Iterator[tuple[StagePlan, Chunking]]:
        """Memory as planned for one component; the others give way as far as it takes."""
        self.on_phase(name, seconds)
        plan = next(phase for phase in self.plan.phases if phase.name == name)
        component = self.pipeline.component(name)
        device = component.patcher.device
        report = StageReport(plan.name, plan.peak)
        self.report.phases.append(report)
        start = time.perf_counter()
        own = [c for c in self.pipeline.components if c.patcher.device == device]
        before = component.weights.resident_bytes
        memory, finished = None, False
        try:
            self._make_room(component, plan, own)
            plan = _with_ring(component, plan)
            if component is self.pipeline.dit and plan.ring:
                component.patcher.pin()
            memory = HeldVram(device, ChainMap(*(c.weights.resident_places for c in own)))
            with memory.held_to(report.planned_bytes, self._budget(component)):
                relieve = partial(self._relieve, component, own, memory)
                yield plan, Chunking(plan.tokens, plan.groups, relieve, memory.make_way)
            finished = True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            said = say(
                "The card ran out of memory in the phase '{phase}', which needs {smallest:.2f} GB "
                "at least. Close other programs that use the card, or choose a smaller picture or "
                "batch.",
                phase=say(plan.name),
                smallest=plan.smallest / GB,
            )
            # By PyTorch's words ComfyUI's canvas knows what to say at once.
            raise BudgetError("\n".join([said, str(error)])) from error
        finally:
            if memory is not None:
                report.peak_bytes = memory.peak_bytes()
                memory.give_back()  # for other programs; this one would keep it
            report.seconds = time.perf_counter() - start
            if device != CPU:  # where weights are computed with at home
                report.moved_bytes += max(0, component.weights.resident_bytes - before)
            if finished:
                log.info("%s", report)

    def _make_room(
        self,
        component: Component,
        plan: StagePlan,
        own: list[Component],
    ) -> None:
        budget = self._budget(component)
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
        component: Component,
        own: list[Component],
        memory: HeldVram,
    ) -> bool:
        """Free memory for a phase that found less than was planned. False: there is none."""
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
