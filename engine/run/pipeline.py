"""Prompt -> picture: the three components, in turn, inside one VRAM budget."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...messages import log
from ..errors import (
    ControlNetWidthError,
    EncoderWidthError,
    NoPictureError,
    NoTextEncodersError,
    NoVaeError,
    UnknownChannelsError,
)
from ..flux.controlnet import Control
from ..flux.picture_conditions import PictureConditions
from ..flux.reuse import Reuse
from ..flux.text_encoders import TextEmbedding, TextEncoders
from ..flux.transformer import DiT
from ..flux.vae import VAE
from ..offload.prefetch import BeforeBlock
from ..offload.weight_block import CPU
from ..plan.plan import Plan, Workload
from ..quant.compute import ComputePrecision
from ..sampling.loop import OnPass, unpainted
from ..sizes import OF_LATENTS, OF_MASK, PIXELS_PER_LATENT, STEP
from ..torch_state import own_state
from .pipeline_run import Component, OnStage, PipelineRun, ignore_stage
from .report import Report
from .request import GenerationRequest
from .stages import DecodeStage, DenoiseStage, EncodeStage, Stage, TextStage, checked_embeddings


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
    compute: ComputePrecision

    def __post_init__(self) -> None:
        g = self.dit.geometry
        known = (OF_LATENTS, 2 * OF_LATENTS, 2 * OF_LATENTS + OF_MASK)
        if g.in_channels not in known:
            raise UnknownChannelsError(channels=g.in_channels)
        if self.text_encoders is not None:
            self._require_width("CLIP-L", g.pooled_width, self.text_encoders.pooled_width)
            self._require_width("T5", g.text_width, self.text_encoders.t5_geometry.width)

    def _require_width(self, encoder: str, wanted: int, width: int) -> None:
        if width != wanted:
            raise EncoderWidthError(encoder=encoder, wanted=wanted, width=width)

    def lacks_pictures(self, request: GenerationRequest) -> bool:
        """Whether the transformer takes a picture, and a prompt brings none."""
        brought = all(each.has_image for each in request.prompt_pictures)
        return self.dit.geometry.takes_picture and not brought

    def require_pictures(self, request: GenerationRequest) -> None:
        """Raise NoPictureError where there is none that the transformer needs.

        A fill model is satisfied with a picture and a mask of the request.
        """
        g = self.dit.geometry
        filled = g.takes_mask and request.picture is not None and request.mask is not None
        if self.lacks_pictures(request) and not filled:
            raise NoPictureError(channels=g.in_channels)

    @property
    def components(self) -> tuple[Component, ...]:
        return tuple(filter(None, (self.dit, self.text_encoders, self.vae)))

    @property
    def checked_text_encoders(self) -> TextEncoders:
        """Raises NoTextEncodersError when there are none."""
        if self.text_encoders is None:
            raise NoTextEncodersError
        return self.text_encoders

    @property
    def checked_vae(self) -> VAE:
        """Raises NoVaeError when there is none."""
        if self.vae is None:
            raise NoVaeError
        return self.vae

    @property
    def text(self) -> TextStage:
        encoders = self.checked_text_encoders
        return TextStage(encoders, [c for c in self.components if c is not encoders])

    def text_with(self, coming: Sequence[str], nets: Sequence[Component] = ()) -> TextStage:
        """coming: prompts of later runs, to be encoded along; nets: control nets of the run."""
        text = self.text
        return replace(text, others=[*text.others, *nets], coming=coming)

    @property
    def denoise(self) -> DenoiseStage:
        return DenoiseStage(self.dit, self.compute)

    def denoise_with(self, controls: Sequence[Control], reuse: Reuse | None = None) -> DenoiseStage:
        """Raises ControlNetWidthError for a control net of another transformer."""
        for control in controls:
            found, wanted = control.net.geometry, self.dit.geometry
            for name in ("hidden", "text_width", "pooled_width"):
                if (width := getattr(found, name)) != getattr(wanted, name):
                    raise ControlNetWidthError(width=width, wanted=getattr(wanted, name))
        return replace(self.denoise, controls=controls, reuse=reuse)

    @property
    def encode(self) -> EncodeStage:
        return EncodeStage(self.checked_vae)

    @property
    def decode(self) -> DecodeStage:
        return DecodeStage(self.checked_vae)

    @property
    def stages(self) -> list[Stage]:
        """Of a picture from a prompt, as far as the components are there."""
        found: list[Stage] = [] if self.text_encoders is None else [self.text]
        return [*found, self.denoise, *([] if self.vae is None else [self.decode])]

    def plan(self, workload: Workload, stages: Sequence[Stage] | None = None) -> Plan:
        """How these stages, `self.stages` by default, would use the device as far as it is free
        now."""
        stages = self.stages if stages is None else stages
        budget = self._budget(stages)
        plans = tuple(
            replace(stage.plan(workload, None), smallest=0)  # nothing is too small for a CPU
            if stage.component.patcher.device == CPU
            else stage.plan(workload, budget)
            for stage in stages
        )
        seconds = next(
            (
                stage.step_seconds(plan, workload)
                for stage, plan in zip(stages, plans, strict=True)
                if isinstance(stage, DenoiseStage)
            ),
            None,
        )
        return Plan(workload, budget, plans, seconds, budget == self.budget_bytes)

    def _budget(self, stages: Sequence[Stage]) -> int | None:
        """Bytes that weights and working memory may take at once; None where nothing is counted,
        as on a CPU."""
        patchers = [stage.component.patcher for stage in stages]
        patchers = [patcher for patcher in patchers if patcher.device != CPU]
        limits = [patcher.available() for patcher in patchers]
        limits += [self.budget_bytes] if patchers else []
        return min((limit for limit in limits if limit is not None), default=None)

    def start(
        self,
        workload: Workload,
        stages: Sequence[Stage],
        before_block: BeforeBlock,
        on_stage: OnStage = ignore_stage,
    ) -> PipelineRun:
        """Raises BudgetError when the budget is too small for one of the stages."""
        components = [*self.components, *(other for stage in stages for other in stage.beside)]
        return PipelineRun(components, self.plan(workload, stages), before_block, on_stage)

    def text_tokens(self, prompts: Sequence[str | TextEmbedding], before_text: BeforeBlock) -> int:
        """T5's of the longest prompt. Raises PromptTooLongError."""

        def tokens(prompt: str | TextEmbedding) -> int:
            if isinstance(prompt, str):
                return self.checked_text_encoders.read(prompt, before_text)[1].counts.text_tokens
            return prompt.tokens.shape[1]

        return max(map(tokens, prompts))


