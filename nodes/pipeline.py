"""The node that puts the parts together and gives them a budget."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..host import current as host
from ..messages import say
from .arguments import checked
from .sockets import (
    CATEGORY,
    DiTHandle,
    Node,
    PipelineHandle,
    TextEncodersHandle,
    VAEHandle,
    found_by,
)

if TYPE_CHECKING:
    from ..engine.flux.text_encoders import TextEncoders
    from ..engine.flux.transformer import DiT
    from ..engine.flux.vae import VAE
    from ..engine.run.pipeline import Pipeline

log = logging.getLogger("majicflux")
io = host.io
COMPUTE_PRECISIONS = ["auto", "bfloat16", "float32", "8-bit"]
INT8_ATTENTION = ["off", "auto", "on"]


class PipelineNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxPipeline",
            display_name="CPU-offload pipeline",
            category=CATEGORY,
            description="Puts the parts together and says how much of the card they may use. "
            "Weights stay in CPU memory; what does not fit on the card visits it block by block.",
            search_aliases=found_by(
                "offload, low vram, vram budget, pipeline, block swap",
                "低显存, 显存, CPU卸载, 流水线, 麦橘 超然",
            ),
            inputs=[
                DiTHandle.Input("dit", tooltip="From the Majic float8 DiT loader."),
                TextEncodersHandle.Input(
                    "text_encoders",
                    optional=True,
                    tooltip="From the bf16 text encoders node. Not needed where another node "
                    "encodes the prompt.",
                ),
                VAEHandle.Input(
                    "vae",
                    optional=True,
                    tooltip="From the Flux VAE node. Not needed where other nodes encode and "
                    "decode pictures.",
                ),
                io.Float.Input(
                    "vram_budget_gb",
                    default=0.0,
                    min=0.0,
                    max=256.0,
                    step=0.5,
                    tooltip="How many GB of the card this pipeline may hold at most, weights and "
                    "calculation together (the driver's own 0.3 to 0.6 GB come on top). The node "
                    "shows the plan, the sample node what was used. 0: what ComfyUI grants. For an "
                    "8 GB card 7, for 6 GB 5, for 4 GB 3. Less is slower; the picture is the same "
                    "up to rounding.",
                ),
                io.Combo.Input(
                    "compute_precision",
                    options=COMPUTE_PRECISIONS,
                    default="auto",
                    tooltip="auto: 8-bit products where the card has matrix units for the weights "
                    "(int8 from RTX 20 on, float8 from RTX 40 on), else bfloat16, or float32 where "
                    "that is missing (CPU, GTX 10, RTX 20). bfloat16: a little more accurate, "
                    "slower. 8-bit: also where it is slow. float32: a slow reference with twice "
                    "the working memory.",
                ),
                io.Combo.Input(
                    "int8_attention",
                    options=INT8_ATTENTION,
                    default="off",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Attention in 8 bits by comfy-kitchen, on RTX 20 cards and newer with a "
                        "PyTorch for CUDA 13. It gains the more, the larger the picture is, and "
                        "changes details a little. auto: for the sizes at which it is faster on "
                        "this card, which is measured. The node says what was chosen, and why."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                PipelineHandle.Output(display_name="pipeline", tooltip="For the sample node.")
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        dit: "DiT",
        text_encoders: "TextEncoders | None" = None,
        vae: "VAE | None" = None,
        vram_budget_gb: float = 0.0,
        compute_precision: str = "auto",
        int8_attention: str = "off",
    ) -> io.NodeOutput:
        from ..engine.plan.plan import Workload
        from ..engine.plan.units import GB
        from ..engine.quant.compute import choose_compute
        from ..engine.run.attention import choose_attention
        from ..engine.run.pipeline import Pipeline

        budget_bytes = int(vram_budget_gb * GB) or None
        device = dit.patcher.device
        native = host.compute_dtype(device)
        computing = choose_compute(dit.weights.module, device, compute_precision, native)
        attention = choose_attention(dit, int8_attention, computing.dtype)
        computing = replace(computing, attention=attention)
        report = say("transformer: {report}", report=computing.report)
        log.info(report)
        pipeline = Pipeline(dit, text_encoders, vae, budget_bytes, computing)
        pipeline.plan(Workload(64, 64)).require_budget()  # a budget that is too small for anything
        plan, values = _plan(pipeline)
        log.info("%s", plan)
        return io.NodeOutput(pipeline, ui=host.node_text([report, plan], **values))


def _plan(pipeline: "Pipeline") -> tuple[str, dict[str, Any]]:
    """Of a usual picture: as text, and as values that the canvas draws."""
    from ..engine.plan.plan import Workload

    if pipeline.dit.patcher.device.type == "cpu":
        return say("on the CPU: no VRAM is used"), {}
    pipeline.denoise.measure()
    found = pipeline.plan(Workload(1024, 1024))
    return str(found), {"plan": found.as_dict(), "bar": found.bar()}
