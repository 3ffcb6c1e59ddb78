"""Prompt -> weighted texts -> token ids, by ComfyUI's rules (its `comfy/sd1_clip.py`)."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ..messages import say

CLIP_TOKENS = 77  # with those that mark start and end
T5_TOKENS = 512  # at least, with the one that marks the end
T5_MULTIPLE = 256  # of the tokens of a longer prompt
MOST_T5_TOKENS = 4096  # T5's attention then takes 11 GB: it grows with the square of the tokens
EMPHASIS = 1.1  # of brackets without a number
WHOLE_TOKENS = 8  # CLIP's room for a text ends before it, not within it, if it is shorter than this

Segments = tuple[tuple[str, float], ...]  # texts and their weights
BRACKET = re.compile(r"\\[()]|[()]")


def weighted_segments(prompt: str) -> Segments:
    r"""The parts of a prompt and their weights.

    `(text)` multiplies the weight of what surrounds it by 1.1, `(text:1.3)` sets its own, `\(` and
    `\)` are brackets of the text. Brackets without partner are read as ComfyUI reads them. Other
    than there, neighbours of weight 1 are one text, so that weights of 1 equal no weights, and
    `inf` and `nan` are text.
    """
    segments: list[tuple[str, float]] = []
    waiting = [(part, 1.0) for part in _parts(prompt)][::-1]
    while waiting:  # no recursion: brackets may be nested deeper than Python's calls
        text, weight = waiting.pop()
        if text[0] == "(" and text[-1] == ")" and not text.endswith("\\)"):
            inside, weight = _weight_of(text[1:-1], weight)
            waiting += [(part, weight) for part in _parts(inside)][::-1]
            continue
        text = re.sub(r"\\([()])", r"\1", text)
        if segments and segments[-1][1] == weight == 1:
            text = segments.pop()[0] + text
        segments.append((text, weight))
    return tuple(segments)


def _parts(text: str) -> Iterator[str]:
    """The outermost brackets and what lies between them, none of it empty."""
    depth = start = 0
    for bracket in BRACKET.finditer(text):
        if bracket[0] == "(":
            if depth == 0 and bracket.start() > start:
                yield text[start : bracket.start()]
                start = bracket.start()
            depth += 1
        elif bracket[0] == ")":
            depth -= 1
            if depth == 0:
                yield text[start : bracket.end()]
                start = bracket.end()
    if start < len(text):
        yield text[start:]


def _weight_of(inside: str, around: float) -> tuple[str, float]:
    text, _, number = inside.rpartition(":")
    try:
        if text and math.isfinite(weight := float(number)):
            return text, weight
    except ValueError:
        pass
    return inside, around * EMPHASIS


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a prompt, besides those that mark its start and end and fill it up.

    clip, t5: as the two encoders split it; clip_read: of those, what CLIP-L has room for; unknown:
    of T5's, those that its vocabulary has no entry for.
    """

    clip: int
    t5: int
    clip_read: int
    unknown: int = 0

    @property
    def words(self) -> int:
        """Length of T5's part of the embedding."""
        return max(T5_TOKENS, -(-(self.t5 + 1) // T5_MULTIPLE) * T5_MULTIPLE)

    def __str__(self) -> str:
        values = {"read": self.clip_read, "clip": self.clip, "t5": self.t5}
        if self.clip_read < self.clip:
            text = say("CLIP-L read {read} of {clip} tokens, T5 all {t5}", **values)
        else:
            text = say("CLIP-L read all {clip} tokens, T5 all {t5}", **values)
        if not self.unknown:
            return text
        # As most Chinese, which only CLIP-L spells out then.
        return say(
            "{counts}, {unknown} of them unknown to it (T5 knows English)",
            counts=text,
            unknown=self.unknown,
        )


@dataclass(frozen=True)
class Tokens:
    """clip: 77 ids, or LongCLIP's 248; t5: ids; weights: of each of T5's."""

    clip: list[int]
    t5: list[int]
    weights: list[float]
    counts: TokenCounts


def tokenize(
    segments: Segments,
    clip_tokenizer: Any,
    t5_tokenizer: Any,
    words: int = T5_TOKENS,
    clip_words: int = CLIP_TOKENS,
) -> Tokens:
    """Ids for both encoders, T5's at least `words`. Each segment is split by itself.

    CLIP reads what fits into its `clip_words`, 248 of LongCLIP, as in ComfyUI, where Flux takes the
    vector of the first so many. T5 reads all. Raises ValueError for more than MOST_T5_TOKENS.
    """
    clip, t5 = (
        [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text, _ in segments]
        for tokenizer in (clip_tokenizer, t5_tokenizer)
    )
    read = _what_fits(clip, clip_words - 2)
    t5_ids = [*chain(*t5)]
    unknown = t5_ids.count(t5_tokenizer.unk_token_id)
    counts = TokenCounts(sum(map(len, clip)), len(t5_ids), len(read), unknown)
    if counts.words > MOST_T5_TOKENS:
        raise ValueError(
            say(
                "The prompt has {tokens} T5 tokens, more than the {most} that can be read. "
                "Shorten it.",
                tokens=counts.t5,
                most=MOST_T5_TOKENS - 1,
            )
        )
    start, end = clip_tokenizer("").input_ids
    words = max(words, counts.words)
    weights = [weight for (_, weight), ids in zip(segments, t5, strict=True) for _ in ids]
    return Tokens(
        _filled([start, *read, end], clip_words, clip_tokenizer.pad_token_id),
        _filled([*t5_ids, *t5_tokenizer("").input_ids], words, t5_tokenizer.pad_token_id),
        _filled(weights, words, 1.0),
        counts,
    )


def _what_fits(texts: list[list[int]], room: int) -> list[int]:
    read: list[int] = []
    for ids in texts:
        left = room - len(read)
        if len(ids) <= left or len(ids) >= WHOLE_TOKENS:
            read += ids[:left]
        if len(ids) > left:
            break
    return read


def _filled(values: list, length: int, value: Any) -> list:
    return values + [value] * (length - len(values))