@own_state()
@torch.inference_mode()
def paint(
    pipeline: Pipeline,
    request: GenerationRequest,
    on_pass: OnPass,
    before_block: BeforeBlock,
    latents_dtype: torch.dtype = torch.float32,
    preview_bytes: int = 0,
    on_stage: OnStage = ignore_stage,
) -> tuple[Tensor, Tensor, Report]:
    """Run the request; `before_block` is called before each block of weights, and before each part
    of a prompt that is read, and may raise.

    preview_bytes: of the device, that `on_pass` takes; on_stage: called with the name of each stage
    that begins, and its seconds where they are predicted.

    Returns float32 RGB [batch, height, width, 3] in 0..1 and the float32 latents
    [batch, 16, height/8, width/8] in model space, both on the CPU, and what the run used.
    Raises BudgetError when the memory does not suffice for a stage, before that stage has begun
    where that can be known.
    """
    stage = pipeline.denoise_with(() if request.mask_is_empty else request.acting, request.reuse)
    painting = [] if request.mask_is_empty else [stage]
    encoding = [pipeline.encode] if request.picture is not None or stage.controls else []
    reading = []
    if painting and request.has_texts:
        reading = [pipeline.text_with(request.coming, stage.beside)]
    stages = [*reading, *encoding, *painting, pipeline.decode]
    workload = _workload(pipeline, request, preview_bytes, before_block)
    run = pipeline.start(workload, stages, before_block, on_stage)
    prompts = _embedded(pipeline, run, request) if painting else []
    clean = (
        request.latents if request.picture is None else pipeline.encode.run(run, request.picture)
    )
    if painting and pipeline.lacks_pictures(request):
        prompts = _with_picture_to_fill(pipeline, run, request, prompts)
    inputs = request.sampler_inputs(clean)
    if painting:
        hints = _hints(pipeline, run, request, stage)
        given = (inputs, prompts, request.guidance, on_pass, latents_dtype, hints)
        latents = stage.run(run, *given)
    else:
        latents = unpainted(inputs)
    picture = pipeline.decode.run(run, latents)
    if run.report.peak_bytes is not None:
        log.info(run.report.summary)
    return picture, latents, run.report


def _workload(
    pipeline: Pipeline, request: GenerationRequest, preview_bytes: int, before_block: BeforeBlock
) -> Workload:
    if request.mask_is_empty:
        return request.workload
    pipeline.require_pictures(request)
    tokens = pipeline.text_tokens(request.prompts, before_block)
    return replace(request.workload, text_tokens=tokens, preview_bytes=preview_bytes)


