"""The frame of a prompt: what is Chinese in it is translated, and all the rest stays as it is.

The rest is English and other Latin words, numbers that stand alone, brackets and their weights,
line breaks, quoted text (which is to be painted as it is), LoRAs in angle brackets, the names of
wildcards and embeddings, and Japanese.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from enum import Enum

MOST_QUOTED = 300  # characters; what is longer is no quotation
MOST_AT_ONCE = 120  # characters of a clause: what has no punctuation is cut there
MOST_CLAUSES = 12  # of what is translated as a sentence

LETTER = (  # of Chinese, and of Japanese, which has kana between the same characters
    "[\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    "\u3041-\u3096\u30a1-\u30fc]"
)
JAPANESE = "[\u3041-\u306d\u306f-\u3096\u30a1-\u30fa\u30fc]"  # kana but の and ・, also Chinese
QUOTED = "|".join(
    [
        *(
            rf"{first}[^{first}{last}\n]{{0,{MOST_QUOTED}}}{last}"
            for first, last in ('""', "“”", "‘’", "「」", "『』", "<>")
        ),
        # With no letter beside it, as an apostrophe has one.
        rf"(?<![A-Za-z0-9])'[^'\n]{{1,{MOST_QUOTED}}}'(?![A-Za-z0-9])",
    ]
)
# Full-width signs, and what T5 can read in their place. A space follows the first ones.
STOPS = {"，": ",", "、": ",", "。": ".", "；": ";", "！": "!", "？": "?"}
PLAIN = {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
PLAIN |= {**STOPS, "【": "[", "】": "]", "〔": "[", "〕": "]", "\u3000": " "}
SIGNS = f"[{re.escape(''.join(PLAIN))}]"
SIGN_OR_QUOTED = re.compile(f"(?P<sign>{SIGNS})|{QUOTED}")

# Of Chinese: digits and lone letters that touch it ("8K画质", "T恤"), and signs within names.
WITHIN = rf"(?:{LETTER}|[0-9%·《》〈〉—~]|[.-](?=[0-9])|(?<![A-Za-z])[A-Za-z](?![A-Za-z0-9]))"
CLAUSE = (
    rf"(?:[《〈]|(?<![A-Za-z0-9.])[0-9]{{0,8}}(?:\.[0-9]{{1,4}})?[A-Za-z]?(?={LETTER}))?"
    rf"{LETTER}{WITHIN}{{0,{MOST_AT_ONCE}}}"
)
NAMED = r"__(?:(?!__)[^\n]){1,100}__|embedding:[^\s,()]+"  # a wildcard, an embedding
KEPT = rf"{QUOTED}|{NAMED}|:[ ]*[-+]?[0-9.]+[ ]*(?=\))|[A-Za-z][A-Za-z0-9_.'’+-]*[A-Za-z0-9]"
BEFORE_A_GAP = re.compile(r"[\w)\]}>,.;:!?%”’」』\"']")
AFTER_A_GAP = re.compile(r"[\w(\[{<“‘「『\"']|\\\(")
ENDS = " .。!！"  # of a translation, which makes a sentence of every clause
NO_BRACKETS = str.maketrans("", "", "()[]{}<>\\")  # of a translation: they would be weights,
WEIGHT = re.compile(r":(?= *[-+]?[0-9.]+$)")  # as would the end of "3:30" be, in brackets


class Unit(Enum):
    """What is translated at once, as a pattern."""

    CLAUSE = CLAUSE
    SENTENCE = rf"{CLAUSE}(?:[,;: ]{{1,2}}{CLAUSE}){{0,{MOST_CLAUSES}}}"


def has_chinese(text: str) -> bool:
    """Whether anything of it is to be translated."""
    return any(is_chinese for _, is_chinese in _pieces(plain(text), Unit.CLAUSE))


def translated(prompt: str, translate: Callable[[Sequence[str]], Sequence[str]], unit: Unit) -> str:
    """The prompt with its Chinese in English.

    translate: called once with all that is Chinese, a text for each unit, and gives as many in
    English; not called where nothing is. A prompt without Chinese and without full-width signs
    comes back as it is, byte for byte.
    """
    pieces = [*_pieces(plain(prompt), unit)]
    chinese = [text for text, is_chinese in pieces if is_chinese]
    english = iter(translate(chinese)) if chinese else iter(())
    found, after_translated = "", False
    for text, is_chinese in pieces:
        text = _without_weights(next(english)) if is_chinese else text
        beside = is_chinese or after_translated
        if beside and BEFORE_A_GAP.match(found[-1:]) and AFTER_A_GAP.match(text):
            found += " "
        found += text
        after_translated = is_chinese
    return found


def _without_weights(english: str) -> str:
    return WEIGHT.sub(" ", english.translate(NO_BRACKETS).strip(ENDS))


def plain(prompt: str) -> str:
    """The prompt with its full-width signs in their plain forms, but for those in quotes."""
    return SIGN_OR_QUOTED.sub(_plain, prompt)


def _plain(match: re.Match[str]) -> str:
    sign = match["sign"]
    if sign is None:
        return match[0]
    following = match.string[match.end() : match.end() + 1]
    gap = sign in STOPS and AFTER_A_GAP.match(PLAIN.get(following, following))
    return PLAIN[sign] + " " if gap else PLAIN[sign]


def _pieces(prompt: str, unit: Unit) -> Iterator[tuple[str, bool]]:
    """The prompt in pieces, and whether each is Chinese."""
    end = 0
    for match in re.finditer(rf"(?:{KEPT})|(?P<chinese>{unit.value})", prompt):
        if match["chinese"] is None:
            continue
        if match.start() > end:
            yield prompt[end : match.start()], False
        yield match["chinese"], re.search(JAPANESE, match["chinese"]) is None
        end = match.end()
    if end < len(prompt):
        yield prompt[end:], False
