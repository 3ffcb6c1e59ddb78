"""The T5 v1.1 encoder: that of Transformers, whose file takes seconds to import, bit for bit.

Its modules have the names that the weights have in T5's files. They take the states of several
prompts one by one, [1, text tokens, width] each: a matrix is needed once for all of them, and what
becomes of a prompt has the same bits as if it were alone.
"""

import math
from collections.abc import Sequence
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


class T5Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, each: Sequence[Tensor]) -> list[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return [F.linear(x, self.weight) for x in each]


class T5Attention(nn.Module):
    """has_bias: whether it is the first, which keeps the position bias of all."""

    def __init__(self, g: T5Geometry, has_bias: bool):
        super().__init__()
        inner = g.heads * g.head_dim
        self.heads = g.heads
        self.q, self.k, self.v = (T5Linear(g.width, inner) for _ in range(3))
        self.o = T5Linear(inner, g.width)
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

    def forward(self, each: Sequence[Tensor], bias: Tensor) -> list[Tensor]:
        of_each = zip(self.q(each), self.k(each), self.v(each), strict=True)
        found = [self._attended(q, k, v, bias) for q, k, v in of_each]
        del of_each  # as much memory as what follows
        return self.o(found)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return found.transpose(1, 2).flatten(2)


class T5LayerSelfAttention(nn.Module):
    def __init__(self, g: T5Geometry, has_bias: bool):
        super().__init__()
        self.SelfAttention = T5Attention(g, has_bias)
        self.layer_norm = T5LayerNorm(g.width)

    def forward(self, each: Sequence[Tensor], bias: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """bias: None for the first, which makes it."""
        if bias is None:
            bias = self.SelfAttention.position_bias(each[0].shape[1])
        found = self.SelfAttention([self.layer_norm(x) for x in each], bias)
        return [x + y for x, y in zip(each, found, strict=True)], bias


class T5DenseGatedActDense(nn.Module):
    def __init__(self, g: T5Geometry):
        super().__init__()
        self.wi_0, self.wi_1 = (T5Linear(g.width, g.mlp_width) for _ in range(2))
        self.wo = T5Linear(g.mlp_width, g.width)

    def forward(self, each: Sequence[Tensor]) -> list[Tensor]:
        gates = self.wi_0(each)
        for index, gate in enumerate(gates):
            gates[index] = _gelu(gate)
        for gate, x in zip(gates, self.wi_1(each), strict=True):
            gate.mul_(x)
        return self.wo(gates)


class T5LayerFF(nn.Module):
    def __init__(self, g: T5Geometry):
        super().__init__()
        self.DenseReluDense = T5DenseGatedActDense(g)
        self.layer_norm = T5LayerNorm(g.width)

    def forward(self, each: Sequence[Tensor]) -> list[Tensor]:
        found = self.DenseReluDense([self.layer_norm(x) for x in each])
        return [x + y for x, y in zip(each, found, strict=True)]


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
        each, bias = x.split(1), None
        block: Any
        for block in self.block:
            attention, mlp = block.layer
            each, bias = attention(each, bias)
            each = mlp(each)
        return torch.cat([self.final_layer_norm(x) for x in each])


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
