"""The Flux.1 transformer file."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..engine.diffsynth_files import diffsynth_module
from ..engine.flux.geometry import HEAD_DIM, FluxGeometry, kind_of_layer
from ..engine.quant.formats import FLOAT8, Precision, Storage
from ..engine.torch_state import own_state, torch
from ..messages import later, log, say
from .bake import changes_of
from .convert import MakeRoom, Progress, convert_into
from .diffusers_names import flux_from_diffusers
from .inspect_once import inspect_once
from .layouts import blocks_in, flux_dit_layout
from .lora_file import inspect_lora
from .recognise import FLUX_DIT, expecting
from .report import size_and_time, where_kept
from .safetensors_file import ModelFileError
from .shards import files_at
from .tensor_sources import Sources, files_of, in_layout, missing, prefix_before, sources_of
from .weight_cache import map_or_convert

if TYPE_CHECKING:
    from ..engine.offload.offloaded_module import OffloadedModule
    from ..engine.quant.linear import StorageOf

Geometry = TypeVar("Geometry", bound=FluxGeometry)
REPORT = later(
    "{file}: Flux.1 transformer, {double} + {single} blocks of width {width}, "
    "{parameters:.2f} B parameters, {size}, {where}"
)


@inspect_once
def inspect_flux_dit(path: Path) -> tuple[FluxGeometry, Sources]:
    """Geometry and weights of a Flux.1 transformer, from the headers of its files alone.

    path: one file, one of several shards, or their folder; in the layout of Black Forest Labs,
    under any prefix, or in that of Diffusers; other models in the same file are passed over.
    Raises ModelFileError when there is none, or not a whole one.
    """
    files, names = files_at(path)
    with expecting(path, names, FLUX_DIT):
        ours, diffusers = FLUX_DIT.markers
        if any(ours in name for name in names):
            sources = sources_of(files, prefix_before(names, ours))
            # Some write the scale of a norm as its weight.
            renamed = {
                name.replace("_norm.weight", "_norm.scale"): source
                for name, source in sources.items()
                if name.endswith(("query_norm.weight", "key_norm.weight"))
            }
            sources = renamed | sources
        else:
            sources = flux_from_diffusers(sources_of(files, prefix_before(names, diffusers)))
        geometry = replace(
            sizes_of(path, sources),
            in_channels=size_of(path, sources, "img_in.weight", 1),
            out_channels=size_of(path, sources, "final_layer.linear.weight", 0),
        )
        return geometry, in_layout(path, sources, flux_dit_layout(geometry))


@own_state()
def load_flux_dit(
    path: Path,
    precision: Precision,
    progress: Progress | None = None,
    cache_folder: Path | None = None,
    device: "torch.device | None" = None,
    baked: Sequence[tuple[Path, float]] = (),
) -> tuple["OffloadedModule", FluxGeometry]:
    """Read a Flux.1 transformer into CPU memory in `precision`.

    A matrix that the file holds in 8 bits with a scale stays as it is where 8 bits with a scale
    are asked for; only float8 becomes int8 if that is wanted. With a `cache_folder`, weights
    of 8 bits are kept there once they have been converted, and mapped from there instead of being
    read and converted again. `device` converts them. baked: LoRAs with their strengths, that are
    added to the weights as they are read; what they change is converted anew whatever the file
    holds.
    """
    from ..engine.flux.transformer import build_flux_dit

    kept = (progress, cache_folder, device, baked)
    return load(path, inspect_flux_dit, build_flux_dit, REPORT, precision, *kept)


def load(
    path: Path,
    inspect: Callable[[Path], tuple[Geometry, Sources]],
    build: Callable[[Geometry, Precision, "StorageOf"], "OffloadedModule"],
    report: str,
    precision: Precision,
    progress: Progress | None,
    cache_folder: Path | None,
    device: "torch.device | None",
    baked: Sequence[tuple[Path, float]] = (),
) -> tuple["OffloadedModule", Geometry]:
    """As `load_flux_dit`, what `inspect` finds and `build` makes. report: a text for `say`."""
    start = time.perf_counter()
    geometry, sources = inspect(path)
    names = diffsynth_module("utils.state_dict_converters.flux_dit")
    beside = {name: s for name, s in sources.items() if name.startswith("controlnet_")}
    renamed = names.FluxDiTStateDictConverter(sources) | beside
    weights = build(geometry, precision, partial(storage_in, precision, renamed))
    loras = [(inspect_lora(lora, geometry), strength) for lora, strength in baked]

    def convert(make_room: MakeRoom | None) -> None:
        changes = changes_of(loras, renamed, progress)
        convert_into(weights.module, renamed, progress, device, make_room, changes)

    folder = cache_folder if precision.eight_bit else None
    added = [(lora.file, strength) for lora, strength in loras]
    given = (folder, files_of(renamed), weights, str(precision), convert, progress, added)
    mapped = map_or_convert(*given)
    weights.report = say(
        report,
        file=" + ".join([path.name, *(f"{lora.name} @ {s:g}" for lora, s in baked)]),
        double=geometry.double_blocks,
        single=geometry.single_blocks,
        width=geometry.hidden,
        parameters=sum(math.prod(source.shape) for source in sources.values()) / 1e9,
        size=size_and_time(weights, contents_of(weights), start),
        where=where_kept(mapped),
    )
    log.info(weights.report)
    return weights, geometry


def storage_in(precision: Precision, sources: Sources, name: str) -> Storage:
    """How to store the layer of this name, given how the file does."""
    kind = kind_of_layer(name)
    wanted: Storage = getattr(precision, kind)
    source = sources.get(f"{name}.weight")
    if kind == "rest" or source is None or not (precision.attention.scaled or precision.mlp.scaled):
        return wanted
    stored = {(part.dtype, part.rotation) for part in source.parts}
    if len(stored) > 1:
        return wanted
    ((dtype, rotation),) = stored
    if dtype == "I8" and rotation is not None:
        return Storage("int8", scaled=True, rotated=rotation)
    return FLOAT8 if dtype == "F8_E4M3" and wanted.dtype != "int8" else wanted


def contents_of(weights: "OffloadedModule") -> str:
    """The dtypes of the weights and their share, the largest first."""
    counts: Counter[str] = Counter()
    for parameter in weights.module.parameters():
        counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    total = counts.total()
    shares = [f"{name} {count / total:.0%}" for name, count in counts.most_common()]
    return ", ".join(share for share in shares if not share.endswith(" 0%"))


def sizes_of(path: Path, sources: Sources) -> FluxGeometry:
    """That of weights in the names of Black Forest Labs, apart from both ends."""
    head_dim = size_of(path, sources, "double_blocks.0.img_attn.norm.query_norm.scale", 0)
    hidden = size_of(path, sources, "img_in.weight", 0)
    if head_dim != HEAD_DIM or hidden == 0 or hidden % HEAD_DIM:
        raise ModelFileError(
            "{file} has attention heads of {found} in a width of {width}; Flux.1 models have "
            "heads of {heads}. Choose another file.",
            file=path.name,
            found=head_dim,
            width=hidden,
            heads=HEAD_DIM,
        )
    return FluxGeometry(
        hidden=hidden,
        double_blocks=blocks_in(path, sources, "double_blocks.", flux_dit_layout(FluxGeometry())),
        single_blocks=blocks_in(path, sources, "single_blocks.", flux_dit_layout(FluxGeometry())),
        text_width=size_of(path, sources, "txt_in.weight", 1),
        pooled_width=size_of(path, sources, "vector_in.in_layer.weight", 1),
        guidance="guidance_in.in_layer.weight" in sources,
    )


def size_of(path: Path, sources: Sources, name: str, axis: int) -> int:
    """Raises ModelFileError where there is no such tensor or axis."""
    try:
        return sources[name].shape[axis]
    except (KeyError, IndexError):
        raise missing(path, name) from None
