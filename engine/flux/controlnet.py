"""Control nets for Flux.1: the first blocks of a transformer, that are shown a picture besides."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..offload.offloaded_module import OffloadedModule
from ..offload.patcher import Patcher
from ..offload.weight_block import WeightBlock
from ..quant.formats import Precision
from ..quant.linear import StorageOf, store
from .conditioning import Conditions, LastConditions, blocks_of
from .geometry import ControlGeometry
from .picture_conditions import middle, patches
from .transformer import needed_once, sized_flux_dit, stored_as

# By percent of a run, ComfyUI means the noise level that its schedule for Flux has there.
COMFYUI_SHIFT = 1.15


@dataclass(frozen=True)
class ControlNet:
    """A control net with its weights in CPU memory."""

    weights: OffloadedModule
    patcher: Patcher
    geometry: ControlGeometry
    precision: Precision
    last_conditions: LastConditions = field(default_factory=LastConditions, repr=False)

    def visits(self, numbers: Sequence[int]) -> list[WeightBlock]:
        """The weights that its blocks of these numbers need, and the output of the last, in their
        order."""
        blocks, outputs = (of(self.weights.module) for of in (blocks_of, outputs_of))
        layers = [part[0] for number in numbers for part in blocks[number].weight_blocks()]
        layers += [outputs[number] for number in numbers[-1:]]
        return [self.weights.block_of(layer) for layer in layers]


@dataclass(frozen=True)
class Control:
    """A picture that a control net is shown, as ComfyUI's ControlNetApplyAdvanced has it.

    picture: RGB [n, rows, columns, 3] in 0..1, of any size; mask: [m, rows, columns], 1 where an
    inpainting net is to paint; mode: its number, for nets that have several; start, end: shares of
    ComfyUI's schedule, between whose noise levels it acts.
    """

    net: ControlNet
    picture: Tensor
    mask: Tensor | None = None
    mode: int = 0
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def acts_at(self, sigma: float) -> bool:
        """Whether it has something to say at this noise level."""
        return self.strength != 0 and _level(self.start) >= sigma >= _level(self.end)

    def shown(self, height: int, width: int) -> Tensor:
        """What is encoded for a picture of this size: RGB [n, height, width, 3], without what an
        inpainting net is to paint."""
        picture = self.picture.movedim(-1, 1)
        if self.net.geometry.inpaints and self.mask is not None:
            kept = _scaled(1 - self.mask[:, None], picture.shape[2:], "bilinear").round()
            picture, kept = _as_many(picture, kept)
            picture = picture * kept
        return _scaled(picture, (height, width)).movedim(1, -1)

    def hint(self, latents: Tensor) -> Tensor:
        """Tokens [n, tokens, channels] of what `shown` was encoded as, in model space."""
        if not self.net.geometry.inpaints:
            return patches(latents)
        mask = latents.new_zeros(1, 1, 1) if self.mask is None else self.mask
        kept = _scaled(1 - mask[:, None], latents.shape[2:])
        return patches(torch.cat(_as_many(latents, kept), dim=1))

    def told(self, conditions: Conditions) -> Conditions:
        """The conditions of its net, with a token before the text that tells the mode."""
        embedder = self.net.weights.module.controlnet_mode_embedder
        if embedder is None:
            return conditions
        mode = embedder.weight[self.mode].to(conditions.text)
        return replace(conditions, text=torch.cat([mode[None, None], conditions.text], dim=1))


def _scaled(values: Tensor, size: Sequence[int], mode: str = "nearest-exact") -> Tensor:
    """The middle of [n, channels, h, w] in this size, as by ComfyUI's `common_upscale`."""
    height, width = size
    return F.interpolate(middle(values, height, width), (height, width), mode=mode)


def _as_many(*values: Tensor) -> list[Tensor]:
    """Each repeated to as many as the most of them are."""
    which = torch.arange(max(map(len, values)))
    return [each[which % len(each)] for each in values]


def _level(share: float) -> float:
    """The noise level of ComfyUI's schedule for Flux after this share of it."""
    if not 0 < share < 1:
        return float(share <= 0)
    shift = math.exp(COMFYUI_SHIFT)
    return shift / (shift + 1 / (1 - share) - 1)


def build_control_net(
    geometry: ControlGeometry, precision: Precision, storage_of: StorageOf | None = None
) -> OffloadedModule:
    """The net with uninitialised weights, each stored as its kind in `precision` or as
    `storage_of` its name."""
    from .blocks import DoubleBlock, SingleBlock

    width, modes = geometry.hidden, geometry.modes
    net = sized_flux_dit(geometry, DoubleBlock, SingleBlock)
    net.final_norm_out = net.final_proj_out = None
    with torch.device("meta"):
        for name, blocks in (("", net.blocks), ("single_", net.single_blocks)):
            outputs = nn.ModuleList(nn.Linear(width, width) for _ in blocks)
            net.add_module(f"controlnet_{name}blocks", outputs)
        net.controlnet_x_embedder = nn.Linear(geometry.hint_channels, width)
        dtype = precision.rest.torch_dtype
        net.controlnet_mode_embedder = nn.Embedding(modes, width, dtype=dtype) if modes else None
    store(net, storage_of or stored_as(precision))
    passes: list[list[Any]] = []
    for block, output in zip(blocks_of(net), outputs_of(net), strict=True):
        passes += [*block.weight_blocks(), [output]]
    once = needed_once(net)
    if modes:
        once[0].append(net.controlnet_mode_embedder)
    return OffloadedModule(net, passes, once, scoped=True)


def outputs_of(net: Any) -> list[Any]:
    """The layer after each block, which gives what the transformer is told."""
    return [*net.controlnet_blocks, *net.controlnet_single_blocks]
