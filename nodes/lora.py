"""The node that puts a LoRA beside a transformer."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..downloads import model_folders
from ..host import current as host
from . import model_files
from .arguments import checked
from .sockets import CATEGORY, DiTHandle, Node, TextEncodersHandle

if TYPE_CHECKING:
    from ..engine.flux.text_encoders import TextEncoders
    from ..engine.flux.transformer import DiT
    from ..engine.offload.offloaded_module import OffloadedModule
    from ..engine.quant.low_rank import Adapter

io = host.io
FOLDER = "loras"
# Of adapters whose norms depend on the weights that they stand beside, by these.
_with_gains: "WeakKeyDictionary[OffloadedModule, dict[str, Adapter]]" = WeakKeyDictionary()


class LoRA(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxLoRA",
            display_name="LoRA",
            category=CATEGORY,
            description=(
                "Puts a LoRA beside the transformer. The weights stay as they are and are shared: "
                "nothing is loaded again, and a new strength costs nothing. Chain several."
            ),
            search_aliases=[
                "lora",
                "lora loader",
                "load lora",
                "lycoris",
                "lokr",
                "dora",
                "turbo",
                "style",
                "加载LoRA",
                "风格",
                "微调",
                "麦橘 超然",
            ],
            inputs=[
                DiTHandle.Input("dit", tooltip="From the DiT loader, or from another LoRA."),
                io.Combo.Input(
                    "file",
                    tooltip=(
                        "A LoRA for Flux.1 in models/loras, by any trainer: kohya, ai-toolkit, "
                        "Diffusers, OneTrainer, LyCORIS, XLabs."
                    ),
                    options=(names := model_folders.names(FOLDER)),
                    default=(names or [None])[0],
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How much of it. 0: none. Below 0: the opposite of what it learnt.",
                ),
                TextEncodersHandle.Input(
                    "text_encoders",
                    optional=True,
                    tooltip="For a LoRA that has a part for CLIP-L: few for Flux.1 have.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                DiTHandle.Output(
                    display_name="dit",
                    tooltip="The transformer with the LoRA, for the pipeline or another LoRA.",
                ),
                TextEncodersHandle.Output(
                    display_name="text_encoders",
                    tooltip="The encoders that came in, with the part for CLIP-L.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        from ..loaders.lora_file import inspect_lora

        return model_folders.problem(FOLDER, file, inspect_lora) or True

    @classmethod
    def fingerprint_inputs(cls, file: str) -> Any:
        return model_folders.fingerprint(FOLDER, file)

    @classmethod
    @checked
    def execute(
        cls,
        dit: "DiT",
        file: str,
        strength: float,
        text_encoders: "TextEncoders | None" = None,
    ) -> io.NodeOutput:
        path = model_folders.resolve(FOLDER, file)
        clip = None if text_encoders is None else text_encoders.clip_geometry
        files = repr(model_folders.fingerprint(FOLDER, file))
        progress = host.loading_progress(cls.hidden.unique_id)

        def load() -> "Adapter":
            from ..loaders.lora import load_lora

            return load_lora(path, dit.geometry, clip, progress=progress)

        adapter = model_files.shared(load, files, dit.geometry, clip)
        lines = [str(adapter.report)]
        if strength == 0:
            return io.NodeOutput(dit, text_encoders, ui=host.node_text(lines))
        if adapter.magnitudes:
            adapter = _on_these_weights(adapter, dit, files)
        if adapter.reaches_transformer:
            dit = replace(dit, adapters=(*dit.adapters, (adapter, strength)))
        if text_encoders is not None and adapter.text_encoder:
            adapters = (*text_encoders.adapters, (adapter, strength))
            text_encoders = replace(text_encoders, adapters=adapters)
        return io.NodeOutput(dit, text_encoders, ui=host.node_text(lines))


def _on_these_weights(adapter: "Adapter", dit: "DiT", files: str) -> "Adapter":
    """With the norms that DoRA takes of weights and terms together, found once for these."""
    from ..engine.quant.adapters import with_gains

    known = _with_gains.setdefault(dit.weights, {})
    if files not in known:
        known[files] = with_gains(adapter, dit.weights.module)
    return known[files]
