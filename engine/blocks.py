"""Flux.1's two kinds of transformer block: DiffSynth's modules, run in fewer passes over memory.

Where no kernel is fused, every value is rounded when DiffSynth rounds it, so the results are
DiffSynth's bit for bit. Attention masks and IP-adapters take DiffSynth's own forward.
"""
# pyright: reportCallIssue=false, reportIncompatibleMethodOverride=false

from collections.abc import Sequence
from typing import Any

from diffsynth.models.flux_dit import FluxJointTransformerBlock, FluxSingleTransformerBlock
from torch import Tensor
from torch.nn import functional as F

from .rows import add_gated, rms_rope_


class JointBlock(FluxJointTransformerBlock):
    """Image (a) and text (b) with weights of their own, attending to each other.

    modulation: outputs of the modulation layers for this step, or None to compute them here.
    """

    modulation: Sequence[Tensor] | None = None

    def modulation_layers(self) -> list[Any]:
        return [self.norm1_a.linear, self.norm1_b.linear]

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        conditioning: Tensor,
        rope: Tensor,
        attn_mask: Tensor | None = None,
        ipadapter_kwargs_list: Any = None,
    ) -> tuple[Tensor, Tensor]:
        if attn_mask is not None or ipadapter_kwargs_list is not None:
            return super().forward(
                image, text, conditioning, rope, attn_mask, ipadapter_kwargs_list
            )
        attention = self.attn
        image_mod, text_mod = (mod.chunk(6, dim=-1) for mod in modulation_of(self, conditioning))

        batch, words, width = text.shape
        qkv = text.new_empty(batch, words + image.shape[1], 3 * width)
        parts = (
            (text, text_mod, attention.b_to_qkv, attention.norm_q_b, attention.norm_k_b, 0),
            (image, image_mod, attention.a_to_qkv, attention.norm_q_a, attention.norm_k_a, words),
        )
        for x, mod, to_qkv, q_norm, k_norm, first in parts:
            tokens = slice(first, first + x.shape[1])
            to_qkv(to_qkv.rows(x, norm=mod[:2]), out=qkv[:, tokens])
            rms_rope_(qkv[:, tokens], q_norm, k_norm, rope[:, :, tokens], attention.num_heads)
        mixed = attend(qkv, attention.num_heads)

        text = _rest(text, mixed[:, :words], text_mod, attention.b_to_out, self.ff_b)
        image = _rest(image, mixed[:, words:], image_mod, attention.a_to_out, self.ff_a)
        return image, text


class SingleBlock(FluxSingleTransformerBlock):
    """Text and image as one sequence, attention and MLP side by side.

    modulation: as in JointBlock.
    """

    modulation: Sequence[Tensor] | None = None

    def modulation_layers(self) -> list[Any]:
        return [self.norm.linear]

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        conditioning: Tensor,
        rope: Tensor,
        attn_mask: Tensor | None = None,
        ipadapter_kwargs_list: Any = None,
    ) -> tuple[Tensor, Tensor]:
        if attn_mask is not None or ipadapter_kwargs_list is not None:
            return super().forward(x, text, conditioning, rope, attn_mask, ipadapter_kwargs_list)
        (mod,) = modulation_of(self, conditioning)
        shift, scale, gate = mod.chunk(3, dim=-1)
        both = self.to_qkv_mlp(self.to_qkv_mlp.rows(x, norm=(shift, scale)))
        qkv, hidden = both.split([3 * self.dim, both.shape[-1] - 3 * self.dim], dim=-1)
        rms_rope_(qkv, self.norm_q_a, self.norm_k_a, rope, self.num_heads)
        mixed = attend(qkv, self.num_heads)
        y = self.proj_out(self.proj_out.rows(mixed, gelu=hidden))
        return add_gated(x, gate, y), text


def modulation_of(block: JointBlock | SingleBlock, conditioning: Tensor) -> Sequence[Tensor]:
    """[batch or 1, 1, n * width] from each modulation layer of the block."""
    if block.modulation is not None:
        return block.modulation
    active = F.silu(conditioning)[:, None]
    return [layer(active) for layer in block.modulation_layers()]


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Attention of [batch, tokens, 3 * width], queries, keys and values side by side."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _rest(x: Tensor, mixed: Tensor, mod: Any, to_out: Any, mlp: Any) -> Tensor:
    """What follows the attention, for one of the two streams."""
    _, _, gate, mlp_shift, mlp_scale, mlp_gate = mod
    x = add_gated(x, gate, to_out(to_out.rows(mixed)))
    into, _, out_of = mlp
    hidden = into(into.rows(x, norm=(mlp_shift, mlp_scale)))
    return add_gated(x, mlp_gate, out_of(out_of.rows(None, gelu=hidden)))
