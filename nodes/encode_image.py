"""The node that encodes pictures as a latent."""

from typing import TYPE_CHECKING

from ..host import current as host
from . import run_ui
from .arguments import checked
from .sockets import CATEGORY, Node, PipelineHandle, io

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.run.pipeline import Pipeline


class EncodeImage(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxEncodeImage",
            display_name="encode image",
            category=CATEGORY,
            description="Encodes pictures as LATENT with the pipeline's VAE, in bands that keep to "
            "its VRAM budget, without seams.",
            search_aliases=["vae encode", "图片编码", "VAE编码", "麦橘 超然"],
            inputs=[
                PipelineHandle.Input("pipeline", tooltip="From the CPU-offload pipeline."),
                io.Image.Input(
                    "image", tooltip="Sides that are no multiple of 16 lose their edges."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            outputs=[io.Latent.Output(display_name="latent", tooltip="As ComfyUI's VAEEncode.")],
        )

    @classmethod
    @checked
    def execute(cls, pipeline: "Pipeline", image: "Tensor") -> io.NodeOutput:
        from ..engine.run.pipeline import encode_pictures
        from ..host import native

        picture = native.from_image(image)
        latents, report = encode_pictures(pipeline, picture, **run_ui.callbacks(cls))
        latent = native.to_latent(latents, host.result_device())
        return io.NodeOutput(latent, ui=run_ui.shown(cls, report))
