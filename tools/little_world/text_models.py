"""Flux.1's two text encoders in plain torch, under the names of their files.

B: texts of a batch, T: tokens of each.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...engine.flux.geometry import CLIP_HEAD_DIM, ClipGeometry, T5Geometry
from .dit import linear

EPS = 1e-6
FARTHEST = 128  # tokens apart, from where on all distances have the same bias


class Table(nn.Module):
    """A tensor called `weight`: a table of vectors, or a matrix without bias."""

    def __init__(self, *shape: int, spread: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) * spread)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.weight


class Named(nn.Module):
    """Modules that only have their places in the names of a file."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class T5Layer(nn.Module):
    """first: whether it keeps the position bias of all layers."""

    def __init__(self, g: T5Geometry, first: bool) -> None:
        super().__init__()
        inner, spread = g.heads * g.head_dim, g.width**-0.5
        attention: Any = Named(
            q=Table(inner, g.width, spread=spread * g.head_dim**-0.5),  # T5 scales no products
            k=Table(inner, g.width, spread=spread),
            v=Table(inner, g.width, spread=spread),
            o=Table(g.width, inner, spread=inner**-0.5),
        )
        if first:
            attention.relative_attention_bias = Table(g.buckets, g.heads, spread=0.1)
        mlp = Named(
            wi_0=Table(g.mlp_width, g.width, spread=spread),
            wi_1=Table(g.mlp_width, g.width, spread=spread),
            wo=Table(g.width, g.mlp_width, spread=g.mlp_width**-0.5),
        )
        self.layer = nn.ModuleList(
            [
                Named(SelfAttention=attention, layer_norm=RMSNorm(g.width)),
                Named(DenseReluDense=mlp, layer_norm=RMSNorm(g.width)),
            ]
        )
        self.heads = g.heads

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x: [B, T, width]; bias: [1, heads, T, T]."""
        attention: Any
        mlp: Any
        attention, mlp = self.layer
        x = x + self._attended(attention.SelfAttention, attention.layer_norm(x), bias)
        mlp, y = mlp.DenseReluDense, mlp.layer_norm(x)
        gate = F.gelu(F.linear(y, mlp.wi_0.weight), approximate="tanh")
        return x + F.linear(gate * F.linear(y, mlp.wi_1.weight), mlp.wo.weight)

    def _attended(self, own: Any, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            F.linear(x, each.weight).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (own.q, own.k, own.v)
        )
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return F.linear(found.transpose(1, 2).flatten(2), own.o.weight)


class T5(nn.Module):
    def __init__(self, g: T5Geometry) -> None:
        super().__init__()
        self.shared = Table(g.vocabulary, g.width, spread=1.0)
        self.encoder: Any = Named(
            block=nn.ModuleList(T5Layer(g, first=index == 0) for index in range(g.layers)),
            final_layer_norm=RMSNorm(g.width),
        )
        self._buckets: dict[tuple[object, ...], Tensor] = {}

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, width]. As in Flux, filling tokens are read like any other."""
        bias = self._bias(ids.shape[1], ids.device)
        x = self.shared.weight[ids]
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)

    def _bias(self, tokens: int, device: torch.device) -> Tensor:
        if (tokens, device) not in self._buckets:
            self._buckets[tokens, device] = buckets(tokens).to(device)
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        return table[self._buckets[tokens, device]].permute(2, 0, 1)[None]


class ClipLayer(nn.Module):
    def __init__(self, g: ClipGeometry) -> None:
        super().__init__()
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn: Any = Named(**{name: linear(g.width, g.width) for name in names})
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(g.width), nn.LayerNorm(g.width)
        self.mlp: Any = Named(fc1=linear(g.width, g.mlp_width), fc2=linear(g.mlp_width, g.width))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, width]"""
        own, y = self.self_attn, self.layer_norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (-1, CLIP_HEAD_DIM)).transpose(1, 2)
            for layer in (own.q_proj, own.k_proj, own.v_proj)
        )
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + own.out_proj(found.transpose(1, 2).flatten(2))
        y = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(y * torch.sigmoid(1.702 * y))


class Clip(nn.Module):
    def __init__(self, g: ClipGeometry) -> None:
        super().__init__()
        self.text_model: Any = Named(
            embeddings=Named(
                token_embedding=Table(g.vocabulary, g.width, spread=0.5),
                position_embedding=Table(g.positions, g.width, spread=0.1),
            ),
            encoder=Named(layers=nn.ModuleList(ClipLayer(g) for _ in range(g.layers))),
            final_layer_norm=nn.LayerNorm(g.width),
        )

    def forward(self, ids: Tensor) -> Tensor:
        """[B, positions] -> [B, width], the vector of the end of each text, the highest id."""
        own = self.text_model
        x = own.embeddings.token_embedding.weight[ids] + own.embeddings.position_embedding.weight
        for layer in own.encoder.layers:
            x = layer(x)
        x = own.final_layer_norm(x)
        return x[torch.arange(len(ids), device=ids.device), ids.argmax(-1)]


def buckets(tokens: int, count: int = 32) -> Tensor:
    """[query, key]: the row of the position bias for each distance.

    Half of the rows are for words that follow; of each half, one for each small distance, then
    wider ones up to FARTHEST.
    """
    place = torch.arange(tokens)
    distance = place[None, :] - place[:, None]
    half, exact = count // 2, count // 4
    apart = distance.abs()
    wide = torch.log(apart.clamp(min=1) / exact) / math.log(FARTHEST / exact) * (half - exact)
    wide = (exact + wide.long()).clamp(max=half - 1)
    return (distance > 0).long() * half + torch.where(apart < exact, apart, wide)
