"""A Flux.1 transformer of random weights, part by part: all 12 billion at once are too many."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from diffsynth.models.flux_dit import (
    AdaLayerNormContinuous,
    FluxJointTransformerBlock,
    FluxSingleTransformerBlock,
    TimestepEmbeddings,
)
from torch import Generator, Tensor, nn

from majicflux.engine.flux.blocks import DoubleBlock, SingleBlock
from majicflux.engine.flux.geometry import TIMESTEP_CHANNELS, FluxGeometry
from majicflux.engine.quant.quantize import quantize_rows

STD = 0.02  # about that of a trained layer
TIMESTEP, GUIDANCE = 500.0, 3500.0

Draw = Callable[[torch.Size, Generator], Tensor]  # the float32 weight [out, in] of one layer


def normal(shape: torch.Size, generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).mul_(STD)


def heavy_tailed(shape: torch.Size, generator: Generator) -> Tensor:
    """A kurtosis of 8; 1 % of the rows are 6 times and 0.5 % of the columns 8 times as large."""
    values = torch.randn(shape, generator=generator, device=generator.device).mul_(0.7).sinh_()
    values.mul_(STD / 0.91)  # which is the standard deviation of sinh(0.7 n)
    values[_some(shape[0], 0.01, generator)] *= 6
    values[:, _some(shape[1], 0.005, generator)] *= 8
    return values


def mixed(shape: torch.Size, generator: Generator) -> Tensor:
    """Layers of standard deviations between 0.004 and 0.06, and rows that vary within them."""
    device = generator.device
    layer = 0.004 * 15 ** torch.rand((), generator=generator, device=device)
    rows = torch.randn(shape[0], 1, generator=generator, device=device).mul_(0.5).exp_()
    return torch.randn(shape, generator=generator, device=device).mul_(layer * rows)


def _some(count: int, share: float, generator: Generator) -> Tensor:
    order = torch.randperm(count, generator=generator, device=generator.device)
    return order[: max(1, round(share * count))]


def _vector(name: str, shape: torch.Size, generator: Generator) -> Tensor:
    """A bias, or the weight of a norm."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    return values.mul_(0.1).add_(1) if "norm_" in name else values.mul_(STD)


class Embedders(nn.Module):
    """What DiffSynth's FluxDiT has before its blocks, under the same names."""

    def __init__(self, g: FluxGeometry):
        super().__init__()
        self.time_embedder = TimestepEmbeddings(TIMESTEP_CHANNELS, g.hidden)
        self.guidance_embedder = TimestepEmbeddings(TIMESTEP_CHANNELS, g.hidden)
        self.pooled_text_embedder = nn.Sequential(
            nn.Linear(g.pooled_width, g.hidden), nn.SiLU(), nn.Linear(g.hidden, g.hidden)
        )
        self.context_embedder = nn.Linear(g.text_width, g.hidden)
        self.x_embedder = nn.Linear(g.in_channels, g.hidden)

    def forward(
        self, latents: Tensor, prompt: Tensor, pooled: Tensor, rope: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Float32 for every scheme: bfloat16 would make a guidance of 3504 of it.
        timestep, guidance = (torch.full((1,), x, device=rope.device) for x in (TIMESTEP, GUIDANCE))
        conditioning = self.time_embedder(timestep, pooled.dtype)
        conditioning = conditioning + self.pooled_text_embedder(pooled)
        conditioning = conditioning + self.guidance_embedder(guidance, pooled.dtype)
        return self.x_embedder(latents), self.context_embedder(prompt), conditioning


class FinalLayer(nn.Module):
    """What it has after them."""

    def __init__(self, g: FluxGeometry):
        super().__init__()
        self.final_norm_out = AdaLayerNormContinuous(g.hidden)
        self.final_proj_out = nn.Linear(g.hidden, g.out_channels)

    def forward(
        self, image: Tensor, text: Tensor, conditioning: Tensor, rope: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.final_proj_out(self.final_norm_out(image, conditioning)), text


@dataclass(frozen=True)
class Part:
    """The embedders, a block or the final layer. prefix: of the names of its layers in FluxDiT;
    classes: DiffSynth's and ours; weights: bfloat16, by the names in the module."""

    prefix: str
    classes: tuple[type[nn.Module], type[nn.Module]]
    arguments: tuple
    weights: dict[str, Tensor] = field(default_factory=dict)
    quantized: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def module(self, ours: bool = False) -> nn.Module:
        """The module, on the meta device. Ours is not yet in a storage of ours."""
        with torch.device("meta"):
            return self.classes[ours](*self.arguments)

    def draw(self, draw: Draw, generator: Generator) -> None:
        for name, parameter in self.module().named_parameters():
            shape = parameter.shape
            vector = len(shape) == 1
            values = _vector(name, shape, generator) if vector else draw(shape, generator)
            self.weights[name] = values.bfloat16()

    def in_eight_bits(self, name: str, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
        """The weight of that name and its scale, computed once for all who ask."""
        key = (name, dtype, group)
        if key not in self.quantized:
            weight = self.weights[name]
            stored = torch.empty_like(weight, dtype=dtype)
            scale = torch.empty(len(weight), device=weight.device)
            quantize_rows(weight, stored, scale, group)
            self.quantized[key] = stored, scale
        return self.quantized[key]


def parts(g: FluxGeometry) -> Iterator[Part]:
    """In the order in which they run, without weights."""
    block = (g.hidden, g.heads)
    yield Part("", (Embedders, Embedders), (g,))
    for index in range(g.double_blocks):
        yield Part(f"blocks.{index}.", (FluxJointTransformerBlock, DoubleBlock), block)
    for index in range(g.single_blocks):
        yield Part(f"single_blocks.{index}.", (FluxSingleTransformerBlock, SingleBlock), block)
    yield Part("", (FinalLayer, FinalLayer), (g,))
