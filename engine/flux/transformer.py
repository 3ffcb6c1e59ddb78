"""DiffSynth's Flux transformer, built from a geometry instead of fixed sizes."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..diffsynth_files import diffsynth_module
from ..offload.offloaded_module import OffloadedModule
from ..offload.patcher import Patcher
from ..quant.adapters import LastTerms, touched
from ..quant.formats import Precision
from ..quant.linear import StorageOf, store
from ..quant.low_rank import Adapter
from ..quant.rank_layout import rank_layout
from .conditioning import LastConditions, blocks_of, modulation_layers
from .geometry import FIRST_LAYER, ROPE_AXES, TIMESTEP_CHANNELS, FluxGeometry, kind_of_layer

ROPE_THETA = 10000
ENDS = (FIRST_LAYER, "final_proj_out")  # which every step needs, outside of the blocks


@dataclass(frozen=True)
class Origin:
    """Where the weights of a transformer come from, for those who read them anew.

    prepared: the folder of prepared weights, None if they are not kept. baked: LoRA files that were
    added to the weights as they were read, with their strengths, in this order.
    """

    file: Path
    prepared: Path | None
    baked: tuple[tuple[Path, float], ...] = ()


@dataclass(frozen=True)
class DiT:
    """A Flux.1 transformer with its weights in CPU memory.

    geometry: with the channels that its adapters take. adapters: with their strengths; they stand
    beside the weights, which other handles share. loaded: the handle without them, which lives as
    long as this one.
    """

    weights: OffloadedModule
    patcher: Patcher
    geometry: FluxGeometry
    precision: Precision
    last_conditions: LastConditions = field(default_factory=LastConditions, repr=False)
    last_terms: LastTerms = field(default_factory=LastTerms, repr=False)
    adapters: tuple[tuple[Adapter, float], ...] = ()
    origin: Origin | None = None
    loaded: "DiT | None" = field(default=None, repr=False)

    @property
    def without_adapters(self) -> "DiT":
        return self.loaded or self

    def with_adapters(self, adapters: tuple[tuple[Adapter, float], ...]) -> "DiT":
        """A handle of the same weights with these beside them."""
        loaded = self.without_adapters
        channels = max(loaded.geometry.in_channels, rank_layout(FIRST_LAYER, adapters).inputs)
        geometry = replace(loaded.geometry, in_channels=channels)
        return replace(self, adapters=adapters, geometry=geometry, loaded=loaded)

    @property
    def adapted_once(self) -> list[str]:
        """The layers with something beside them that a run needs before its first step."""
        return [name for name in touched(self.adapters) if _is_needed_once(name)]

    @property
    def adapted_always(self) -> list[str]:
        """The others, which every step needs."""
        return [name for name in touched(self.adapters) if not _is_needed_once(name)]


def _is_needed_once(name: str) -> bool:
    return kind_of_layer(name) in ("modulation", "rest") and name not in ENDS


def build_flux_dit(
    geometry: FluxGeometry, precision: Precision, storage_of: StorageOf | None = None
) -> OffloadedModule:
    """The transformer with uninitialised weights, each stored as its kind in `precision` or as
    `storage_of` its name."""
    from .blocks import DoubleBlock, SingleBlock

    dit = sized_flux_dit(geometry, DoubleBlock, SingleBlock)
    store(dit, storage_of or stored_as(precision))
    passes = [part for block in blocks_of(dit) for part in block.weight_blocks()]
    return OffloadedModule(dit, passes, needed_once(dit), scoped=True)


def stored_as(precision: Precision) -> StorageOf:
    """The storage of the kind that a layer of a name is of."""
    return lambda name: getattr(precision, kind_of_layer(name))


def needed_once(dit: Any) -> list[list[Any]]:
    """The layers that a run needs before its first step, in their order."""
    embedders = [dit.context_embedder, dit.pooled_text_embedder, dit.time_embedder]
    if dit.guidance_embedder is not None:
        embedders.append(dit.guidance_embedder)
    return [embedders, *([layer] for layer in modulation_layers(dit))]


def sized_flux_dit(geometry: FluxGeometry, joint_block: Any, single_block: Any) -> Any:
    """DiffSynth's FluxDiT of this geometry, with these classes for its blocks, on the meta device.

    FluxDiT's own constructor builds one size only.
    """
    theirs, g = diffsynth_module("models.flux_dit"), geometry

    class SizedFluxDiT(theirs.FluxDiT):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.pos_embedder = theirs.RoPEEmbedding(g.hidden, ROPE_THETA, ROPE_AXES)
            self.time_embedder = theirs.TimestepEmbeddings(TIMESTEP_CHANNELS, g.hidden)
            self.guidance_embedder = (
                theirs.TimestepEmbeddings(TIMESTEP_CHANNELS, g.hidden) if g.guidance else None
            )
            self.pooled_text_embedder = nn.Sequential(
                nn.Linear(g.pooled_width, g.hidden), nn.SiLU(), nn.Linear(g.hidden, g.hidden)
            )
            self.context_embedder = nn.Linear(g.text_width, g.hidden)
            self.x_embedder = nn.Linear(g.in_channels, g.hidden)
            self.blocks = nn.ModuleList(
                joint_block(g.hidden, g.heads) for _ in range(g.double_blocks)
            )
            self.single_blocks = nn.ModuleList(
                single_block(g.hidden, g.heads) for _ in range(g.single_blocks)
            )
            self.final_norm_out = theirs.AdaLayerNormContinuous(g.hidden)
            self.final_proj_out = nn.Linear(g.hidden, g.out_channels)
            self.input_dim = g.in_channels

    with torch.device("meta"):
        return SizedFluxDiT()
