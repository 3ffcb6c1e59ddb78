"""The plan of the text encoders."""

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
) -> StagePlan:
    """Both encoders; one prompt of so many T5 tokens.

    They visit unless there is room for `others_bytes` of the other components' weights too: they
    run once a prompt, and what made room for them would have to come back.
    """
    scores = t5.heads * text_tokens**2
    # The position bias, and the scores in float32 before and after the softmax: no fused attention
    # takes a bias everywhere.
    values = scores * (itemsize + 2 * 4) + text_tokens * (t5.width + 4 * t5.mlp_width) * itemsize
    values += adapter_bytes
    phase = split_budget(TEXT, weights, [(0, values)], budget, profile)
    if budget is None or phase.peak + others_bytes <= budget:
        return phase
    return split_budget(TEXT, weights, [(0, values)], budget, profile, stay=False)
