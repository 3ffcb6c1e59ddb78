"""The Flux.1 transformer file."""

import logging
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.flux_dit import HEAD_DIM, FluxGeometry, build_flux_dit
from .layouts import flux_dit_layout
from .recognise import FLUX_DIT, require_kind
from .safetensors_file import ModelFileError, SafetensorsFile
from .tensors import Source, Sources, fill, require_layout, sources_of

if TYPE_CHECKING:
    import torch

    from ..engine.offload import OffloadedModule

log = logging.getLogger("majicflux")

PREFIXES = ("model.diffusion_model.", "")  # majicflus_v134 has the first, flux1-dev the second
TEXT_TO_IMAGE_CHANNELS = 64


def inspect_flux_dit(path: Path) -> tuple[FluxGeometry, dict[str, Source]]:
    """Geometry and tensors of a Flux.1 transformer, from its header alone.

    Raises ModelFileError when the file is not one, or not whole.
    """
    file = SafetensorsFile(path)
    require_kind(path, file.tensors, FLUX_DIT)
    prefix = next(p for p in PREFIXES if f"{p}{FLUX_DIT.markers[0]}" in file.tensors)
    sources = sources_of([file], prefix)
    geometry = _geometry(path, sources)
    layout = flux_dit_layout(geometry)
    require_layout(path, sources, layout)
    if geometry.in_channels != TEXT_TO_IMAGE_CHANNELS:
        raise ModelFileError(
            f"{path.name} takes {geometry.in_channels} input channels, so it is a fill, depth or "
            "canny model, which this version cannot run. Choose a text-to-image model."
        )
    return geometry, {name: sources[name] for name in layout}


def load_flux_dit(
    path: Path, weight_dtype: "torch.dtype"
) -> tuple["OffloadedModule", FluxGeometry]:
    """Read a Flux.1 transformer into CPU memory in `weight_dtype`, tensor by tensor."""
    from diffsynth.utils.state_dict_converters.flux_dit import FluxDiTStateDictConverter

    start = time.perf_counter()
    geometry, sources = inspect_flux_dit(path)
    weights = build_flux_dit(geometry, weight_dtype)
    fill(weights.module, FluxDiTStateDictConverter(sources))
    log.info(
        "%s: Flux.1 transformer, %d + %d blocks of width %d, %.2f GB as %s, %.1f s",
        path.name,
        geometry.double_blocks,
        geometry.single_blocks,
        geometry.hidden,
        weights.total_bytes / 1e9,
        str(weight_dtype).removeprefix("torch."),
        time.perf_counter() - start,
    )
    return weights, geometry


def _geometry(path: Path, sources: Sources) -> FluxGeometry:
    def size(name: str, axis: int) -> int:
        try:
            return sources[name].entry.shape[axis]
        except (KeyError, IndexError):
            raise ModelFileError(
                f"{path.name} is incomplete: {name} is missing. Download it again."
            ) from None

    def blocks(kind: str) -> int:
        found = {int(m[1]) for name in sources if (m := re.match(rf"{kind}\.(\d+)\.", name))}
        return len(found)

    head_dim = size("double_blocks.0.img_attn.norm.query_norm.scale", 0)
    hidden = size("img_in.weight", 0)
    if head_dim != HEAD_DIM or hidden == 0 or hidden % HEAD_DIM:
        raise ModelFileError(
            f"{path.name} has attention heads of {head_dim} in a width of {hidden}; "
            f"Flux.1 models have heads of {HEAD_DIM}. Choose another file."
        )
    return FluxGeometry(
        hidden=hidden,
        double_blocks=blocks("double_blocks"),
        single_blocks=blocks("single_blocks"),
        in_channels=size("img_in.weight", 1),
        out_channels=size("final_layer.linear.weight", 0),
        text_width=size("txt_in.weight", 1),
        pooled_width=size("vector_in.in_layer.weight", 1),
        guidance="guidance_in.in_layer.weight" in sources,
    )
