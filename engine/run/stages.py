"""The stages of a run: each plans itself, and runs itself in the memory that it planned."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...messages import say
from ..errors import NotFiniteError, PromptTooLongError
from ..flux.conditioning import Conditions, conditions_of
from ..flux.controlnet import Control, ControlNet
from ..flux.geometry import ControlGeometry
from ..flux.lockstep import ControlTokens, Lockstep, visits, visits_once
from ..flux.picture_conditions import picture_tokens
from ..flux.reuse import Reuse
from ..flux.step_cache import Course, StepCache
from ..flux.text_encoders import TextEmbedding, TextEncoders
from ..flux.transformer import DiT
from ..flux.vae import VAE
from ..flux.velocity import all_blocks, flux_velocity
from ..offload.offloaded_module import OffloadedModule, running_together
from ..offload.weight_sizes import joined
from ..plan.denoising import AdapterSizes, plan_denoising, step_seconds
from ..plan.measure import MEASURING_BYTES, device_profile, measured_profile
from ..plan.plan import DECODE, DENOISE, ENCODE, LABELS, TEXT, StagePlan, Workload
from ..plan.text import plan_text
from ..plan.vae import plan_decode, plan_encode
from ..quant.adapters import LastTerms, adapted, bound_bytes, plain_bytes
from ..quant.compute import ComputePrecision
from ..sampling.inputs import SamplerInputs
from ..sampling.loop import OnPass, sample
from ..sampling.solvers import levels_of_passes
from .pipeline_run import Component, PipelineRun
from .report import ReuseReport


@dataclass(frozen=True)
class TextStage:
    """Prompts -> embeddings. others: the pipeline's other components, which may have to stay;
    coming: prompts of later runs, for which the weights need not come again."""

    encoders: TextEncoders
    others: Sequence[Component] = ()
    coming: Sequence[str] = ()
    name: ClassVar[str] = TEXT
    repeats: ClassVar[bool] = False

    @property
    def component(self) -> TextEncoders:
        return self.encoders

    @property
    def beside(self) -> Sequence[Component]:
        return ()

    def plan(self, workload: Workload, budget: int | None) -> StagePlan:
        encoders = self.encoders
        others = sum(other.weights.travelling_bytes for other in self.others)
        return plan_text(
            encoders.weights.sizes, encoders.t5_geometry, encoders.itemsize, budget,
            device_profile(encoders.patcher.device), others, workload.text_tokens,
            plain_bytes(encoders.adapters, encoders.itemsize), 1 + len(self.coming),
        )  # fmt: skip

    def run(self, run: PipelineRun, prompts: Sequence[str | TextEmbedding]) -> list[TextEmbedding]:
        """The embedding of each, without running an encoder for those that are remembered."""
        found = {p: self.encoders.recall(p) for p in prompts if isinstance(p, str)}
        missing = [prompt for prompt, embedding in found.items() if embedding is None]
        if missing:
            with run.memory_of(self) as (plan, chunking):
                coming = self._readable_coming(run.plan.workload.text_tokens)
                for first in range(0, len(missing), plan.prompts):
                    some = missing[first : first + plan.prompts]
                    along = [coming.pop(0) for _ in coming[: plan.prompts - len(some)]]
                    given = (some, along, run.before_block, plan.ring, chunking)
                    embeddings, moved = self.encoders.encode_together(*given)
                    found |= zip(some, embeddings, strict=True)
                    run.moved(moved)
        return checked_embeddings([found[p] if isinstance(p, str) else p for p in prompts])

    def _readable_coming(self, text_tokens: int) -> list[str]:
        """Those that are not remembered and no longer than was planned for; what is wrong with one
        is told when it is painted."""
        readable = []
        for prompt in dict.fromkeys(self.coming):
            with suppress(PromptTooLongError):
                fits = self.encoders.count(prompt).text_tokens <= text_tokens
                if fits and self.encoders.recall(prompt) is None:
                    readable.append(prompt)
        return readable


@dataclass(frozen=True)
class DenoiseStage:
    """Noise and embeddings -> latents.

    controls: pictures that control nets are shown; reuse: which steps need not be computed.
    """

    dit: DiT
    compute: ComputePrecision
    controls: Sequence[Control] = ()
    reuse: Reuse | None = None
    name: ClassVar[str] = DENOISE
    repeats: ClassVar[bool] = True

    @property
    def component(self) -> DiT:
        return self.dit

    @property
    def beside(self) -> list[ControlNet]:
        """Each control net once."""
        return list({id(control.net): control.net for control in self.controls}.values())

    @property
    def _weights(self) -> list[OffloadedModule]:
        return [each.weights for each in (self.dit, *self.beside)]

    @property
    def _modules(self) -> nn.Module:
        return nn.ModuleList(weights.module for weights in self._weights)

    @property
    def _control_geometries(self) -> list[ControlGeometry]:
        return [control.net.geometry for control in self.controls]

    def plan(self, workload: Workload, budget: int | None) -> StagePlan:
        dit, compute, module = self.dit, self.compute, self.dit.weights.module
        method = compute.method(module, dit.patcher.device)
        once, _ = bound_bytes(module, dit.adapters, dit.adapted_once, method)
        always, ranks = bound_bytes(module, dit.adapters, dit.adapted_always, method)
        return plan_denoising(
            joined([weights.sizes for weights in self._weights]), dit.geometry, workload,
            compute.dtype.itemsize, bool(compute.eight_bit),
            compute.conversion_bytes(self._modules), budget, device_profile(dit.patcher.device),
            AdapterSizes(once, always, ranks), self._control_geometries, compute.attention,
            self.reuse is not None,
        )  # fmt: skip

    def measure(self) -> None:
        """Have the rates measured that the seconds of a step are predicted from."""
        self.dit.patcher.load(MEASURING_BYTES, self.dit.weights.resident_bytes)
        device_profile(self.dit.patcher.device, self.compute, rates=True)

    def step_seconds(self, plan: StagePlan, workload: Workload) -> float | None:
        """Predicted, where the rates have been measured."""
        profile = measured_profile(self.dit.patcher.device, self.compute)
        given = (plan, self.dit.geometry, workload)
        return profile and step_seconds(*given, profile, self._control_geometries)

    def run(
        self,
        run: PipelineRun,
        inputs: SamplerInputs,
        prompts: Sequence[TextEmbedding],
        guidance: float,
        on_pass: OnPass,
        latents_dtype: torch.dtype = torch.float32,
        hints: Sequence[Tensor] = (),
    ) -> Tensor:
        """The latents, float32 on the CPU; prompts: the positive one, and the negative one unless
        cfg is 1; hints: of each control, what it shows as latents in model space."""
        dit, compute = self.dit, self.compute
        device, module, modules = dit.patcher.device, dit.weights.module, self._modules
        levels = levels_of_passes(inputs.solver, inputs.sigmas)
        course, seconds = self._course(levels), run.plan.seconds
        predicted = None if seconds is None else course.seconds(self._seconds(levels, seconds))
        with run.memory_of(self, predicted) as (plan, chunking):
            order = [*visits_once(dit, self.controls), *course.ahead()]
            given = (device, run.before_block, plan.ring, chunking)
            running = running_together(self._weights, order, *given)

            def beside(
                names: Sequence[str], last: LastTerms | None = None
            ) -> AbstractContextManager[None]:
                return adapted(module, dit.adapters, names, compute.dtype, device, last)

            def conditions(net: DiT | ControlNet) -> list[Conditions]:
                """Of each prompt for a transformer or control net."""

                def make() -> list[Conditions]:
                    adapted_layers = beside(dit.adapted_once) if net is dit else nullcontext()
                    with compute.applied_to(modules, device), adapted_layers:
                        return conditions_of(
                            net.weights.module, prompts, guidance, compute.dtype, device,
                            latents_dtype, inputs.sigmas,
                        )  # fmt: skip

                adapters = dit.adapters if net is dit and dit.adapted_once else ()
                key = (guidance, compute, latents_dtype, adapters, *inputs.sigmas.tolist())
                net.weights.pinned_beside.add(net.last_conditions)
                return chunking.retry(partial(net.last_conditions.of, prompts, make, device, *key))

            with running as ring:
                of_prompts = conditions(dit)
                told = []
                for control, hint in zip(self.controls, hints, strict=True):
                    given = (control, conditions(control.net), hint, len(inputs.noise))
                    told.append(chunking.retry(partial(ControlTokens.of, *given)))
                with_pictures = partial(self._with_pictures, of_prompts, inputs, prompts, device)
                of_prompts = chunking.retry(with_pictures)
                with ExitStack() as stack:
                    # With a new buffer for conversions.
                    stack.enter_context(compute.applied_to(modules, device))
                    last = dit.last_terms.made_of(dit.adapters, compute)
                    chunking.retry(lambda: stack.enter_context(beside(dit.adapted_always, last)))
                    positive, negative = [*of_prompts, None][:2]
                    through = Lockstep(dit.geometry, told) if told else all_blocks
                    cache = None
                    if self.reuse is not None:
                        given = (through, self.reuse, course, ring, plan.kept_on_host)
                        through = cache = StepCache(*given)
                    given = (module, positive, chunking, negative, inputs.cfg, through)
                    latents = sample(inputs, flux_velocity(*given), on_pass, device, latents_dtype)
                    latents = latents.float().cpu()
                run.moved(ring.moved_bytes)
                if cache is not None:
                    given = (course.reused, cache.unmoved_bytes, *cache.seconds)
                    run.reused(ReuseReport(len(course.decisions), *given))
        require_numbers(self.name, latents)
        return latents

    def _course(self, levels: Sequence[float]) -> Course:
        """The passes at these noise levels. What was found while other controls acted is not taken
        again, nor continued along a line, unless the user chose so."""
        acting = [[control.acts_at(level) for control in self.controls] for level in levels]
        decisions = (
            [True] * len(levels) if self.reuse is None else self.reuse.decisions(len(levels))
        )
        for number, (before, now) in enumerate(pairwise(acting), 1):
            if before != now:
                two = slice(number, number + 2)
                decisions[two] = [each is not False for each in decisions[two]]
        return Course(decisions, visits(self.dit, self.controls, levels))

    def _seconds(self, levels: Sequence[float], most: float) -> list[float]:
        """Of the passes at these noise levels, by the blocks that run in each. most: with those of
        all control nets."""

        def blocks(controls: Iterable[Control]) -> int:
            return sum(g.blocks for g in (self.dit.geometry, *(c.net.geometry for c in controls)))

        acting = ([c for c in self.controls if c.acts_at(level)] for level in levels)
        return [most * blocks(controls) / blocks(self.controls) for controls in acting]

    def _with_pictures(
        self,
        conditions: Sequence[Conditions],
        inputs: SamplerInputs,
        prompts: Sequence[TextEmbedding],
        device: torch.device,
    ) -> list[Conditions]:
        """The conditions with what the pictures of their prompts are to the transformer."""
        shape, noise_mask = inputs.noise.shape, inputs.mask
        found = []
        for each, prompt in zip(conditions, prompts, strict=True):
            on_device = partial(Tensor.to, device=device, dtype=each.text.dtype)
            given = (prompt.pictures, self.dit.geometry, shape, noise_mask, on_device)
            found.append(replace(each, pictures=picture_tokens(*given)))
        return found


@dataclass(frozen=True)
class _VaeStage:
    vae: VAE
    name: ClassVar[str]
    repeats: ClassVar[bool] = False

    @property
    def component(self) -> VAE:
        return self.vae

    @property
    def beside(self) -> Sequence[Component]:
        return ()

    @abstractmethod
    def plan(self, workload: Workload, budget: int | None) -> StagePlan: ...

    def _plan(
        self, plan: Callable[..., StagePlan], workload: Workload, budget: int | None
    ) -> StagePlan:
        vae, profile = self.vae, device_profile(self.vae.patcher.device)
        return plan(vae.weights.sizes, workload, vae.dtype.itemsize, budget, profile)

    def _run(
        self, run: PipelineRun, through: Callable[..., tuple[Tensor, int]], batch: Tensor
    ) -> Tensor:
        with run.memory_of(self) as (plan, chunking):
            result, moved = through(batch, run.before_block, plan.bands, plan.ring, chunking)
            run.moved(moved)
        require_numbers(self.name, result)
        return result


class EncodeStage(_VaeStage):
    """RGB [n, height, width, 3] in 0..1 -> float32 latents in model space, on the CPU."""

    name: ClassVar[str] = ENCODE

    def plan(self, workload: Workload, budget: int | None) -> StagePlan:
        return self._plan(plan_encode, workload, budget)

    def run(self, run: PipelineRun, pictures: Tensor) -> Tensor:
        return self._run(run, self.vae.encode, pictures)


class DecodeStage(_VaeStage):
    """Latents in model space -> float32 RGB [n, height, width, 3] in 0..1, on the CPU."""

    name: ClassVar[str] = DECODE

    def plan(self, workload: Workload, budget: int | None) -> StagePlan:
        return self._plan(plan_decode, workload, budget)

    def run(self, run: PipelineRun, latents: Tensor) -> Tensor:
        return self._run(run, self.vae.decode, latents)


Stage = TextStage | DenoiseStage | EncodeStage | DecodeStage


def checked_embeddings(prompts: Sequence[object]) -> list[TextEmbedding]:
    """Those that are embeddings. Raises NotFiniteError, also for what other nodes have encoded."""
    embeddings = [prompt for prompt in prompts if isinstance(prompt, TextEmbedding)]
    for embedding in embeddings:
        require_numbers(TEXT, embedding.tokens, embedding.pooled)
    return embeddings


def require_numbers(name: str, *values: Tensor) -> None:
    """Raise NotFiniteError where a stage gave NaN, which would be saved as black pixels."""
    if not all(torch.isfinite(each).all() for each in values):
        raise NotFiniteError(phase=say(LABELS[name]))
