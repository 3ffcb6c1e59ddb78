"""The file of a control net for Flux.1."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.flux.geometry import ControlGeometry, blocks_used
from ..engine.quant.formats import Precision
from ..engine.sizes import OF_LATENTS
from ..engine.torch_state import own_state, torch
from ..messages import later
from .convert import Progress
from .diffusers_names import flux_from_diffusers
from .flux_dit import load, size_of, sizes_of
from .inspect_once import inspect_once
from .layouts import control_net_layout
from .recognise import CONTROL_NET, INFUSENET, expecting_control_net, not_wanted
from .safetensors_file import ModelFileError
from .shards import files_at
from .tensor_sources import Sources, in_layout, prefix_before, sources_of

if TYPE_CHECKING:
    from ..engine.offload.offloaded_module import OffloadedModule

REPORT = later(
    "{file}: ControlNet for Flux.1, {double} + {single} blocks of width {width}, "
    "{parameters:.2f} B parameters, {size}, {where}"
)


@inspect_once
def inspect_control_net(path: Path) -> tuple[ControlGeometry, Sources]:
    """Geometry and weights of a control net, from the headers of its files alone.

    path: one file, one of several shards, or their folder, in the layout of Diffusers. Of the
    blocks only those are read that are used. Raises ModelFileError when there is none for Flux.1,
    or not a whole one.
    """
    files, names = files_at(path)
    with expecting_control_net(path, names):
        theirs = sources_of(files, prefix_before(names, *CONTROL_NET.markers))
        extra = {name: s for name, s in theirs.items() if name.startswith("controlnet_")}
        sources = flux_from_diffusers(theirs) | extra
        geometry = _geometry(path, sources)
        sources = in_layout(path, sources, control_net_layout(geometry))
    if (geometry.double_blocks, geometry.single_blocks, geometry.modes) == (4, 10, 0):
        raise not_wanted(path, names, INFUSENET, CONTROL_NET)
    return geometry, sources


def _geometry(path: Path, sources: Sources) -> ControlGeometry:
    channels = size_of(path, sources, "controlnet_x_embedder.weight", 1)
    mode = sources.get("controlnet_mode_embedder.weight")
    sizes = sizes_of(path, sources)
    used = blocks_used(sizes.double_blocks, sizes.single_blocks)
    geometry = ControlGeometry(
        **asdict(replace(sizes, double_blocks=used)),
        hint_channels=channels,
        modes=0 if mode is None or not mode.shape else mode.shape[0],
    )
    if channels != OF_LATENTS and not geometry.inpaints:
        raise ModelFileError(
            "{file} is shown {channels} channels, and the ControlNets that MajicFlux knows "
            "64, or 68 with a mask. Choose another file.",
            file=path.name,
            channels=channels,
        )
    return geometry


@own_state()
def load_control_net(
    path: Path,
    precision: Precision,
    progress: Progress | None = None,
    cache_folder: Path | None = None,
    device: "torch.device | None" = None,
) -> tuple["OffloadedModule", ControlGeometry]:
    """Read a control net into CPU memory in `precision`, as `load_flux_dit` reads a transformer."""
    from ..engine.flux.controlnet import build_control_net

    kept = (progress, cache_folder, device)
    return load(path, inspect_control_net, build_control_net, REPORT, precision, *kept)
