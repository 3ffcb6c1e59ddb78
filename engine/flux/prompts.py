"""Prompt -> weighted texts -> token ids, by ComfyUI's rules (its `comfy/sd1_clip.py`)."""

import math
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ...messages import say
from ..errors import TooManyCharactersError, TooManyTokensError

CLIP_TOKENS = 77  # with those that mark start and end
T5_TOKENS = 512  # at least, with the one that marks the end
T5_MULTIPLE = 256  # of the tokens of a longer prompt
MOST_T5_TOKENS = 4096  # T5's attention then takes 11 GB: it grows with the square of the tokens
MOST_CHARACTERS = 2**16  # of a prompt; as many T5 tokens have fewer in any language that it knows
EMPHASIS = 1.1  # of brackets without a number
WHOLE_TOKENS = 8  # CLIP's room for a text ends before it, not within it, if it is shorter than this
Segments = tuple[tuple[str, float], ...]  # texts and their weights
Part = tuple[int, int, int | None, float]  # start, end, number of the bracket at its start, weight
BRACKET = re.compile(r"\\[()]|[()]")
LORA = re.compile(r"<(?:lora|lyco):([^<>:\n]+)(?::[^<>\n]*)?>", re.IGNORECASE)  # as A1111 adds one


def require_length(prompt: str) -> None:
    """Raise TooManyCharactersError for a prompt that is too long to be looked at."""
    if len(prompt) > MOST_CHARACTERS:
        raise TooManyCharactersError(characters=len(prompt), most=MOST_CHARACTERS)


def weighted_segments(prompt: str) -> Segments:
    r"""The parts of a prompt and their weights.

    `(text)` multiplies the weight of what surrounds it by 1.1, `(text:1.3)` sets its own, `\(` and
    `\)` are brackets of the text. Brackets without partner are read as ComfyUI reads them. Other
    than there, neighbours of weight 1 are one text, so that weights of 1 equal no weights, and
    `inf` and `nan` are text.
    """
    texts: list[tuple[list[str], float]] = []
    for text, weight in _weighted(prompt):
        if not (texts and texts[-1][1] == weight == 1):
            texts.append(([], weight))
        texts[-1][0].append(re.sub(r"\\([()])", r"\1", text))
    return tuple(("".join(parts), weight) for parts, weight in texts)


def _weighted(prompt: str) -> Iterator[tuple[str, float]]:
    """The parts as they are written. Each bracket is looked at once, however deep it is nested."""
    brackets = [*BRACKET.finditer(prompt)]
    at = [bracket.end() - 1 for bracket in brackets]
    number = {place: n for n, place in enumerate(at)}
    partner, unclosed = _pairs(brackets)

    def inside(low: int, high: int, n: int, weight: float) -> Iterator[Part]:
        """The outermost brackets and what lies between them; n: the first of the brackets."""
        while n < len(at) and at[n] < high:
            alone = bool(unclosed) and n == unclosed[0]
            if not alone and (brackets[n][0] != "(" or n not in partner):
                n += 1
                continue
            if at[n] > low:
                yield low, at[n], None, weight
            if alone:
                yield at[n], high, n, weight
                return
            low = at[partner[n]] + 1
            yield at[n], low, n, weight
            n = partner[n] + 1
        if low < high:
            yield low, high, None, weight

    waiting = [*inside(0, len(prompt), 0, 1.0)][::-1]
    while waiting:  # no recursion: brackets may be nested deeper than Python's calls
        low, high, n, weight = waiting.pop()
        last = number.get(high - 1)
        if n is None or last is None or brackets[last][0] != ")":
            yield prompt[low:high], weight
            continue
        if unclosed and n == unclosed[0]:  # it takes the last one, whose own partner then has none
            unclosed.popleft()
            unclosed.append(partner[last])
        colon = prompt.rfind(":", at[last - 1] + 1, high - 1)
        own = _number(prompt[colon + 1 : high - 1]) if colon > low + 1 else None
        high, weight = (high - 1, weight * EMPHASIS) if own is None else (colon, own)
        waiting += [*inside(low + 1, high, n + 1, weight)][::-1]


