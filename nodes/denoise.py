"""The node that samples as ComfyUI's KSampler (Advanced) does."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..host import current as host
from ..messages import MajicFluxError
from . import run_ui, sampler_inputs
from .arguments import checked
from .sockets import CATEGORY, Node, PipelineHandle, found_by, io

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.flux.controlnet import Control
    from ..engine.run.pipeline import Pipeline

LAST_STEP = 10000


class Denoise(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxDenoise",
            display_name="denoise",
            category=CATEGORY,
            description="Samples as ComfyUI's KSampler (Advanced) does, with the pipeline's "
            "transformer inside its VRAM budget: CONDITIONING and LATENT in, LATENT out.",
            search_aliases=found_by(
                "ksampler, ksampler advanced, sampler",
                "采样, 去噪, 麦橘 超然",
            ),
            inputs=[
                PipelineHandle.Input("pipeline", tooltip="From the CPU-offload pipeline."),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt, from encode prompt or CLIPTextEncode."
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="Empty, an encoded picture, or where another sampler stopped. Its "
                    "noise mask and its batch numbers count.",
                ),
                sampler_inputs.seed(),
                sampler_inputs.steps(),
                sampler_inputs.guidance(),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Needed when cfg is not 1."
                ),
                sampler_inputs.cfg(),
                sampler_inputs.solver(),
                sampler_inputs.schedule(),
                sampler_inputs.strength(),
                io.Int.Input(
                    "start_at_step",
                    default=0,
                    min=0,
                    max=LAST_STEP,
                    optional=True,
                    advanced=True,
                    tooltip="Leave out the steps before this one.",
                ),
                io.Int.Input(
                    "end_at_step",
                    default=LAST_STEP,
                    min=1,
                    max=LAST_STEP,
                    optional=True,
                    advanced=True,
                    tooltip="Stop before this step; the noise that is left stays in the latent.",
                ),
                io.Boolean.Input(
                    "add_noise",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Off: the latent brings the noise of a sampler that stopped before.",
                ),
                sampler_inputs.sigmas(),
                sampler_inputs.control(),
                *sampler_inputs.reuse(),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt],
            outputs=[
                io.Latent.Output(
                    display_name="latent", tooltip="For decode, VAEDecode or another sampler."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, seed: int | None = None, **others: Any) -> Any:
        return sampler_inputs.fingerprint(cls, seed)

    @classmethod
    @checked
    def execute(
        cls,
        pipeline: "Pipeline",
        positive: Any,
        latent: Any,
        seed: int,
        steps: int,
        guidance: float,
        negative: Any = None,
        cfg: float = 1.0,
        solver: str = sampler_inputs.DEFAULT_SOLVER,
        schedule: str = sampler_inputs.DEFAULT_SCHEDULE,
        strength: float = 1.0,
        start_at_step: int = 0,
        end_at_step: int = LAST_STEP,
        add_noise: bool = True,
        sigmas: "Tensor | None" = None,
        control: "tuple[Control, ...]" = (),
        reuse: str = sampler_inputs.NO_REUSE,
        reused_steps: str = "",
    ) -> io.NodeOutput:
        from ..engine.run.pipeline import denoise
        from ..engine.sampling.schedules import some_steps
        from ..host import native

        if cfg != 1 and negative is None:
            raise MajicFluxError("A cfg other than 1 needs a negative prompt: connect negative.")
        request, lines = sampler_inputs.generation_request(
            cls,
            pipeline,
            latent=latent,
            positive=positive,
            negative=negative,
            cfg=cfg,
            seed=seed,
            steps=steps,
            guidance=guidance,
            solver=solver,
            schedule=schedule,
            sigmas=sigmas,
            strength=strength,
            add_noise=add_noise,
            controls=control,
            reuse=reuse,
            reused_steps=reused_steps,
        )
        part = some_steps(request.schedule, start_at_step, end_at_step)
        request = replace(request, schedule=part)
        callbacks = run_ui.sampling_callbacks(cls, pipeline, request)
        latents, report = denoise(pipeline, request, **callbacks)
        result = native.to_latent(latents, host.result_device(), latent)
        shown = run_ui.sampling_shown(cls, pipeline, request, report, lines)
        return io.NodeOutput(result, ui=shown)
