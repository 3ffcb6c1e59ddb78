"""DiffSynth's Flux transformer, built from a geometry instead of fixed sizes."""

from dataclasses import dataclass

import torch
from torch import nn

from .offload import OffloadedModule, Patcher
from .stored_linear import FLOAT8_DTYPE, store_linears

ROPE_AXES = (16, 56, 56)  # share of the head for (index, row, column)
ROPE_THETA = 10000
HEAD_DIM = sum(ROPE_AXES)
TIMESTEP_CHANNELS = 256


@dataclass(frozen=True)
class FluxGeometry:
    """Sizes of a Flux.1 transformer. The defaults are those of FLUX.1-dev."""

    hidden: int = 3072
    double_blocks: int = 19
    single_blocks: int = 38
    in_channels: int = 64  # latent channels x patch area
    out_channels: int = 64
    text_width: int = 4096
    pooled_width: int = 768
    guidance: bool = True  # absent in schnell

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_DIM


@dataclass(frozen=True)
class DiT:
    """A Flux.1 transformer with its weights in CPU memory."""

    weights: OffloadedModule
    patcher: Patcher
    geometry: FluxGeometry
    weight_dtype: torch.dtype


def build_flux_dit(geometry: FluxGeometry, weight_dtype: torch.dtype) -> OffloadedModule:
    """The transformer with uninitialised weights.

    weight_dtype float8_e4m3fn applies to the matrices of the blocks; the embedders, the final
    layer, the norms and the biases are 0.5 % of the parameters but half of the error of an
    8-bit cast, and stay bfloat16. Any other dtype applies to everything.
    """
    from diffsynth.core.vram.initialization import skip_model_initialization
    from diffsynth.models.flux_dit import (
        AdaLayerNormContinuous,
        FluxDiT,
        FluxJointTransformerBlock,
        FluxSingleTransformerBlock,
        RoPEEmbedding,
        TimestepEmbeddings,
    )

    g = geometry
    root_dtype = torch.bfloat16 if weight_dtype == FLOAT8_DTYPE else weight_dtype

    class SizedFluxDiT(FluxDiT):
        def __init__(self) -> None:
            nn.Module.__init__(self)  # FluxDiT's own constructor builds one size only
            self.pos_embedder = RoPEEmbedding(g.hidden, ROPE_THETA, ROPE_AXES)
            self.time_embedder = TimestepEmbeddings(TIMESTEP_CHANNELS, g.hidden)
            self.guidance_embedder = (
                TimestepEmbeddings(TIMESTEP_CHANNELS, g.hidden) if g.guidance else None
            )
            self.pooled_text_embedder = nn.Sequential(
                nn.Linear(g.pooled_width, g.hidden), nn.SiLU(), nn.Linear(g.hidden, g.hidden)
            )
            self.context_embedder = nn.Linear(g.text_width, g.hidden)
            self.x_embedder = nn.Linear(g.in_channels, g.hidden)
            self.blocks = nn.ModuleList(
                FluxJointTransformerBlock(g.hidden, g.heads) for _ in range(g.double_blocks)
            )
            self.single_blocks = nn.ModuleList(
                FluxSingleTransformerBlock(g.hidden, g.heads) for _ in range(g.single_blocks)
            )
            self.final_norm_out = AdaLayerNormContinuous(g.hidden)
            self.final_proj_out = nn.Linear(g.hidden, g.out_channels)
            self.input_dim = g.in_channels

    with skip_model_initialization():
        dit = SizedFluxDiT().to(root_dtype)
    blocks = [*dit.blocks, *dit.single_blocks]
    for block in blocks:
        store_linears(block, weight_dtype)
    store_linears(dit, root_dtype)
    return OffloadedModule(dit, blocks)
