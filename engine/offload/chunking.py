"""How much a run computes at once, and what it does when memory is short."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import gcd
from typing import TypeVar

from ...messages import log

CHUNKS = (4096, 2048, 1024, 512, 256)  # tokens computed at once, besides all of them
GROUPS = (2, 4, 8)  # that the heads of an attention are divided into, besides one
ROW_MULTIPLE = 64  # of rows computed at once; what matrix units like
SHORT = "The card has less memory than planned; from here on %s."
Result = TypeVar("Result")


def split(tokens: slice, at_once: int) -> Iterator[slice]:
    """Parts of about the same length, the first the longest, none above `at_once`; 0: one part."""
    size = count = tokens.stop - tokens.start
    if at_once and count > at_once:
        parts = -(-count // at_once)
        size = -(-count // parts // ROW_MULTIPLE) * ROW_MULTIPLE
    for first in range(tokens.start, tokens.stop, size):
        yield slice(first, min(first + size, tokens.stop))


@dataclass
class Chunking:
    """What a run computes at once; it becomes less when memory is short, for the rest of the run.

    tokens: in what is not attention; 0: all of them. groups: of heads, one attention after another.
    relieve: frees device memory and returns True, or returns False when it has none to free.
    make_way: takes the bytes that are about to be allocated, where no hole may be large enough.
    """

    tokens: int = 0
    groups: int = 1
    relieve: Callable[[], bool] | None = None
    make_way: Callable[[int], None] | None = None
    longest: int = field(default=0, init=False)  # stretch of tokens that was done in chunks

    def heads_at_once(self, heads: int) -> int:
        """How many of so many heads attend at once; divides them."""
        return heads // gcd(heads, self.groups)

    def for_each(self, tokens: slice, part: Callable[[slice], object]) -> None:
        """`part` for all tokens, in chunks, each of them tried again when memory is short."""
        first = tokens.start
        self.longest = max(self.longest, tokens.stop - tokens.start)

        def following() -> int:
            some = next(split(slice(first, tokens.stop), self.tokens))
            part(some)
            return some.stop

        while first < tokens.stop:
            first = self.retry(following)

    def retry(self, part: Callable[[], Result], less: Callable[[], bool] | None = None) -> Result:
        """Do `part`, again when it ran out of memory and some could be freed, or else when there is
        less to do at once: by `less`, which returns whether there is, or fewer tokens.

        `part` changes nothing before all its memory is there, so it can be repeated.
        """

        while True:
            try:
                return part()
            except RuntimeError as error:
                # Here, because the plan, which comes without PyTorch, uses this module.
                from ..allocator import is_out_of_memory

                if not is_out_of_memory(error):
                    raise
                # Out of `except`, which keeps the failed part's tensors alive.
            freed = self.relieve is not None and self.relieve()
            if not freed and not (less or self.fewer_tokens)():
                return part()

    def fewer_tokens(self) -> bool:
        """The next smaller chunks; False: there are none, or nothing has been done in chunks."""
        now = min(self.tokens or self.longest, self.longest)
        fewer = next((chunk for chunk in CHUNKS if chunk < now), None)
        if fewer is None:
            return False
        self.tokens = fewer
        log.warning(SHORT, f"{fewer} tokens are computed at once")
        return True

    def fewer_heads(self, heads: int) -> bool:
        """More groups; False: so many heads can be divided into no more."""
        now = gcd(heads, self.groups)
        more = next((n for n in GROUPS if gcd(heads, n) > now), None)
        if more is None:
            return False
        self.groups = more
        log.warning(SHORT, f"heads attend in {more} groups")
        return True
