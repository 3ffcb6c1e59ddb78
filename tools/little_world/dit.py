"""Flux.1's transformer in plain torch, of any size, under the names of Black Forest Labs' file.

It has gradients and nothing else that the pack's own, which streams 8-bit weights, is made for.
B: pictures of a batch, T: text tokens, N: image tokens, one for 16x16 pixels, W: `hidden`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...engine.flux.geometry import (
    HEAD_DIM,
    MLP_RATIO,
    ROPE_AXES,
    TIMESTEP_CHANNELS,
    FluxGeometry,
)
from ...engine.sizes import CHANNELS, PATCH

ROPE_THETA = 10000
EPS = 1e-6


def linear(width_in: int, width_out: int, zero: bool = False) -> nn.Linear:
    """zero: it gives nothing at first, so that a block with such gates begins as the identity."""
    layer = nn.Linear(width_in, width_out)
    nn.init.zeros_(layer.bias)
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    return layer


class HeadNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HEAD_DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.scale


class QKNorm(nn.Module):
    """Norm and rotation of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.query_norm, self.key_norm = HeadNorm(), HeadNorm()

    def forward(self, qkv: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, tokens, 3 W] -> three of [B, heads, tokens, HEAD_DIM]."""
        q, k, v = qkv.unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        q, k = rotated(self.query_norm(q), rope), rotated(self.key_norm(k), rope)
        return q.to(v.dtype), k.to(v.dtype), v


class Attention(nn.Module):
    """One stream's share of the attention of a double block."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.qkv, self.proj = linear(hidden, 3 * hidden), linear(hidden, hidden)
        self.norm = QKNorm()


