"""Prompt -> embeddings, by CLIP-L (pooled vector) and T5 (one vector per token)."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .offload import BeforeBlock, OffloadedModule, Patcher
from .prompts import T5_TOKENS, Segments, TokenCounts, tokenize, weighted_segments
from .work import Work

log = logging.getLogger("majicflux")

REMEMBERED_BYTES = 256 * 2**20  # of embeddings: 63 prompts of usual length in bfloat16
CLIP_HEAD_DIM = 64  # of every CLIP text encoder


@dataclass(frozen=True)
class ClipGeometry:
    """Sizes of a CLIP text encoder. The defaults are CLIP-L's."""

    width: int = 768
    mlp_width: int = 3072
    layers: int = 12
    vocabulary: int = 49408
    positions: int = 77


@dataclass(frozen=True)
class T5Geometry:
    """Sizes of a T5 v1.1 encoder. The defaults are T5-XXL's."""

    width: int = 4096
    mlp_width: int = 10240
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    vocabulary: int = 32128
    buckets: int = 32  # relative positions


@dataclass(frozen=True)
class TextEmbedding:
    tokens: Tensor  # T5 states [1, words, width]
    pooled: Tensor  # CLIP vector [1, width]
    guidance: float | None = None  # where it has one of its own

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.pooled.nbytes


@dataclass(frozen=True)
class TextEncoders:
    """CLIP-L and T5 in one module with children `clip` and `t5`, and their tokenizers."""

    weights: OffloadedModule
    patcher: Patcher
    clip_tokenizer: Any
    t5_tokenizer: Any
    _remembered: OrderedDict[tuple[Segments, int], TextEmbedding] = field(
        default_factory=OrderedDict, repr=False
    )

    def recall(self, prompt: str, words: int = T5_TOKENS) -> TextEmbedding | None:
        """The embedding of a prompt that was encoded before, or None."""
        key = weighted_segments(prompt), words
        if key in self._remembered:
            self._remembered.move_to_end(key)
        return self._remembered.get(key)

    def count(self, prompt: str) -> TokenCounts:
        """Raises ValueError when the prompt is too long."""
        segments = weighted_segments(prompt)
        return tokenize(segments, self.clip_tokenizer, self.t5_tokenizer).counts

    @property
    def t5_geometry(self) -> T5Geometry:
        config = self.weights.module.t5.config
        return T5Geometry(
            config.d_model, config.d_ff, config.num_layers, config.num_heads, config.d_kv,
            config.vocab_size, config.relative_attention_num_buckets,
        )  # fmt: skip

    @property
    def itemsize(self) -> int:
        return self.weights.module.t5.shared.weight.itemsize

    def encode(
        self,
        prompt: str,
        before_block: BeforeBlock | None = None,
        ring_bytes: int = 0,
        work: Work | None = None,
        words: int = T5_TOKENS,
    ) -> tuple[TextEmbedding, int]:
        """Run both encoders; the caller has made room on `patcher.device`.

        Weights other than 1 mean what they mean to ComfyUI: T5's vectors are moved along the line
        from those of an empty prompt, which is encoded too if it is not remembered; CLIP's pooled
        vector, all that Flux takes of CLIP, is left as it is. words: T5's tokens at least.
        Returns the embedding, on the CPU, and the bytes of weights that were moved.
        Raises ValueError when the prompt is too long.
        """
        segments, moved_bytes = weighted_segments(prompt), 0
        text = tokenize(segments, self.clip_tokenizer, self.t5_tokenizer, words)
        if prompt:
            log.info("%s", text.counts)
        empty = None
        if any(weight != 1 for weight in text.weights):
            empty = self.recall("", len(text.t5))
            if empty is None:
                given = (before_block, ring_bytes, work, len(text.t5))
                empty, moved_bytes = self.encode("", *given)
        device, module, work = self.patcher.device, self.weights.module, work or Work()
        visits = self.weights.running_on(device, before_block, 1, ring_bytes, work)
        with visits as stream, _attempted(module, work):
            clip_ids = torch.tensor([text.clip], device=device)
            pooled, _ = work.attempt(lambda: module.clip(clip_ids))
            t5_ids = torch.tensor([text.t5], device=device)
            tokens = work.attempt(lambda: module.t5(t5_ids))
            embedding = TextEmbedding(tokens.cpu(), pooled.cpu())
        if empty is not None:
            embedding = replace(
                embedding, tokens=_weighted(embedding.tokens, empty.tokens, text.weights)
            )
        self._remembered[segments, words] = embedding
        while sum(known.nbytes for known in self._remembered.values()) > REMEMBERED_BYTES:
            self._remembered.popitem(last=False)
        return embedding, moved_bytes + stream.moved_bytes


