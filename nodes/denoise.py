from typing import TYPE_CHECKING, Any

from ..host import current as host
from ..host import provenance
from ..messages import say
from . import sampling
from .arguments import checked
from .sockets import CATEGORY, Node, PipelineHandle

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.run.pipeline import Pipeline

io = host.io
LAST_STEP = 10000


class Denoise(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxDenoise",
            display_name="denoise",
            category=CATEGORY,
            description=(
                "Samples as ComfyUI's KSampler (Advanced) does, with the pipeline's transformer "
                "inside its VRAM budget: CONDITIONING and LATENT in, LATENT out."
            ),
            search_aliases=[
                "ksampler",
                "ksampler advanced",
                "sampler",
                "采样",
                "去噪",
                "麦橘 超然",
            ],
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
                sampling.seed(),
                sampling.steps(),
                sampling.guidance(),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Needed when cfg is not 1."
                ),
                sampling.cfg(),
                sampling.solver(),
                sampling.schedule(),
                sampling.strength(),
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
                sampling.sigmas(),
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
        return sampling.fingerprint(cls, seed)

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
        solver: str = "euler",
        schedule: str = sampling.SCHEDULES[0],
        strength: float = 1.0,
        start_at_step: int = 0,
        end_at_step: int = LAST_STEP,
        add_noise: bool = True,
        sigmas: "Tensor | None" = None,
    ) -> io.NodeOutput:
        from ..engine.run.pipeline import denoise
        from ..engine.run.request import GenerationRequest
        from ..engine.sampling.schedules import some_steps
        from ..engine.sampling.solvers import SOLVERS
        from ..engine.sizes import PIXELS_PER_LATENT
        from ..host import native

        latents = native.from_latent(latent)
        mask = latent.get("noise_mask")
        height, width = (PIXELS_PER_LATENT * side for side in latents.shape[2:])
        geometry = pipeline.dit.geometry
        towards = native.from_conditioning(say("positive"), positive, geometry)
        away: Any = ""
        if cfg != 1:
            if negative is None:
                raise ValueError(
                    say("A cfg other than 1 needs a negative prompt: connect negative.")
                )
            away = native.from_conditioning(say("negative"), negative, geometry)
        seed, drawn = sampling.resolved_seed(cls, seed)
        all_steps = sampling.schedule_of(schedule, sigmas)
        request = GenerationRequest(
            towards,
            seed,
            steps,
            guidance,
            width,
            height,
            negative=away,
            cfg=cfg,
            schedule=some_steps(all_steps, start_at_step, end_at_step),
            solver=SOLVERS[solver],
            latents=latents,
            strength=strength,
            mask=None if mask is None else native.from_mask(mask, None),
            noise_of=latent.get("batch_index"),
            add_noise=add_noise,
        )
        on_pass = host.progress(
            request.passes, request.job.steps, pipeline.dit.patcher.device, cls.hidden.unique_id
        )
        found, report = denoise(
            pipeline, request, on_pass, host.check_cancelled,
            preview_bytes=host.preview_bytes(width, height),
            on_phase=host.phase_teller(cls.hidden.unique_id),
        )  # fmt: skip
        lines = [str(report), sampling.nothing_painted(request), drawn]
        values = {"seed": seed, **report.as_dict()}
        provenance.keep(cls.hidden, values)
        result = native.to_latent(found, host.result_device(), latent)
        return io.NodeOutput(result, ui=host.node_text(lines, **values))
