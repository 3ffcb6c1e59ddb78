"""The node that puts a LoRA beside a transformer, or into its weights."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..downloads import model_folders
from ..engine.flux.geometry import ClipGeometry
from ..engine.quant.low_rank import Adapter
from ..host import current as host
from ..loaders.convert import Progress
from ..loaders.lora import inspect_usable_lora, load_lora
from ..messages import MajicFluxError, log, say
from .arguments import checked
from .dit_loader import load_dit
from .model_files import FileNode, combo, shared
from .sockets import CATEGORY, DiTHandle, TextEncodersHandle, found_by, io

if TYPE_CHECKING:
    from ..engine.flux.text_encoders import TextEncoders
    from ..engine.flux.transformer import DiT
    from ..engine.offload.offloaded_module import OffloadedModule

FOLDER = "loras"
KEPT_BYTES = 2 * 2**30  # of LoRAs that a transformer used last, so that a new strength reads none
# By the weights that they stand beside and the file: what it was then, the adapter as it was read,
# and with the norms that DoRA takes of these weights.
_kept: "WeakKeyDictionary[OffloadedModule, OrderedDict[Path, tuple[str, Adapter, Adapter]]]"
_kept = WeakKeyDictionary()


class LoRA(FileNode):
    folder, inspect = FOLDER, staticmethod(inspect_usable_lora)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxLoRA",
            display_name="LoRA",
            category=CATEGORY,
            description="Puts a LoRA beside the transformer. The weights stay as they are and are "
            "shared: nothing is loaded again, and a new strength costs nothing. Chain several. "
            "With keep it is baked into the weights instead.",
            search_aliases=found_by(
                "lora, lora loader, load lora, lycoris, lokr, dora, turbo, style",
                "加载LoRA, 风格, 微调, 麦橘 超然",
            ),
            inputs=[
                DiTHandle.Input("dit", tooltip="From the DiT loader, or from another LoRA."),
                io.Combo.Input(
                    "file",
                    tooltip="A LoRA for Flux.1 in models/loras, by any trainer: kohya, ai-toolkit, "
                    "Diffusers, OneTrainer, LyCORIS, XLabs.",
                    **combo(model_folders.names(FOLDER)),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    round=0.001,  # Hyper-SD's LoRAs want 0.125
                    tooltip="How much of it. 0: none. Below 0: the opposite of what it learnt.",
                ),
                TextEncodersHandle.Input(
                    "text_encoders",
                    optional=True,
                    tooltip="For a LoRA that has a part for CLIP-L: few for Flux.1 have.",
                ),
                io.Boolean.Input(
                    "keep",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Bake the LoRA into the weights while they are read: no step takes "
                    "longer for it, but a new strength means reading and converting the "
                    "transformer again, and 12 to 15 GB more of prepared weights. A file that "
                    "cannot stand beside the weights is baked anyway.",
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
    @checked
    def execute(
        cls,
        dit: "DiT",
        file: str,
        strength: float,
        text_encoders: "TextEncoders | None" = None,
        keep: bool = False,
    ) -> io.NodeOutput:
        path, own = model_folders.resolve(FOLDER, file), dit.without_adapters.geometry
        clip = ClipGeometry() if text_encoders is None else text_encoders.clip_geometry
        progress = host.loading_progress(cls.hidden.unique_id)

        _try_kernels(dit)
        report = inspect_usable_lora(path, own, clip)
        baked = report.layers > 0 and (keep or bool(report.baking))
        if baked and report.takes_picture:
            raise MajicFluxError(
                "{file} is a control LoRA, which cannot be baked into the weights. Turn keep "
                "off, or choose a file of rank 256 or less.",
                file=file,
            )

        def load() -> Adapter:
            return load_lora(path, own, clip, progress=progress, only_text=baked)

        files = model_folders.fingerprint(FOLDER, file)
        adapter = _beside(dit.weights, path, load, files, own, clip, baked)
        lines = [str(adapter.report), say("strength {strength}", strength=f"{strength:g}")]
        if adapter.text_encoder and text_encoders is None:
            lines.append(say("The part for CLIP-L is not used: connect text_encoders."))
        if report.takes_picture and strength != 0:
            lines.append(
                say("A control LoRA: connect a depth map or edges to reference of the sample node.")
            )
        log.info("%s, strength %g", path.name, strength)
        if strength != 0:
            added = (adapter, strength)
            if baked:
                dit = _baked(dit, path, strength, progress)
                lines.append(say("baked in, layers: {layers}", layers=report.layers))
                lines.append(dit.weights.report)
            elif adapter.reaches_transformer:
                dit = dit.with_adapters((*dit.adapters, added))
            if text_encoders is not None and adapter.text_encoder:
                adapters = (*text_encoders.adapters, added)
                text_encoders = replace(text_encoders, adapters=adapters)
        return io.NodeOutput(dit, text_encoders, ui=host.node_text(lines))


def _try_kernels(dit: "DiT") -> None:
    """While the file is read: the first LoRA of a machine has them compiled."""
    from ..engine.kernels import dispatch
    from ..engine.kernels.row_format import LIMITS
    from ..engine.quant.linear import stored_linears

    stored = {layer.weight.dtype for layer in stored_linears(dit.weights.module)}
    dispatch.try_ahead(host.compute_device(), stored & LIMITS.keys())


def _baked(dit: "DiT", path: Path, strength: float, progress: Progress) -> "DiT":
    """The transformer read again with this file in its weights, and beside them what was there."""
    from ..engine.quant.adapters import with_gains

    assert dit.origin is not None, "a node has loaded it"
    origin = replace(dit.origin, baked=(*dit.origin.baked, (path, strength)))
    found = load_dit(origin, dit.precision, progress)
    if not dit.adapters:
        return found
    module = found.weights.module
    beside = ((with_gains(a, module) if a.magnitudes else a, s) for a, s in dit.adapters)
    return found.with_adapters(tuple(beside))


def _beside(
    weights: "OffloadedModule", path: Path, load: Callable[[], Adapter], *identity: Any
) -> Adapter:
    """What `load` reads of this file, for these weights: what they used last is kept.

    ComfyUI drops what a node gave before it executes the node with a new strength.
    """
    kept = _kept.setdefault(weights, OrderedDict())
    if path not in kept or kept[path][0] != repr(identity):
        kept.pop(path, None)
        adapter = found = shared(load, *identity)
        if adapter.magnitudes:
            from ..engine.quant.adapters import with_gains

            found = with_gains(adapter, weights.module)
        kept[path] = repr(identity), adapter, found
    kept.move_to_end(path)
    while len(kept) > 1 and sum(adapter.nbytes for _, adapter, _ in kept.values()) > KEPT_BYTES:
        kept.popitem(last=False)
    return kept[path][2]
