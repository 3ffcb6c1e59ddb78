from typing import TYPE_CHECKING

from ..host import current as host
from .sockets import CATEGORY, PipelineHandle

if TYPE_CHECKING:
    from ..engine.pipeline import Pipeline

io = host.io


class Sample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxSample",
            display_name="sample",
            category=CATEGORY,
            description="Paints the prompt: encodes it, removes the noise step by step, decodes.",
            search_aliases=[
                "majicflux",
                "ksampler",
                "sampler",
                "text to image",
                "txt2img",
                "generate",
                "采样",
                "采样器",
                "文生图",
                "生成图片",
                "麦橘超然",
            ],
            inputs=[
                PipelineHandle.Input("pipeline", tooltip="From the CPU-offload pipeline."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What to paint, in English or Chinese. Empty is allowed.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Chooses the noise. The same seed and settings give the same picture.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=100,
                    tooltip="Denoising steps. 20 is the published setting; more is slower.",
                ),
                io.Float.Input(
                    "guidance",
                    default=3.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip=(
                        "How closely to follow the prompt, built into Flux.1-dev models. 3.5 is "
                        "usual; lower looks more natural. schnell models ignore it."
                    ),
                ),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Pixels, a multiple of 16.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Pixels, a multiple of 16.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Pictures at once, each with noise of its own. Needs more memory.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The pictures."),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The pictures before decoding, as other nodes expect them.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, width: int | None = None, height: int | None = None) -> bool | str:
        from ..engine.sizes import size_problem

        sizes = (("Width", width), ("Height", height))
        problems = (size_problem(name, size) for name, size in sizes if size is not None)
        return next(filter(None, problems), True)

    @classmethod
    def execute(
        cls,
        pipeline: "Pipeline",
        prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        width: int,
        height: int,
        batch_size: int,
    ) -> io.NodeOutput:
        from ..engine.latents import to_vae_space
        from ..engine.pipeline import Request, paint

        request = Request(prompt, seed, steps, guidance, width, height, batch_size)
        on_step = host.progress(steps, pipeline.dit.patcher.device)
        image, latents, report = paint(pipeline, request, on_step, host.check_cancelled)
        host.show_on_node(cls.hidden.unique_id, str(report))
        if cls.hidden.extra_pnginfo is not None:  # SaveImage writes it into the picture
            cls.hidden.extra_pnginfo["majicflux"] = report.as_dict()
        device = host.result_device()
        return io.NodeOutput(image.to(device), {"samples": to_vae_space(latents).to(device)})
