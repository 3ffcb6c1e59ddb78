"""The node that decodes a latent into pictures."""

from typing import TYPE_CHECKING, Any

from ..host import current as host
from . import run_ui
from .arguments import checked
from .sockets import CATEGORY, Node, PipelineHandle, io

if TYPE_CHECKING:
    from ..engine.run.pipeline import Pipeline


class Decode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxDecode",
            display_name="decode",
            category=CATEGORY,
            description="Decodes LATENT to pictures with the pipeline's VAE, in bands that keep to "
            "its VRAM budget, without seams.",
            search_aliases=["vae decode", "tiled decode", "解码", "VAE解码", "麦橘 超然"],
            inputs=[
                PipelineHandle.Input("pipeline", tooltip="From the CPU-offload pipeline."),
                io.Latent.Input("latent", tooltip="Of any Flux.1 sampler or VAE encoder."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt],
            outputs=[io.Image.Output(display_name="image", tooltip="As ComfyUI's VAEDecode.")],
        )

    @classmethod
    @checked
    def execute(cls, pipeline: "Pipeline", latent: Any) -> io.NodeOutput:
        from ..engine.run.pipeline import decode
        from ..host import native

        latents = native.from_latent(latent)
        picture, report = decode(pipeline, latents, **run_ui.callbacks(cls))
        return io.NodeOutput(picture.to(host.result_device()), ui=run_ui.shown(cls, report))
