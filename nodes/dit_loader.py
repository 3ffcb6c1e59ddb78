from typing import Any

from ..host import current as host
from . import model_files
from .sockets import CATEGORY, DiTHandle

io = host.io
FOLDER = "diffusion_models"
WEIGHT_PRECISIONS = ["float8_e4m3fn", "bfloat16"]


class DiTLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxDiTLoader",
            display_name="Majic float8 DiT loader",
            category=CATEGORY,
            description=(
                "Loads the transformer of majicflus_v1 (麦橘超然) or another Flux.1 model into "
                "CPU memory, by default in float8 with one scale per output channel."
            ),
            search_aliases=[
                "majicflus",
                "majic",
                "flux",
                "dit",
                "unet",
                "fp8",
                "float8",
                "load model",
                "麦橘超然",
                "麦橘",
                "加载模型",
                "低显存",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    tooltip=(
                        "A Flux.1 transformer in models/diffusion_models, such as "
                        "majicflus_v134.safetensors or flux1-dev.safetensors."
                    ),
                    **model_files.options(FOLDER, "majicflus", "flux"),
                ),
                io.Combo.Input(
                    "weight_precision",
                    options=WEIGHT_PRECISIONS,
                    default="float8_e4m3fn",
                    tooltip=(
                        "float8_e4m3fn: 12 GB of CPU memory, one scale per output channel keeps "
                        "small weights. bfloat16: 24 GB, the weights exactly as published."
                    ),
                ),
                io.Boolean.Input(
                    "keep_prepared",
                    default=True,
                    optional=True,
                    tooltip=(
                        "Keep the converted float8 weights in models/majicflux_prepared, at the "
                        "cost of 12 GB of disk. Loading then takes a second, and the weights do "
                        "not count as used memory: 16 GB are enough."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                DiTHandle.Output(
                    display_name="dit", tooltip="The transformer, for the CPU-offload pipeline."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        from ..loaders.flux_dit import inspect_flux_dit

        return model_files.problem(FOLDER, file, inspect_flux_dit) or True

    @classmethod
    def fingerprint_inputs(
        cls, file: str, weight_precision: str, keep_prepared: bool = True
    ) -> Any:
        return model_files.fingerprint(FOLDER, file)

    @classmethod
    def execute(cls, file: str, weight_precision: str, keep_prepared: bool = True) -> io.NodeOutput:
        import torch

        from ..engine.flux_dit import DiT
        from ..loaders.flux_dit import load_flux_dit

        dtype = getattr(torch, weight_precision)
        path = model_files.resolve(FOLDER, file)
        prepared = host.prepared_folder() if keep_prepared else None

        def load() -> DiT:
            device = host.compute_device()
            weights, geometry = load_flux_dit(
                path, dtype, host.loading_progress(), prepared, device
            )
            patcher = host.make_patcher(weights, device, "MajicFluxDiT")
            return DiT(weights, patcher, geometry, dtype)

        dit = model_files.shared(load, model_files.fingerprint(FOLDER, file), dtype, keep_prepared)
        host.show_on_node(cls.hidden.unique_id, dit.weights.report)
        return io.NodeOutput(dit)
