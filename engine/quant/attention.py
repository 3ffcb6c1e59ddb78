"""Which attention the blocks of a run take: PyTorch's, or comfy-kitchen's in 8 bits."""

from dataclasses import dataclass

from ...messages import say


@dataclass(frozen=True)
class Attention:
    """int8_from: the number of tokens from which on queries, keys, values and what they mix by are
    rounded to 8 bits, None for never; obstacle: why never, where it was asked for."""

    int8_from: int | None = None
    obstacle: str = ""

    def in_int8(self, tokens: int) -> bool:
        return self.int8_from is not None and tokens >= self.int8_from

    @property
    def report(self) -> str:
        """For the log and the canvas; "" where nothing was asked for."""
        if self.int8_from:
            return say("attention in int8 from {tokens} tokens on", tokens=self.int8_from)
        if self.int8_from is not None:
            return say("attention in int8")
        return self.obstacle and say("no attention in int8: {reason}", reason=self.obstacle)


PYTORCH = Attention()


class Attends:
    """A block whose attention is chosen for the length of a run."""

    attention = PYTORCH
