"""Prompt -> embeddings, by CLIP-L (pooled vector) and T5 (one vector per token)."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diffsynth_files import diffsynth_module
from ..errors import PromptWeightError
from ..offload.chunking import Chunking
from ..offload.offloaded_module import OffloadedModule
from ..offload.patcher import Patcher
from ..offload.prefetch import BeforeBlock
from ..offload.weight_block import CPU
from ..quant.adapters import beside_plain_layers
from ..quant.low_rank import Adapter
from .geometry import CLIP_HEAD_DIM, ClipGeometry, T5Geometry
from .picture_conditions import NO_PICTURES, PictureConditions
from .prompts import (
    T5_TOKENS,
    Segments,
    TokenCounts,
    Tokens,
    filled,
    require_length,
    tokenize,
    weighted_segments,
)
from .t5 import T5Encoder

log = logging.getLogger("majicflux")
REMEMBERED_READINGS = 64  # of prompts: a run has two, and a batch some that come soon
REMEMBERED_BYTES = 256 * 2**20  # of embeddings: 63 prompts of usual length in bfloat16


@dataclass(frozen=True)
class TextEmbedding:
    tokens: Tensor  # T5 states [1, text tokens, width]
    pooled: Tensor  # CLIP vector [1, width]
    guidance: float | None = None  # where it has one of its own
    guided: bool = True  # False: the transformer is told no guidance at all
    pictures: PictureConditions = NO_PICTURES

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.pooled.nbytes


@dataclass(frozen=True)
class TextEncoders:
    """CLIP-L and T5 in one module with children `clip` and `t5`, and their tokenizers.

    adapters: with their strengths, of which CLIP-L takes its terms.
    """

    weights: OffloadedModule
    patcher: Patcher
    clip_tokenizer: Any
    t5_tokenizer: Any
    adapters: tuple[tuple[Adapter, float], ...] = ()
    # Of these weights and tokenizers: others begin with nothing.
    _remembered: OrderedDict[tuple[Segments, int], TextEmbedding] = field(
        default_factory=OrderedDict, repr=False, init=False
    )
    _read: OrderedDict[str, tuple[Segments, Tokens]] = field(
        default_factory=OrderedDict, repr=False, init=False
    )

    def read(
        self, prompt: str, before_text: Callable[[], None] = lambda: None
    ) -> tuple[Segments, Tokens]:
        """The parts of a prompt and their tokens; of the last prompts they are remembered.

        before_text: called before each part, and may raise. Raises PromptTooLongError.
        """
        if prompt not in self._read:
            require_length(prompt)
            segments = weighted_segments(prompt)
            clip_tokens = self.weights.module.clip.position_embeds.shape[1]
            given = (self.clip_tokenizer, self.t5_tokenizer, clip_tokens, before_text)
            self._read[prompt] = segments, tokenize(segments, *given)
            if len(self._read) > REMEMBERED_READINGS:
                self._read.popitem(last=False)
        return self._read[prompt]

    def recall(self, prompt: str, text_tokens: int = T5_TOKENS) -> TextEmbedding | None:
        """The embedding of a prompt that was encoded before, or None."""
        key = self.read(prompt)[0], text_tokens
        if key in self._remembered:
            self._remembered.move_to_end(key)
        return self._remembered.get(key)

    def forget(self) -> None:
        """Encode all prompts anew."""
        self._remembered.clear()

    def count(self, prompt: str) -> TokenCounts:
        """Raises PromptTooLongError."""
        return self.read(prompt)[1].counts

    @property
    def pooled_width(self) -> int:
        return self.weights.module.clip.position_embeds.shape[2]

    @property
    def clip_geometry(self) -> ClipGeometry:
        return self.weights.module.clip.geometry

    @property
    def t5_geometry(self) -> T5Geometry:
        return self.weights.module.t5.geometry

    @property
    def itemsize(self) -> int:
        return self.weights.module.t5.shared.weight.itemsize

    def encode(self, prompt: str, **how: Any) -> tuple[TextEmbedding, int]:
        """`encode_together` of one prompt."""
        (embedding,), moved_bytes = self.encode_together([prompt], **how)
        return embedding, moved_bytes

    def encode_together(
        self,
        prompts: Sequence[str],
        along: Sequence[str] = (),
        before_block: BeforeBlock | None = None,
        ring_bytes: int = 0,
        chunking: Chunking | None = None,
        text_tokens: int = T5_TOKENS,
    ) -> tuple[list[TextEmbedding], int]:
        """Run both encoders, once for all prompts of a length, each of which is encoded as it would
        be alone; the caller has made room on `patcher.device`.

        Weights other than 1 mean what they mean to ComfyUI: T5's vectors are moved along the line
        from those of an empty prompt, which is encoded too if it is not remembered; CLIP's pooled
        vector, all that Flux takes of CLIP, is left as it is. along: others, to be remembered if
        they can be encoded. text_tokens: T5's at least.
        Returns the embeddings, on the CPU, and the bytes of weights that were moved.
        Raises PromptTooLongError or PromptWeightError.
        """
        before_text = before_block or (lambda: None)
        alike: dict[int, list[str]] = {}
        for prompt in dict.fromkeys([*prompts, *along]):
            text = self.read(prompt, before_text)[1]
            alike.setdefault(max(len(text.t5), text_tokens), []).append(prompt)
        found: dict[str, TextEmbedding | PromptWeightError] = {}
        moved_bytes = 0
        for length, some in alike.items():
            given = (some, length, text_tokens, before_block, ring_bytes, chunking)
            embeddings, moved = self._encode_alike(*given)
            found |= embeddings
            moved_bytes += moved
        return [_required(found[prompt]) for prompt in prompts], moved_bytes

    def _encode_alike(
        self,
        prompts: Sequence[str],
        length: int,
        text_tokens: int,
        before_block: BeforeBlock | None,
        ring_bytes: int,
        chunking: Chunking | None,
    ) -> tuple[dict[str, TextEmbedding | PromptWeightError], int]:
        """The same for prompts of `length` T5 tokens; the empty one is encoded with them where
        weights are measured from it. The error of a prompt is in the place of its embedding."""
        weights = {p: filled(self.read(p)[1].weights, length, 1.0) for p in prompts}
        weighted = any(weight != 1 for each in weights.values() for weight in each)
        empty = self.recall("", length) if weighted else None
        texts = [*prompts, *([""] if weighted and empty is None and "" not in prompts else [])]
        plain, moved_bytes = self._run(texts, length, before_block, ring_bytes, chunking)
        found: dict[str, TextEmbedding | PromptWeightError] = {}
        for prompt, embedding in plain.items():
            segments, text = self.read(prompt)
            if prompt:
                log.info("%s", " ".join(filter(None, [str(text.counts), text.counts.warning])))
            if prompt in weights and any(weight != 1 for weight in weights[prompt]):
                try:
                    embedding = _weighed(embedding, empty or plain[""], weights[prompt])
                except PromptWeightError as error:
                    found[prompt] = error
                    continue
            of_length = text_tokens if prompt in weights else length
            self._remembered[segments, of_length] = found[prompt] = embedding
        while sum(known.nbytes for known in self._remembered.values()) > REMEMBERED_BYTES:
            self._remembered.popitem(last=False)
        return {prompt: found[prompt] for prompt in prompts}, moved_bytes

    def _run(
        self,
        prompts: Sequence[str],
        length: int,
        before_block: BeforeBlock | None,
        ring_bytes: int,
        chunking: Chunking | None,
    ) -> tuple[dict[str, TextEmbedding], int]:
        """Of each prompt what both encoders give, without weights."""
        device, module, chunking = self.patcher.device, self.weights.module, chunking or Chunking()
        texts = [self.read(prompt)[1] for prompt in prompts]
        pad = self.t5_tokenizer.pad_token_id
        visits = self.weights.running_on(device, before_block, 1, ring_bytes, chunking)
        with visits as stream, _retried(module, chunking), ExitStack() as stack:
            beside = partial(beside_plain_layers, module, self.adapters, device)
            chunking.retry(lambda: stack.enter_context(beside()))
            clip_ids = torch.tensor([text.clip for text in texts], device=device)
            pooled, _ = chunking.retry(lambda: module.clip(clip_ids))
            t5_ids = torch.tensor([filled(text.t5, length, pad) for text in texts], device=device)
            tokens = chunking.retry(lambda: module.t5(t5_ids))
            both = zip(prompts, tokens.cpu().split(1), pooled.cpu().split(1), strict=True)
            # Each with memory of its own, which is free when it is forgotten.
            found = {prompt: TextEmbedding(t.clone(), p.clone()) for prompt, t, p in both}
        return found, stream.moved_bytes


def build_text_encoders(
    clip_geometry: ClipGeometry, t5_geometry: T5Geometry, dtype: torch.dtype
) -> OffloadedModule:
    """Both encoders with uninitialised weights, as one component.

    T5's matrices travel one by one, CLIP's layers too. The tables of token vectors stay on the
    host.
    """
    with torch.device("meta"):
        clip: Any = _sized_clip(clip_geometry).to(dtype)
        table = HostEmbedding(t5_geometry.vocabulary, t5_geometry.width)
        t5: Any = T5Encoder(t5_geometry, table).to(dtype)
    clip.attn_mask = clip.attention_mask(clip_geometry.positions)  # no parameter: it has values
    both = nn.ModuleDict({"clip": clip, "t5": t5})
    blocks = [[layer] for layer in clip.encoders]
    for layer in t5.encoder.block:
        attention, mlp = layer.layer[0].SelfAttention, layer.layer[1].DenseReluDense
        blocks += [[attention.q], [attention.k], [attention.v], [attention.o]]
        blocks += [[mlp.wi_0], [mlp.wi_1], [mlp.wo]]
    return OffloadedModule(both, blocks, on_host=[clip.token_embedding, t5.shared])


@contextmanager
def _retried(both: Any, chunking: Chunking) -> Iterator[None]:
    """Each layer of CLIP, and each attention and feed forward of T5, is an attempt of its own.

    Those of CLIP take the prompts of a batch one by one, as T5's do by themselves.
    """
    of_t5 = [layer for block in both.t5.encoder.block for layer in block.layer]
    layers = [*both.clip.encoders, *of_t5]
    for layer in both.clip.encoders:
        layer.forward = partial(_one_by_one, layer.forward)
    for layer in layers:
        layer.forward = partial(_retry, chunking, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _retry(chunking: Chunking, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return chunking.retry(lambda: forward(*args, **kwargs))


def _one_by_one(forward: Callable[..., Tensor], batch: Tensor, **named: Any) -> Tensor:
    return torch.cat([forward(each, **named) for each in batch.split(1)])


class HostEmbedding(nn.Module):
    """A table whose rows are looked up in CPU memory, where it stays."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input.to(self.weight.device), self.weight).to(input.device)


