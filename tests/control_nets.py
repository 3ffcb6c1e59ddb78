"""Small control nets in the layout of the published ones, and a transformer that they fit."""

from dataclasses import replace

import torch
from torch import Tensor

from file_layouts import Tensors, to_diffusers
from majicflux.benchmarks.random_models import DIT, random_tensors
from majicflux.engine.flux.geometry import ControlGeometry, FluxGeometry
from majicflux.loaders.layouts import Layout, control_net_layout, flux_dit_layout

# With as many blocks as FLUX.1-dev, which control nets are spread over.
WHOLE = replace(DIT, hidden=128, double_blocks=19, single_blocks=38)
LITE = replace(WHOLE, double_blocks=6, single_blocks=5)


def _like(double_blocks: int, single_blocks: int = 0, **more: int) -> ControlGeometry:
    blocks = {"double_blocks": double_blocks, "single_blocks": single_blocks}
    widths = {name: getattr(WHOLE, name) for name in ("hidden", "text_width", "pooled_width")}
    return ControlGeometry(**blocks, **widths, **more)


# What is in the files; of six double blocks one is not used.
FILES = {
    "Union-Pro 2.0": _like(6),
    "Union": _like(5, 10, modes=10),
    "inpainting": _like(6, hint_channels=68),
    "upscaler": _like(5),
}


def transformer_tensors(geometry: FluxGeometry = WHOLE, dtype=torch.float32) -> Tensors:
    return random_tensors(flux_dit_layout(geometry), 0, dtype)


def control_net_tensors(geometry: ControlGeometry, seed: int = 1, dtype=torch.float32) -> Tensors:
    """In Diffusers' layout."""
    return _in_diffusers_layout(random_tensors(control_net_layout(geometry), seed, dtype))


def published_layout(geometry: ControlGeometry) -> Layout:
    """Names and shapes in a file of such a net."""
    layout = control_net_layout(geometry)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in layout.items()}
    return {name: tuple(t.shape) for name, t in _in_diffusers_layout(tensors).items()}


def _in_diffusers_layout(tensors: Tensors) -> Tensors:
    extra = {name: tensor for name, tensor in tensors.items() if name.startswith("controlnet_")}
    return to_diffusers({n: t for n, t in tensors.items() if n not in extra}) | extra


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def picture(rows: int, columns: int, count: int = 1, seed: int = 0) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.rand(count, rows, columns, 3, generator=drawn)
