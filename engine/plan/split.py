"""How the memory of a budget is divided between weights that stay, a ring and values."""

from collections.abc import Sequence

from ..offload.weight_sizes import WeightSizes
from .device import DeviceProfile
from .plan import StagePlan

# Of the weights of a pass, that must stay for the others to travel while the card computes: the
# fastest card with the fewest lanes for each FLOP, an H200, copies all of them in two steps.
SHARE_UNNOTICED = 0.5
RING_BLOCKS = 3  # of the largest size: one computes, one waits, one is being copied


def split_budget(
    name: str,
    weights: WeightSizes,
    choices: Sequence[tuple[int, int]],
    budget: int | None,
    profile: DeviceProfile,
    least: int | None = None,
    stay: bool = True,
    grouped: Sequence[tuple[int, int, int]] = (),
    repeating: bool = False,
) -> StagePlan:
    """choices: (tokens at once, bytes of values), from the roomiest to the tightest; least: bytes
    of values that would do; stay: whether weights may become resident; grouped: the same with
    groups of heads, from the fewest to the most; repeating: whether fewer tokens at once cost time
    themselves."""
    passing = sum(block.nbytes for block in weights.blocks)
    largest = weights.largest_bytes
    tightest = min(values for _, values in choices)
    least = min([tightest, *(values for _, values, _ in grouped)]) if least is None else least

    def needed(values: int, kept: int = weights.root.nbytes + largest) -> int:
        return kept + values + profile.overhead(values)

    def all_stay(tokens: int, values: int) -> StagePlan:
        overhead, resident = profile.overhead(values), weights.travelling_bytes
        return StagePlan(name, budget, values, overhead, 0, resident, 0, 0, tokens, smallest)

    smallest, groups = needed(least), 1
    if budget is None:
        return all_stay(*choices[0])

    # Everything at once where so many weights stay beside it that the others travel unnoticed, or
    # where fewer tokens cost time, if the ring has its room; else the largest chunks that cost no
    # residency, because attention decides the peak anyway. Groups of heads only where it must be.
    blocks = min(RING_BLOCKS, len(weights.blocks))
    beside = weights.root.nbytes + blocks * largest
    beside += 0 if repeating else int(SHARE_UNNOTICED * passing)
    tokens, values = next(
        (tokens, values) for tokens, values in choices
        if values <= tightest or (stay and needed(values, beside) <= budget)
    )  # fmt: skip
    if grouped and needed(values) > budget:
        tokens, values, groups = next((c for c in grouped if needed(c[1]) <= budget), grouped[-1])
    overhead = profile.overhead(values)
    left = budget - values - overhead
    if stay and weights.travelling_bytes <= left:
        return all_stay(tokens, values)
    ring = max(largest, min(blocks * largest, left - weights.root.nbytes))
    kept = {*weights.fitting(left - ring if stay else weights.root.nbytes)}
    resident = max(weights.root.nbytes, sum(block.footprint for block in kept))
    visiting = sum(block.nbytes for block in weights.blocks if block not in kept)
    once = sum(block.nbytes for block in weights.once if block not in kept)
    return StagePlan(
        name, budget, values, overhead, ring, resident, visiting, once, tokens, smallest, groups
    )