def _sized_clip(g: ClipGeometry) -> Any:
    """DiffSynth's CLIP of this geometry; its own constructor gives every width 12 heads."""
    theirs = diffsynth_module("models.flux_text_encoder_clip")
    heads = g.width // CLIP_HEAD_DIM

    class SizedClip(theirs.FluxTextEncoderClip):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.token_embedding = HostEmbedding(g.vocabulary, g.width)
            self.position_embeds = nn.Parameter(torch.empty(1, g.positions, g.width))
            self.encoders = nn.ModuleList(
                theirs.CLIPEncoderLayer(g.width, g.mlp_width, heads, CLIP_HEAD_DIM)
                for _ in range(g.layers)
            )
            self.final_layer_norm = nn.LayerNorm(g.width)
            self.geometry = g

    return SizedClip()


def _required(found: TextEmbedding | PromptWeightError) -> TextEmbedding:
    if isinstance(found, PromptWeightError):
        raise found
    return found


def _weighed(plain: TextEmbedding, empty: TextEmbedding, weights: list[float]) -> TextEmbedding:
    """Raises PromptWeightError when the weights leave no numbers."""
    tokens = _weighted(plain.tokens, empty.tokens, weights)
    if torch.isfinite(plain.tokens).all() and not torch.isfinite(tokens).all():
        raise PromptWeightError(weight=max(weights, key=abs))
    return replace(plain, tokens=tokens)


def _weighted(tokens: Tensor, empty: Tensor, weights: list[float]) -> Tensor:
    """tokens, empty: [1, text tokens, width]; weights: of each word. As ComfyUI's
    `ClipTokenWeightEncoder`, in float32."""
    weight = torch.tensor(weights, dtype=torch.float32, device=CPU)[:, None]
    moved = (tokens.float() - empty.float()) * weight + empty.float()
    return torch.where(weight == 1, tokens, moved.to(tokens.dtype))
