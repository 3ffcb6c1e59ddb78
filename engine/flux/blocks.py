"""DiffSynth's Flux transformer, built from a geometry instead of fixed sizes."""
# pyright: reportCallIssue=false, reportIncompatibleMethodOverride=false

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..diffsynth_files import diffsynth_module
from ..kernels.libraries import kitchen_int8_attention
from ..kernels.ops import add_gated_, rms_rope_
from ..offload.chunking import Chunking
from ..offload.offloaded_module import onloaded
from ..quant.attention import PYTORCH, Attends, Attention
from .geometry import HEAD_DIM


@dataclass(frozen=True)
class TokenSequence:
    """What the blocks work on, for all pictures under one prompt.

    x: [batch, text tokens + image tokens, width], the residual, changed in place; tokens of other
    pictures may follow. rope: of one picture, as RoPEEmbedding gives it.
    """

    x: Tensor
    text_tokens: int
    image_tokens: int
    rope: Tensor

    @property
    def image(self) -> Tensor:
        return self.x[:, self.text_tokens : self.text_tokens + self.image_tokens]


_theirs = diffsynth_module("models.flux_dit")


class DoubleBlock(_theirs.FluxJointTransformerBlock, Attends):
    """Image (a) and text (b) with weights of their own, attending to each other."""

    def modulation_layers(self) -> list[Any]:
        return [self.norm1_a.linear, self.norm1_b.linear]

    def weight_blocks(self) -> list[list[Any]]:
        """The layers that are needed together, in their order."""
        a, b = self.attn.a_to_out, self.attn.b_to_out
        return [
            [self.attn.b_to_qkv, self.attn.a_to_qkv],
            [b, self.ff_b[0], self.ff_b[2]],
            [a, self.ff_a[0], self.ff_a[2]],
        ]

    def forward(
        self,
        sequences: Sequence[TokenSequence],
        modulation: Sequence[Sequence[Tensor]],
        chunking: Chunking,
    ) -> None:
        """modulation: for each sequence what each of `modulation_layers` gave, [1, 1, 6 * width],
        in the dtype of its residual."""
        attention = self.attn
        streams = (
            (attention.b_to_qkv, (attention.norm_q_b, attention.norm_k_b)),
            (attention.a_to_qkv, (attention.norm_q_a, attention.norm_k_a)),
        )
        # Each block of weights is asked for once, for all pictures: it may have to travel.
        pictures, attended = [], []
        for sequence, told in zip(sequences, modulation, strict=True):
            x, text_tokens = sequence.x, sequence.text_tokens
            both = slice(0, text_tokens), slice(text_tokens, x.shape[1])
            of_image, of_text = (given.chunk(6, dim=-1) for given in told)
            mods = of_text, of_image
            pictures += [(x, sequence.rope, both, mods) for x in x.split(1)]
        with onloaded(attention.b_to_qkv):
            for x, rope, both, mods in pictures:
                parts = [
                    (tokens, mod[:2], *stream)
                    for tokens, mod, stream in zip(both, mods, streams, strict=True)
                ]
                given = (rope, attention.num_heads, chunking, self.attention)
                attended.append(joint_attention(x, parts, *given))
        for index, (to_out, mlp) in enumerate(
            ((attention.b_to_out, self.ff_b), (attention.a_to_out, self.ff_a))
        ):
            with onloaded(to_out):
                for (x, _, both, mods), of_picture in zip(pictures, attended, strict=True):
                    _attention_out_and_mlp(
                        x, both[index], of_picture, mods[index], to_out, mlp, chunking
                    )


