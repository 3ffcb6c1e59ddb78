"""How much a run computes at once, and what it does when memory is short."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

log = logging.getLogger("majicflux")

ROW_MULTIPLE = 64  # of rows computed at once; what matrix units like
Result = TypeVar("Result")


@dataclass(frozen=True)
class Work:
    """tokens: computed at once in what is not attention; 0: all of them.
    relieve: frees device memory and returns True, or returns False when it has none to free.
    """

    tokens: int = 0
    relieve: Callable[[], bool] | None = None

    def chunks(self, tokens: slice) -> Iterator[slice]:
        """Parts of about the same length, none longer than `self.tokens`."""
        count = tokens.stop - tokens.start
        if self.tokens and count > self.tokens:
            parts = -(-count // self.tokens)
            size = -(-count // parts // ROW_MULTIPLE) * ROW_MULTIPLE
        else:
            size = count
        for first in range(tokens.start, tokens.stop, size):
            yield slice(first, min(first + size, tokens.stop))

    def attempt(self, part: Callable[[], Result]) -> Result:
        """Do `part`, again when it ran out of memory and some could be freed.

        `part` changes nothing before all its memory is there, so it can be repeated.
        """
        while True:
            try:
                return part()
            except torch.OutOfMemoryError:
                if self.relieve is None:
                    raise
            if not self.relieve():  # out of `except`, which keeps the failed part's tensors alive
                return part()