def build_text_encoders(
    clip_geometry: ClipGeometry, t5_geometry: T5Geometry, dtype: torch.dtype
) -> OffloadedModule:
    """Both encoders with uninitialised weights, as one component.

    T5's matrices travel one by one, CLIP's layers too. The tables of token vectors stay at home.
    """
    from diffsynth.core.vram.initialization import skip_model_initialization

    with skip_model_initialization():
        clip: Any = _build_clip(clip_geometry).to(dtype)
        t5 = _build_t5(t5_geometry).to(dtype)
    t5.shared = HomeEmbedding(t5.shared)
    t5.encoder.embed_tokens = t5.shared  # one table under two names
    clip.token_embedding = HomeEmbedding(clip.token_embedding)
    both = nn.ModuleDict({"clip": clip, "t5": t5})
    blocks = [[layer] for layer in clip.encoders]
    for layer in t5.encoder.block:
        attention, mlp = layer.layer[0].SelfAttention, layer.layer[1].DenseReluDense
        blocks += [[attention.q], [attention.k], [attention.v], [attention.o]]
        blocks += [[mlp.wi_0], [mlp.wi_1], [mlp.wo]]
    return OffloadedModule(both, blocks, at_home=[clip.token_embedding, t5.shared])


@contextmanager
def _attempted(both: Any, work: Work) -> Iterator[None]:
    """Each layer of CLIP, and each attention and feed forward of T5, is an attempt of its own."""
    of_t5 = (layer for block in both.t5.encoder.block for layer in block.layer)
    layers = [*both.clip.encoders, *of_t5]
    for layer in layers:
        layer.forward = partial(_attempt, work, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _attempt(work: Work, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return work.attempt(lambda: forward(*args, **kwargs))


class HomeEmbedding(nn.Module):
    """A table whose rows are looked up in CPU memory, where it stays."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.weight = table.weight

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input.to(self.weight.device), self.weight).to(input.device)


def _build_clip(g: ClipGeometry) -> nn.Module:
    from diffsynth.models.flux_text_encoder_clip import CLIPEncoderLayer, FluxTextEncoderClip

    clip = FluxTextEncoderClip(g.width, g.vocabulary, g.positions, 0, g.mlp_width)
    # DiffSynth's own layers would have 12 heads at every width.
    heads = g.width // CLIP_HEAD_DIM
    clip.encoders.extend(
        CLIPEncoderLayer(g.width, g.mlp_width, heads, CLIP_HEAD_DIM) for _ in range(g.layers)
    )
    return clip


def _build_t5(g: T5Geometry) -> Any:
    from diffsynth.models.flux_text_encoder_t5 import FluxTextEncoderT5
    from transformers import T5Config, T5EncoderModel

    class SizedT5(FluxTextEncoderT5):
        def __init__(self) -> None:
            config = T5Config(
                vocab_size=g.vocabulary,
                d_model=g.width,
                d_kv=g.head_dim,
                d_ff=g.mlp_width,
                num_layers=g.layers,
                num_heads=g.heads,
                relative_attention_num_buckets=g.buckets,
                feed_forward_proj="gated-gelu",
                use_cache=False,
            )
            T5EncoderModel.__init__(self, config)  # the parent's builds T5-XXL only

    return SizedT5()


def _weighted(tokens: Tensor, empty: Tensor, weights: list[float]) -> Tensor:
    """tokens, empty: [1, words, width]; weights: of each word. As ComfyUI's
    `ClipTokenWeightEncoder`, in float32."""
    weight = torch.tensor(weights)[:, None]
    moved = (tokens.float() - empty.float()) * weight + empty.float()
    return torch.where(weight == 1, tokens, moved.to(tokens.dtype))
