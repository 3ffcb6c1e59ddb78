"""The node that loads a transformer."""

from typing import TYPE_CHECKING, Any

from ..downloads import model_folders
from ..engine.quant.formats import PRECISIONS, STORAGES, Precision
from ..host import current as host
from ..loaders.convert import Progress
from ..loaders.flux_dit import inspect_flux_dit, load_flux_dit
from .arguments import checked
from .model_files import FileNode, options, shared
from .sockets import CATEGORY, DiTHandle, found_by, io

if TYPE_CHECKING:
    from ..engine.flux.transformer import DiT, Origin

FOLDER = "diffusion_models"
SAME = "as weight_precision"
PRECISION_HELP = (
    "float8_e4m3fn: 15 GB of CPU memory, of which 8.6 travel at every step; one scale per output "
    "channel, under half of a plain cast's error; any card, 8-bit products on RTX 40 and newer. "
    "int8 rotated: the same size, half of that error; any card, 8-bit products on RTX 20 and "
    "newer. bfloat16: 24 GB, the weights as published; any card. float8_e4m3fn unscaled: 12 GB, "
    "the published recipe, a plain cast; any card."
)


def _of_kind(kind: str, matrices: str) -> Any:
    """The advanced input that stores one kind of layer otherwise."""
    return io.Combo.Input(
        f"{kind}_precision",
        options=[SAME, *STORAGES],
        default=SAME,
        optional=True,
        advanced=True,
        tooltip=f"Store {matrices} in another precision than weight_precision says.",
    )


class DiTLoader(FileNode):
    folder, inspect = FOLDER, staticmethod(inspect_flux_dit)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxDiTLoader",
            display_name="Majic float8 DiT loader",
            category=CATEGORY,
            description="Loads the transformer of majicflus_v1 (麦橘超然) or another Flux.1 model "
            "into CPU memory, by default in float8 with one scale per output channel.",
            search_aliases=found_by(
                "majicflus, majic, flux, dit, unet, fp8, float8, load model",
                "麦橘超然, 麦橘, 加载模型, 低显存",
            ),
            inputs=[
                io.Combo.Input(
                    "file",
                    tooltip="A Flux.1 transformer in models/diffusion_models, such as "
                    "majicflus_v134.safetensors or flux1-dev.safetensors.",
                    **options(FOLDER, "majicflus", "flux"),
                ),
                io.Combo.Input(
                    "weight_precision",
                    options=list(PRECISIONS),
                    default="float8_e4m3fn",
                    tooltip=PRECISION_HELP,
                ),
                io.Boolean.Input(
                    "keep_prepared",
                    default=True,
                    optional=True,
                    tooltip="Keep the converted 8-bit weights in models/majicflux_prepared, at the "
                    "cost of 12 to 15 GB of disk. Loading then takes a second, and the weights do "
                    "not count as used memory: 16 GB are enough.",
                ),
                _of_kind("attention", "the attention matrices of the double blocks"),
                _of_kind("mlp", "the MLP matrices and the joint matrices of the single blocks"),
                _of_kind("modulation", "the modulation layers, a quarter of all parameters,"),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                DiTHandle.Output(
                    display_name="dit", tooltip="The transformer, for the CPU-offload pipeline."
                )
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        file: str,
        weight_precision: str,
        keep_prepared: bool = True,
        attention_precision: str = SAME,
        mlp_precision: str = SAME,
        modulation_precision: str = SAME,
    ) -> io.NodeOutput:
        progress = host.loading_progress(cls.hidden.unique_id)
        from ..engine.flux.transformer import Origin

        precision = PRECISIONS[weight_precision].with_kinds(
            attention=STORAGES.get(attention_precision),
            mlp=STORAGES.get(mlp_precision),
            modulation=STORAGES.get(modulation_precision),
        )
        path = model_folders.resolve(FOLDER, file)
        prepared = host.prepared_folder() if keep_prepared else None
        dit = load_dit(Origin(path, prepared), precision, progress)
        return io.NodeOutput(dit, ui=host.node_text([dit.weights.report]))


def load_dit(origin: "Origin", precision: Precision, progress: Progress) -> "DiT":
    """The transformer of these files, which is read once for all nodes that have it."""
    from ..engine.flux.transformer import DiT

    def load() -> DiT:
        device = host.compute_device()
        weights, geometry = load_flux_dit(
            origin.file, precision, progress, origin.prepared, device, origin.baked
        )
        patcher = host.make_patcher(weights, device, "MajicFluxDiT")
        return DiT(weights, patcher, geometry, precision, origin=origin)

    files = [model_folders.state_of(path) for path in (origin.file, *(p for p, _ in origin.baked))]
    return shared(load, files, precision, origin)
