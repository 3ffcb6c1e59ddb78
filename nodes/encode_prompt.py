"""The node that encodes a prompt."""

from typing import TYPE_CHECKING

from ..host import current as host
from . import run_ui, sampler_inputs
from .arguments import checked
from .sockets import CATEGORY, Node, PipelineHandle, io

if TYPE_CHECKING:
    from ..engine.run.pipeline import Pipeline


class EncodePrompt(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxEncodePrompt",
            display_name="encode prompt",
            category=CATEGORY,
            description="Encodes a prompt as CONDITIONING, inside the pipeline's VRAM budget, for "
            "denoise, sample or ComfyUI's own samplers.",
            search_aliases=["clip text encode", "prompt", "提示词", "编码提示词", "麦橘 超然"],
            inputs=[
                PipelineHandle.Input("pipeline", tooltip="From the CPU-offload pipeline."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="As of the sample node: in English, and (words:1.3) weighs them more.",
                ),
                sampler_inputs.guidance(),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="The prompt and its guidance."
                )
            ],
        )

    @classmethod
    @checked
    def execute(cls, pipeline: "Pipeline", prompt: str, guidance: float) -> io.NodeOutput:
        from ..engine.run.pipeline import encode_prompts
        from ..host import native

        coming = host.coming_prompts(cls.hidden.unique_id)
        given = (pipeline, [prompt])
        (embedding,), report = encode_prompts(*given, **run_ui.callbacks(cls), coming=coming)
        counts = pipeline.checked_text_encoders.count(prompt)
        conditioning = native.to_conditioning(embedding, guidance)
        return io.NodeOutput(conditioning, ui=run_ui.shown(cls, report, counts=counts))
