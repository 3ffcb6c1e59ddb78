"""`--help` in the user's language, in as many columns as the terminal has."""

import re
from argparse import Action, HelpFormatter
from collections.abc import Iterable
from textwrap import TextWrapper
from typing import Any
from unicodedata import east_asian_width

from ..messages import later, say

# The words of argparse on a page.
WORDS = (
    later("options"),
    later("positional arguments"),
    later("show this help message and exit"),
)

# What stays on one line: a word, or a character of a script without spaces, with the brackets
# before it, and behind it whatever never begins a line.
PIECE = re.compile(
    r"\s+|[（「『“‘]*(?:[!-\u1fff]+|\S)[、。，．；：！？）」』”’…ァィゥェォッャュョー]*"
)


class Help(HelpFormatter):
    """Looks up each text when a page is shown; in English, the page is argparse's own."""

    def add_usage(
        self, usage: str | None, actions: Iterable[Action], groups: Any, prefix: str | None = None
    ) -> None:
        prefix = _Cells(say("usage: ")) if prefix is None else prefix
        super().add_usage(usage, actions, groups, prefix)

    def start_section(self, heading: str | None) -> None:
        super().start_section(heading and say(heading))

    def add_text(self, text: str | None) -> None:
        super().add_text(text and say(text))

    def _get_help_string(self, action: Action) -> str | None:
        return action.help and say(action.help)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return super()._split_lines(text, width) if text.isascii() else _Wrapper(width).wrap(text)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.isascii():
            return super()._fill_text(text, width, indent)
        return "\n".join(indent + line for line in self._split_lines(text, width - len(indent)))


class _Cells(str):
    """As long as the cells that a terminal gives it, which may be two for an ambiguous one."""

    def __len__(self) -> int:
        return sum(2 if east_asian_width(letter) in "WFA" else 1 for letter in self)


class _Wrapper(TextWrapper):
    """Counts cells, and ends a line behind any wide character."""

    def _split(self, text: str) -> list[str]:
        return [_Cells(piece) for piece in PIECE.findall(text)]
