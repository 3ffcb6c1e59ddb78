"""The T5 v1.1 encoder: that of Transformers, whose file takes seconds to import, bit for bit.

Its modules have the names that the weights have in T5's files.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .geometry import T5Geometry

EPS = 1e-6
FARTHEST = 128  # tokens apart, from where on all distances have the same bias


class T5LayerNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * x.to(self.weight.dtype)


class T5Attention(nn.Module):
    """has_bias: whether it is the first, which keeps the position bias of all."""

    def __init__(self, g: T5Geometry, has_bias: bool):
        super().__init__()
        inner = g.heads * g.head_dim
        self.heads = g.heads
        self.q, self.k, self.v = (nn.Linear(g.width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, g.width, bias=False)
        if has_bias:
            # The constructor draws values, for which PyTorch imports its compiler on meta.
            table = torch.empty(g.buckets, g.heads)
            self.relative_attention_bias = nn.Embedding.from_pretrained(table)

    def position_bias(self, text_tokens: int) -> Tensor:
        """[1, heads, tokens, tokens]"""
        table: Any = self.relative_attention_bias
        place = torch.arange(text_tokens, device=table.weight.device)
        buckets = _buckets(place[None, :] - place[:, None], table.num_embeddings)
        return table(buckets).permute(2, 0, 1)[None].contiguous()

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(found.transpose(1, 2).flatten(2))


class T5LayerSelfAttention(nn.Module):
    def __init__(self, g: T5Geometry, has_bias: bool):
        super().__init__()
        self.SelfAttention = T5Attention(g, has_bias)
        self.layer_norm = T5LayerNorm(g.width)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """bias: None for the first, which makes it."""
        if bias is None:
            bias = self.SelfAttention.position_bias(x.shape[1])
        return x + self.SelfAttention(self.layer_norm(x), bias), bias


class T5DenseGatedActDense(nn.Module):
    def __init__(self, g: T5Geometry):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(g.width, g.mlp_width, bias=False) for _ in range(2))
        self.wo = nn.Linear(g.mlp_width, g.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = _gelu(self.wi_0(x))
        return self.wo(gate * self.wi_1(x))


class T5LayerFF(nn.Module):
    def __init__(self, g: T5Geometry):
        super().__init__()
        self.DenseReluDense = T5DenseGatedActDense(g)
        self.layer_norm = T5LayerNorm(g.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nn.Module):
    def __init__(self, g: T5Geometry, has_bias: bool):
        super().__init__()
        self.layer = nn.ModuleList([T5LayerSelfAttention(g, has_bias), T5LayerFF(g)])


class T5Stack(nn.Module):
    def __init__(self, g: T5Geometry, table: nn.Module):
        super().__init__()
        self.embed_tokens = table
        self.block = nn.ModuleList(T5Block(g, index == 0) for index in range(g.layers))
        self.final_layer_norm = T5LayerNorm(g.width)

    def forward(self, x: Tensor) -> Tensor:
        """x: token vectors [batch, text tokens, width]."""
        bias = None
        block: Any
        for block in self.block:
            attention, mlp = block.layer
            x, bias = attention(x, bias)
            x = mlp(x)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    """Token ids [batch, text tokens] -> vectors [batch, text tokens, width]."""

    def __init__(self, g: T5Geometry, table: nn.Module):
        """table: of the token vectors."""
        super().__init__()
        self.shared, self.geometry = table, g
        self.encoder = T5Stack(g, table)  # one table under two names

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(self.shared(ids))


def _buckets(distance: Tensor, count: int) -> Tensor:
    """The row of the bias for each distance: half of the rows for words that follow; of each half,
    one for each small distance, then wider ones up to FARTHEST.

    Source: Mesh TensorFlow's `_relative_position_bucket`.
    """
    half = count // 2
    exact = half // 2
    apart = distance.abs()
    wide = torch.log(apart.float() / exact) / math.log(FARTHEST / exact) * (half - exact)
    wide = (exact + wide.to(torch.long)).clamp_max(half - 1)
    return (distance > 0) * half + torch.where(apart < exact, apart, wide)


def _gelu(x: Tensor) -> Tensor:
    """Not `F.gelu`, which rounds once: every value is rounded when Transformers rounds it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3.0))))
