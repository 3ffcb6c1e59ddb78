"""Random low-rank terms, what they add in float64, and pipelines that have some."""

from dataclasses import replace
from typing import Any

import torch

from majicflux.engine.quant.low_rank import Adapter, LowRankTerm
from majicflux.engine.run.pipeline import Pipeline, paint
from majicflux.engine.run.request import GenerationRequest

WIDTH, COLUMNS = 256, 96
REQUEST = GenerationRequest("a cat", seed=0, steps=2, guidance=3.5, width=64, height=64)
CLIP_LAYER = "clip.encoders.0.attn.to_q"
LAYERS = {  # of DiffSynth's names, with those of Black Forest Labs
    "blocks.0.attn.a_to_qkv": "double_blocks.0.img_attn.qkv",
    "blocks.1.ff_b.2": "double_blocks.1.txt_mlp.2",
    "single_blocks.0.to_qkv_mlp": "single_blocks.0.linear1",
    "single_blocks.3.proj_out": "single_blocks.3.linear2",
    "blocks.0.norm1_a.linear": "double_blocks.0.img_mod.lin",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "final_proj_out": "final_layer.linear",
}


def term(
    rank: int, columns: int = COLUMNS, width: int = WIDTH, first: int = 0, seed: int = 0
) -> LowRankTerm:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, width, generator=generator).bfloat16()
    up = torch.randn(columns, rank, generator=generator).bfloat16()
    return LowRankTerm(down, up, 0.003 / rank**0.5, first)


def delta(term: LowRankTerm, rows: int, strength: float = 1.0) -> torch.Tensor:
    """What it adds to a weight with so many rows, in float64."""
    added = torch.zeros(rows, term.down.shape[1], dtype=torch.float64)
    reached = slice(term.first, term.first + len(term.up))
    added[reached] = strength * term.scale * (term.up.double() @ term.down.double())
    return added


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def adapter_of(module: Any, rank: int = 4, seed: int = 0) -> Adapter:
    terms = {}
    for number, name in enumerate(LAYERS):
        rows, width = module.get_submodule(name).weight.shape
        terms[name] = (term(rank, rows, width, seed=seed + number),)
    return Adapter(terms)


def with_adapters(pipeline: Pipeline, *adapters: tuple[Adapter, float]) -> Pipeline:
    return replace(pipeline, dit=replace(pipeline.dit, adapters=adapters))


def latents(pipeline: Pipeline, request: GenerationRequest = REQUEST) -> torch.Tensor:
    return paint(pipeline, request, lambda _: None, lambda: None)[1]
