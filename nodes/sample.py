"""The node that paints pictures from a prompt."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..engine.sizes import MAX_SIDE, STEP
from ..host import current as host
from ..messages import MajicFluxError
from . import run_ui, sampler_inputs
from .arguments import checked
from .sockets import CATEGORY, Node, PipelineHandle, found_by, io

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.flux.controlnet import Control
    from ..engine.flux.picture_conditions import PictureConditions
    from ..engine.run.pipeline import Pipeline
    from ..engine.run.report import StageReport

CUSTOM = "width x height"
SIZES = [
    "1024x1024 (1:1)",
    "1152x896 (9:7)",
    "896x1152 (7:9)",
    "1216x832 (3:2)",
    "832x1216 (2:3)",
    "1344x768 (16:9)",
    "768x1344 (9:16)",
    "1536x640 (21:9)",
    "640x1536 (9:21)",
]


def _side(name: str) -> Any:
    return io.Int.Input(
        name,
        default=1024,
        min=STEP,
        max=MAX_SIDE,
        step=STEP,
        tooltip="Pixels, rounded to a multiple of 16. An image or latent brings its own size.",
    )


class Sample(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxSample",
            display_name="sample",
            category=CATEGORY,
            description="Paints the prompt: encodes it, removes the noise step by step, decodes.",
            search_aliases=found_by(
                "majicflux, ksampler, sampler, text to image, txt2img, image to image",
                "img2img, inpaint, outpaint, fill, kontext, generate",
                "采样, 采样器, 文生图, 图生图, 局部重绘, 扩图, 改图, 生成图片, 麦橘超然",
            ),
            inputs=[
                PipelineHandle.Input("pipeline", tooltip="From the CPU-offload pipeline."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What to paint, in English: T5 cannot read Chinese, CLIP-L hardly. "
                    "Empty is allowed. (words:1.3) weighs them more, \\( and \\) are plain "
                    "brackets.",
                ),
                sampler_inputs.seed(),
                sampler_inputs.steps(),
                sampler_inputs.guidance(),
                _side("width"),
                _side("height"),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Pictures at once, each with noise of its own. Needs more memory.",
                ),
                io.String.Input(
                    "negative_prompt",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    optional=True,
                    tooltip="What not to paint. Used, and shown, when cfg is not 1.",
                ),
                sampler_inputs.cfg(),
                sampler_inputs.solver(),
                sampler_inputs.schedule(),
                io.Combo.Input(
                    "size",
                    options=[CUSTOM, *SIZES],
                    default=CUSTOM,
                    optional=True,
                    tooltip="A size that Flux paints well, or a width and height of your own. An "
                    "image or latent brings its own size.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="A picture to begin from, for image to image and inpainting. Its size "
                    "is that of the result; sides that are no multiple of 16 lose their edges.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The same as a LATENT, instead of an image. Its noise mask counts.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White: what may change of the image or latent. Soft edges blend. "
                    "Needs one of the two.",
                ),
                sampler_inputs.strength(),
                io.Boolean.Input(
                    "keep_unmasked",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="With an image and a mask: outside the mask return the image's own "
                    "pixels, bit for bit. Off: as the VAE decodes them.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="A prompt that was encoded elsewhere, such as by CLIPTextEncode, "
                    "instead of the text. Its guidance, if it has one, comes first.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The same for the negative prompt. Used when cfg is not 1.",
                ),
                sampler_inputs.sigmas(),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="For Kontext models: the picture to change, or several in a batch. For "
                    "depth and canny models and control LoRAs: the depth map or the edges.",
                ),
                sampler_inputs.control(),
                *sampler_inputs.reuse(),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The pictures."),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The pictures before decoding, as other nodes expect them.",
                ),
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
        prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        width: int,
        height: int,
        batch_size: int,
        negative_prompt: str = "",
        cfg: float = 1.0,
        solver: str = sampler_inputs.DEFAULT_SOLVER,
        schedule: str = sampler_inputs.DEFAULT_SCHEDULE,
        size: str = CUSTOM,
        image: "Tensor | None" = None,
        latent: Any = None,
        mask: "Tensor | None" = None,
        strength: float = 1.0,
        keep_unmasked: bool = True,
        positive: Any = None,
        negative: Any = None,
        sigmas: "Tensor | None" = None,
        reference: "Tensor | None" = None,
        control: "tuple[Control, ...]" = (),
        reuse: str = sampler_inputs.NO_REUSE,
        reused_steps: str = "",
    ) -> io.NodeOutput:
        from ..engine.run.pipeline import paint
        from ..host import native

        if size != CUSTOM:
            width, height = map(int, size.partition(" ")[0].split("x"))
        request, lines = sampler_inputs.generation_request(
            cls,
            pipeline,
            size=(width, height),
            image=image,
            latent=latent,
            mask=mask,
            prompt=prompt,
            positive=positive,
            negative_prompt=negative_prompt,
            negative=negative,
            cfg=cfg,
            seed=seed,
            steps=steps,
            guidance=guidance,
            batch_size=batch_size,
            solver=solver,
            schedule=schedule,
            sigmas=sigmas,
            strength=strength,
            controls=control,
            reuse=reuse,
            reused_steps=reused_steps,
        )
        encoded = []
        if reference is not None:
            if request.prompt_pictures[0]:
                raise MajicFluxError(
                    "positive brings pictures of its own, and reference too. Disconnect one of the "
                    "two."
                )
            given, encoded = _encoded(cls, pipeline, reference)
            request = replace(request, reference=given)
        callbacks = run_ui.sampling_callbacks(cls, pipeline, request)
        pictures, latents, report = paint(pipeline, request, **callbacks)
        report.stages[:0] = encoded
        if keep_unmasked and request.picture is not None and request.mask is not None:
            pictures = native.pasted(pictures, request.picture, request.mask)
        device = host.result_device()
        shown = run_ui.sampling_shown(cls, pipeline, request, report, lines)
        return io.NodeOutput(pictures.to(device), native.to_latent(latents, device), ui=shown)


def _encoded(
    node: Any, pipeline: "Pipeline", reference: "Tensor"
) -> "tuple[PictureConditions, list[StageReport]]":
    """What the reference is to the transformer, and how it was encoded."""
    from ..engine.flux.picture_conditions import PictureConditions
    from ..engine.run.pipeline import encode_pictures
    from ..host import native

    if pipeline.dit.geometry.takes_mask:
        raise MajicFluxError("A fill model takes no reference: connect image and mask instead.")
    pictures = native.from_image(reference)
    latents, report = encode_pictures(pipeline, pictures, **run_ui.callbacks(node))
    if pipeline.dit.geometry.takes_picture:
        return PictureConditions(latents), report.stages
    return PictureConditions(references=latents.split(1)), report.stages
