"""Which steps of a run need not be computed.

Importing it imports no torch: the nodes list these names when ComfyUI starts.
"""

from dataclasses import dataclass

from ..errors import ReusedStepError

WARM_UP, WARM_UP_SHARE = 4, 0.2  # steps that are computed first: at least so many, and such a share
COMPARED = 8  # one of so many tokens of the image is compared
AT_ONCE = 1024  # tokens of what is kept, on their way between card and host


@dataclass(frozen=True)
class Reuse:
    """Steps that compute the first block alone, and go on with what the others added before.

    threshold: how far what the first block adds may have gone from the last computed step, as a
    share of it; in_a_row: steps at most. chosen: exactly these steps, counted from 0, instead.
    """

    threshold: float = 0.0
    in_a_row: int = 0
    chosen: tuple[int, ...] | None = None

    def decisions(self, steps: int) -> list[bool | None]:
        """Of each step whether it is computed; None where its first block is to decide.

        Raises ReusedStepError for a chosen step that is not in the run, or its first.
        """
        if self.chosen is not None:
            for step in self.chosen:
                if not 0 < step < steps:
                    raise ReusedStepError(step=step, steps=steps, last=steps - 1)
            return [step not in self.chosen for step in range(steps)]
        first = max(WARM_UP, round(WARM_UP_SHARE * steps))
        return [None if first <= step < steps - 1 else True for step in range(steps)]


REUSES: dict[str, Reuse | None] = {
    "off": None,
    "mild": Reuse(threshold=0.12, in_a_row=2),
    "fast": Reuse(threshold=0.16, in_a_row=3),
}