def _pairs(brackets: Sequence[re.Match[str]]) -> tuple[dict[int, int], deque[int]]:
    """The number of each bracket's partner, and those that are opened and never closed.

    After one that closes none, ComfyUI takes the next that opens for text.
    """
    partner: dict[int, int] = {}
    opened: list[int] = []
    depth = 0
    for n, bracket in enumerate(brackets):
        if bracket[0] == "(":
            depth += 1
            if depth > 0:
                opened.append(n)
        elif bracket[0] == ")":
            depth -= 1
            if depth >= 0:
                other = opened.pop()
                partner[n], partner[other] = other, n
    return partner, deque(opened)


def _number(text: str) -> float | None:
    try:
        return number if math.isfinite(number := float(text)) else None
    except ValueError:
        return None


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a prompt, besides those that mark its start and end and fill it up.

    clip, t5: as the two encoders split it; clip_read: of those, what CLIP-L has room for; unread:
    characters that T5's vocabulary has no entry for, as most Chinese, of so many characters; loras:
    names in what other programs take for LoRAs to add, and this one, as ComfyUI, for text.
    """

    clip: int
    t5: int
    clip_read: int
    unread: int = 0
    characters: int = 0
    loras: tuple[str, ...] = ()

    @property
    def text_tokens(self) -> int:
        """Length of T5's part of the embedding."""
        return max(T5_TOKENS, -(-(self.t5 + 1) // T5_MULTIPLE) * T5_MULTIPLE)

    def __str__(self) -> str:
        values = {"read": self.clip_read, "clip": self.clip, "t5": self.t5}
        if self.clip_read < self.clip:
            return say("CLIP-L read {read} of {clip} tokens, T5 all {t5}", **values)
        return say("CLIP-L read all {clip} tokens, T5 all {t5}", **values)

    @property
    def warning(self) -> str:
        """Of what is lost or misunderstood; "" when nothing is."""
        unread = loras = ""
        if self.unread:
            unread = say(
                "T5 could not read {unread} of {characters} characters: write the prompt in "
                "English, or put translate prompt before it.",
                unread=self.unread,
                characters=self.characters,
            )
        if self.loras:
            loras = say(
                "{names} in the prompt was read as words, as ComfyUI does: no LoRA is added by it. "
                "Add one with the LoRA node.",
                names=", ".join(f"<lora:{name}>" for name in self.loras),
            )
        return "\n".join(filter(None, [unread, loras]))


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
    clip_tokens: int = CLIP_TOKENS,
    before_text: Callable[[], None] = lambda: None,
) -> Tokens:
    """Ids for both encoders. Each segment is split by itself.

    CLIP reads what fits into its `clip_tokens`, 248 of LongCLIP, as in ComfyUI, where Flux takes
    the vector of the first so many. T5 reads all. before_text: called before each segment, and may
    raise. Raises TooManyTokensError for more than MOST_T5_TOKENS.
    """
    clip: list[list[int]] = []
    t5: list[list[int]] = []
    for text, _ in segments:
        before_text()
        for tokenizer, ids in ((clip_tokenizer, clip), (t5_tokenizer, t5)):
            ids.append(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    read = _what_fits(clip, clip_tokens - 2)
    t5_ids = [*chain(*t5)]
    unread = 0
    whole = "".join(text for text, _ in segments)
    if t5_tokenizer.unk_token_id in t5_ids:
        unread = sum(
            times
            for character, times in Counter(whole).items()
            if t5_tokenizer.unk_token_id in t5_tokenizer(character).input_ids
        )
    characters = sum(not character.isspace() for character in whole)
    loras = tuple(dict.fromkeys(LORA.findall(whole)))
    counts = TokenCounts(sum(map(len, clip)), len(t5_ids), len(read), unread, characters, loras)
    if counts.text_tokens > MOST_T5_TOKENS:
        raise TooManyTokensError(tokens=counts.t5, most=MOST_T5_TOKENS - 1)
    start, end = clip_tokenizer("").input_ids
    weights = [weight for (_, weight), ids in zip(segments, t5, strict=True) for _ in ids]
    return Tokens(
        filled([start, *read, end], clip_tokens, clip_tokenizer.pad_token_id),
        filled(
            [*t5_ids, *t5_tokenizer("").input_ids], counts.text_tokens, t5_tokenizer.pad_token_id
        ),
        filled(weights, counts.text_tokens, 1.0),
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


def filled(values: list, length: int, value: Any) -> list:
    return values + [value] * (length - len(values))