def _embedded(
    pipeline: Pipeline, run: PipelineRun, request: GenerationRequest
) -> list[TextEmbedding]:
    """Of each prompt, with the pictures that it comes with."""
    if request.has_texts:
        prompts = pipeline.text_with(request.coming).run(run, request.prompts)
    else:
        prompts = checked_embeddings(request.prompts)
    both = zip(prompts, request.prompt_pictures, strict=True)
    return [replace(prompt, pictures=pictures) for prompt, pictures in both]


def _hints(
    pipeline: Pipeline, run: PipelineRun, request: GenerationRequest, stage: DenoiseStage
) -> list[Tensor]:
    """Latents of what each control of the stage shows its net, for as many as are painted."""
    shown = [control.shown(request.height, request.width) for control in stage.controls]
    return [pipeline.encode.run(run, pictures[: request.pictures]) for pictures in shown]


def _with_picture_to_fill(
    pipeline: Pipeline,
    run: PipelineRun,
    request: GenerationRequest,
    prompts: Sequence[TextEmbedding],
) -> list[TextEmbedding]:
    """The prompts, with the request's picture and mask where they bring none."""
    latents = pipeline.encode.run(run, request.greyed_picture)
    latents = latents.repeat(request.pictures // len(latents), 1, 1, 1)
    given = PictureConditions(latents, request.pixel_mask)
    return [p if p.pictures.has_image else replace(p, pictures=given) for p in prompts]


# Each part of `paint` alone: what it gives, on the CPU, and what it used.


@own_state()
@torch.inference_mode()
def encode_prompts(
    pipeline: Pipeline,
    prompts: Sequence[str],
    before_block: BeforeBlock,
    on_stage: OnStage = ignore_stage,
    coming: Sequence[str] = (),
) -> tuple[list[TextEmbedding], Report]:
    """coming: prompts of later runs, to be encoded along."""
    stage = pipeline.text_with(coming)
    workload = Workload(STEP, STEP, text_tokens=pipeline.text_tokens(prompts, before_block))
    run = pipeline.start(workload, [stage], before_block, on_stage)
    return stage.run(run, prompts), run.report


@own_state()
@torch.inference_mode()
def encode_pictures(
    pipeline: Pipeline,
    pictures: Tensor,
    before_block: BeforeBlock,
    on_stage: OnStage = ignore_stage,
) -> tuple[Tensor, Report]:
    """RGB [n, height, width, 3] in 0..1 -> float32 latents in model space."""
    height, width = pictures.shape[1:3]
    workload = Workload(width, height, len(pictures))
    run = pipeline.start(workload, [pipeline.encode], before_block, on_stage)
    return pipeline.encode.run(run, pictures), run.report


@own_state()
@torch.inference_mode()
def denoise(
    pipeline: Pipeline,
    request: GenerationRequest,
    on_pass: OnPass,
    before_block: BeforeBlock,
    latents_dtype: torch.dtype = torch.float32,
    preview_bytes: int = 0,
    on_stage: OnStage = ignore_stage,
) -> tuple[Tensor, Report]:
    """The request's latents; its prompts are encoded, and it has no picture to begin from."""
    inputs = request.sampler_inputs(request.latents)
    if request.mask_is_empty:
        return unpainted(inputs), Report()
    workload = _workload(pipeline, request, preview_bytes, before_block)
    stage = pipeline.denoise_with(request.acting, request.reuse)
    encoding = [pipeline.encode] if stage.controls else []
    run = pipeline.start(workload, [*encoding, stage], before_block, on_stage)
    prompts = _embedded(pipeline, run, request)
    hints = _hints(pipeline, run, request, stage)
    given = (inputs, prompts, request.guidance, on_pass, latents_dtype, hints)
    return stage.run(run, *given), run.report


@own_state()
@torch.inference_mode()
def decode(
    pipeline: Pipeline, latents: Tensor, before_block: BeforeBlock, on_stage: OnStage = ignore_stage
) -> tuple[Tensor, Report]:
    """Latents in model space -> float32 RGB [n, height, width, 3] in 0..1."""
    height, width = (PIXELS_PER_LATENT * side for side in latents.shape[2:])
    workload = Workload(width, height, len(latents))
    run = pipeline.start(workload, [pipeline.decode], before_block, on_stage)
    return pipeline.decode.run(run, latents), run.report
