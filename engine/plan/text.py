"""The plan of the text encoders."""

from dataclasses import replace

from ..flux.geometry import T5Geometry
from ..flux.prompts import T5_TOKENS
from ..offload.weight_sizes import WeightSizes
from .device import DeviceProfile
from .plan import TEXT, StagePlan
from .split import split_budget


def plan_text(
    weights: WeightSizes,
    t5: T5Geometry,
    itemsize: int,
    budget: int | None,
    profile: DeviceProfile,
    others_bytes: int = 0,
    text_tokens: int = T5_TOKENS,
    adapter_bytes: int = 0,
    prompts: int = 1,
) -> StagePlan:
    """Both encoders; one prompt of so many T5 tokens, or as many of `prompts` in one visit as there
    is room for.

    They visit unless there is room for `others_bytes` of the other components' weights too: they
    run once a prompt, and what made room for them would have to come back.
    """
    scores = t5.heads * text_tokens**2
    # The position bias, and the scores in float32 before and after the softmax: no fused attention
    # takes a bias everywhere.
    values = scores * (itemsize + 2 * 4) + text_tokens * (t5.width + 4 * t5.mlp_width) * itemsize
    values += adapter_bytes
    # Of each prompt beside the first: the states before and after the norm, and what its
    # attention or its feed forward holds until all have been through a matrix.
    inner = max(4 * t5.heads * t5.head_dim, 2 * t5.mlp_width)
    another = text_tokens * (2 * t5.width + inner) * itemsize

    def plan(at_once: int, stay: bool) -> StagePlan:
        all_values = values + (at_once - 1) * another
        given = (TEXT, weights, [(0, all_values)], budget, profile, values, stay)
        return replace(split_budget(*given), prompts=at_once)

    def fits(phase: StagePlan, stay: bool) -> bool:
        return budget is None or phase.peak + (others_bytes if stay else 0) <= budget

    stay = fits(plan(1, True), True)
    while prompts > 1 and not fits(plan(prompts, stay), stay):
        prompts //= 2
    return plan(prompts, stay)