class SingleBlock(_theirs.FluxSingleTransformerBlock, Attends):
    """Text and image as one sequence, attention and MLP side by side."""

    def modulation_layers(self) -> list[Any]:
        return [self.norm.linear]

    def weight_blocks(self) -> list[list[Any]]:
        return [[self.to_qkv_mlp, self.proj_out]]

    def forward(
        self,
        sequences: Sequence[TokenSequence],
        modulation: Sequence[Sequence[Tensor]],
        chunking: Chunking,
    ) -> None:
        """As of JointBlock, with [1, 1, 3 * width]."""
        with onloaded(self.to_qkv_mlp):
            for sequence, (told,) in zip(sequences, modulation, strict=True):
                shift, scale, gate = told.chunk(3, dim=-1)
                for picture in sequence.x.split(1):
                    given = (picture, (shift, scale), gate, sequence.rope, chunking)
                    if not chunking.retry(partial(self._at_once, *given)):
                        self._in_chunks(*given)

    def _at_once(
        self, x: Tensor, norm: Any, gate: Tensor, rope: Tensor, chunking: Chunking
    ) -> bool:
        """All tokens: one product instead of two, which is faster where there is memory for it.

        False: nothing has been done, because there is not.
        """
        if chunking.tokens or chunking.groups > 1:
            return False
        both = self.to_qkv_mlp(self.to_qkv_mlp.rows(x, norm=norm))
        qkv, hidden = both.split([3 * self.dim, both.shape[-1] - 3 * self.dim], dim=-1)
        rms_rope_(qkv, self.norm_q_a.weight, self.norm_k_a.weight, rope, self.num_heads)
        attended = attend(qkv, self.num_heads, self.attention)
        add_gated_(x, gate, self.proj_out(self.proj_out.rows(attended, gelu=hidden)))
        return True

    def _in_chunks(
        self, x: Tensor, norm: Any, gate: Tensor, rope: Tensor, chunking: Chunking
    ) -> None:
        into, out_of = self.to_qkv_mlp, self.proj_out
        tokens = slice(0, x.shape[1])
        part = (tokens, norm, into, (self.norm_q_a, self.norm_k_a))
        given = (rope, self.num_heads, chunking, self.attention)
        attended = joint_attention(x, [part], *given)

        def rest(some: slice) -> None:
            rows = into.rows(x[:, some], norm=norm)
            hidden = into(rows, columns=slice(3 * self.dim, None))
            del rows
            rows = out_of.rows(attended[:, some], gelu=hidden)
            del hidden
            add_gated_(x[:, some], gate, out_of(rows))

        chunking.for_each(tokens, rest)


def joint_attention(
    x: Tensor, parts: Sequence[Any], rope: Tensor, heads: int, chunking: Chunking,
    attention: Attention,
) -> Tensor:  # fmt: skip
    """What all tokens of x [1, tokens, width] find in each other, which is as large as x.

    parts: (tokens, what their norm is modulated by, layer whose first columns are queries, keys
    and values, norms of queries and keys).
    """
    done, attended = 0, None
    product = parts[0][2].method
    new = partial(x.new_empty, dtype=x.dtype if product is None else product.dtype)

    def some_heads() -> int:
        nonlocal attended
        count = chunking.heads_at_once(heads)
        if attended is None and count < heads:
            attended = new(x.shape)
        some = slice(done * HEAD_DIM, (done + count) * HEAD_DIM)
        qkv = new(1, x.shape[1], 3 * count * HEAD_DIM)
        for of_part, norm, layer, norms in parts:
            chunking.for_each(of_part, partial(_write_qkv, x, norm, layer, norms, rope, qkv, some))
        found = attend(qkv, count, attention)
        if attended is None:
            attended = found
        else:
            attended[:, :, some] = found
        return done + count

    while done < heads:
        done = chunking.retry(some_heads, partial(chunking.fewer_heads, heads))
    assert attended is not None
    return attended


def attend(qkv: Tensor, heads: int, attention: Attention = PYTORCH) -> Tensor:
    """Attention of [1, tokens, 3 * width], queries, keys and values side by side."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    in_int8 = attention.in_int8(qkv.shape[1])
    mix = kitchen_int8_attention if in_int8 else F.scaled_dot_product_attention
    return mix(q, k, v).transpose(1, 2).flatten(2)


def _write_qkv(
    x: Tensor, norm: Any, layer: Any, norms: Any, rope: Tensor, qkv: Tensor, heads: slice,
    tokens: slice,
) -> None:  # fmt: skip
    """For some tokens and the columns of some heads: the layer's queries, keys and values, of
    which queries and keys are normed by `norms` and rotated, to `qkv`."""
    width, some = x.shape[2], heads.stop - heads.start
    rows, out = layer.rows(x[:, tokens], norm=norm), qkv[:, tokens]
    if some == width:  # one product, because the three lie side by side
        layer(rows, out=out, columns=slice(0, 3 * width))
    else:
        firsts = (part * width + heads.start for part in range(3))
        columns = [slice(first, first + some) for first in firsts]
        layer.write(rows, out.split(some, dim=-1), columns)
    del rows
    rms_rope_(out, *(norm.weight for norm in norms), rope[:, :, tokens], some // HEAD_DIM)


def _attention_out_and_mlp(
    x: Tensor, tokens: slice, attended: Tensor, mod: Any, to_out: Any, mlp: Any, chunking: Chunking
) -> None:
    """What follows the attention, for one of the two streams."""
    _, _, gate, mlp_shift, mlp_scale, mlp_gate = mod
    into, _, out_of = mlp

    def after_attention(some: slice) -> None:
        add_gated_(x[:, some], gate, to_out(to_out.rows(attended[:, some])))

    def feed_forward(some: slice) -> None:
        hidden = into(into.rows(x[:, some], norm=(mlp_shift, mlp_scale)))
        rows = out_of.rows(None, gelu=hidden)
        del hidden
        add_gated_(x[:, some], mlp_gate, out_of(rows))

    chunking.for_each(tokens, after_attention)
    chunking.for_each(tokens, feed_forward)