class Modulation(nn.Module):
    def __init__(self, hidden: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.lin = linear(hidden, parts * hidden, zero=True)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """[B, W] -> so many of [B, 1, W]."""
        return self.lin(condition)[:, None].chunk(self.parts, -1)


class Embedder(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.in_layer, self.out_layer = linear(width, hidden), linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class DoubleBlock(nn.Module):
    """Image and text have weights of their own and attend to each other."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.img_mod, self.txt_mod = Modulation(hidden, 6), Modulation(hidden, 6)
        self.img_attn, self.txt_attn = Attention(hidden), Attention(hidden)
        self.img_mlp, self.txt_mlp = _mlp(hidden), _mlp(hidden)

    def forward(
        self, img: Tensor, txt: Tensor, condition: Tensor, rope_img: Tensor, rope_txt: Tensor
    ) -> tuple[Tensor, Tensor]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.img_mod(condition)
        t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = self.txt_mod(condition)
        of_text = self.txt_attn.norm(self.txt_attn.qkv(modulated(txt, t_shift, t_scale)), rope_txt)
        of_image = self.img_attn.norm(self.img_attn.qkv(modulated(img, shift, scale)), rope_img)
        both = (torch.cat(pair, 2) for pair in zip(of_text, of_image, strict=True))
        found_txt, found_img = attention(*both).split([txt.shape[1], img.shape[1]], 1)
        txt = txt + t_gate * self.txt_attn.proj(found_txt)
        img = img + gate * self.img_attn.proj(found_img)
        txt = txt + t_mlp_gate * self.txt_mlp(modulated(txt, t_mlp_shift, t_mlp_scale))
        img = img + mlp_gate * self.img_mlp(modulated(img, mlp_shift, mlp_scale))
        return img, txt


class SingleBlock(nn.Module):
    """Text and image as one sequence; attention and MLP side by side."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.widths = [3 * hidden, MLP_RATIO * hidden]
        self.modulation = Modulation(hidden, 3)
        self.linear1 = linear(hidden, sum(self.widths))
        self.linear2 = linear((1 + MLP_RATIO) * hidden, hidden)
        self.norm = QKNorm()

    def forward(self, x: Tensor, condition: Tensor, rope: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition)
        qkv, mlp = self.linear1(modulated(x, shift, scale)).split(self.widths, -1)
        found = attention(*self.norm(qkv, rope))
        return x + gate * self.linear2(torch.cat([found, F.gelu(mlp, approximate="tanh")], -1))


class FinalLayer(nn.Module):
    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__()
        self.linear = linear(hidden, channels, zero=True)
        # The SiLU has its place in the names of the file; it is applied once for all blocks.
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(hidden, 2 * hidden, zero=True))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation[1](condition)[:, None].chunk(2, -1)
        return self.linear(modulated(x, shift, scale))


class DiT(nn.Module):
    def __init__(self, g: FluxGeometry) -> None:
        super().__init__()
        self.img_in, self.txt_in = linear(g.in_channels, g.hidden), linear(g.text_width, g.hidden)
        self.time_in = Embedder(TIMESTEP_CHANNELS, g.hidden)
        self.vector_in = Embedder(g.pooled_width, g.hidden)
        self.guidance_in = Embedder(TIMESTEP_CHANNELS, g.hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(g.hidden) for _ in range(g.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(g.hidden) for _ in range(g.single_blocks))
        self.final_layer = FinalLayer(g.hidden, g.out_channels)
        self._ropes: dict[tuple[object, ...], Tensor] = {}

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        text: Tensor,
        pooled: Tensor,
        guidance: Tensor,
        beside: Tensor | None = None,
        reference: Tensor | None = None,
        control: Tensor | None = None,
    ) -> Tensor:
        """Velocity, noise less picture, in model space: [B, 16, h, w], as the latents are.

        sigma, guidance: [B]; text: [B, T, text width]; pooled: [B, pooled width]; beside: further
        channels [B, channels, h, w]; reference: latents of a picture, of any size, that the tokens
        can look at; control: [B, N, W], added after each double block.
        """
        height, width = latents.shape[2:]
        words, painted = text.shape[1], height * width // PATCH**2
        sizes = [x.shape[2:] for x in (latents, reference) if x is not None]
        rope = self.rope(words, sizes, latents.device)
        condition = self.condition(sigma, pooled, guidance)
        if beside is not None:
            latents = torch.cat([latents, beside], 1)
        img, txt = self.img_in(patches(latents)), self.txt_in(text)
        if reference is not None:
            img = torch.cat([img, self.img_in(patches(reference))], 1)
        for block in self.double_blocks:
            img, txt = block(img, txt, condition, rope[:, words:], rope[:, :words])
            if control is not None:
                img = img + control
        x = torch.cat([txt, img], 1)
        for block in self.single_blocks:
            x = block(x, condition, rope)
        found = self.final_layer(x[:, words : words + painted], condition)
        return unpatched(found, height, width)

    def condition(self, sigma: Tensor, pooled: Tensor, guidance: Tensor) -> Tensor:
        """[B, W], what all modulations are made of."""
        condition = self.time_in(sinusoids(sigma)) + self.vector_in(pooled)
        return F.silu((condition + self.guidance_in(sinusoids(guidance))).float())

    def rope(self, words: int, sizes: Sequence[torch.Size], device: torch.device) -> Tensor:
        """sizes: of the latents to paint, and of a reference."""
        key = (words, *sizes, device)
        if key not in self._ropes:
            grids = [(height // PATCH, width // PATCH) for height, width in sizes]
            self._ropes[key] = rope(words, *grids).to(device)
        return self._ropes[key]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three of [B, heads, tokens, HEAD_DIM] -> [B, tokens, W]."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=EPS) * (1 + scale) + shift


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    """Each pair of neighbouring channels turned by the angle of its token."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rope.unbind(0)
    return torch.stack([a * cosine - b * sine, a * sine + b * cosine], -1).flatten(-2)


def rope(words: int, *grids: tuple[int, int]) -> Tensor:
    """Cosines and sines [2, tokens, HEAD_DIM / 2]: all text is at (0, 0, 0).

    grids: rows and columns of the painted picture, whose index is 0, and of one with index 1.
    """
    places = [torch.zeros(words, len(ROPE_AXES), dtype=torch.float64)]
    for index, (rows, columns) in enumerate(grids):
        place = torch.full((rows, columns, len(ROPE_AXES)), index, dtype=torch.float64)
        place[..., 1] = torch.arange(rows)[:, None]
        place[..., 2] = torch.arange(columns)
        places.append(place.flatten(0, 1))
    place = torch.cat(places)
    angles = []
    for axis, width in enumerate(ROPE_AXES):
        exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
        angles.append(place[:, axis, None] / ROPE_THETA**exponent)
    angle = torch.cat(angles, -1)
    return torch.stack([angle.cos(), angle.sin()]).float()


def sinusoids(value: Tensor) -> Tensor:
    """[B], sigmas or guidances -> [B, TIMESTEP_CHANNELS]."""
    half = TIMESTEP_CHANNELS // 2
    exponent = torch.arange(half, device=value.device, dtype=torch.float32) / half
    angles = 1000 * value.float()[:, None] * torch.exp(-math.log(10000) * exponent)
    return torch.cat([angles.cos(), angles.sin()], -1)


def patches(latents: Tensor) -> Tensor:
    """[B, 16, h, w] -> [B, N, 64]: the 2x2 latents of a token, channel by channel."""
    x = latents.unflatten(2, (-1, PATCH)).unflatten(4, (-1, PATCH))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatched(x: Tensor, height: int, width: int) -> Tensor:
    """The reverse of `patches`."""
    rows, columns = height // PATCH, width // PATCH
    x = x.view(len(x), rows, columns, CHANNELS, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(len(x), CHANNELS, height, width)


def _mlp(hidden: int) -> nn.Sequential:
    wide = MLP_RATIO * hidden
    return nn.Sequential(linear(hidden, wide), nn.GELU(approximate="tanh"), linear(wide, hidden))
