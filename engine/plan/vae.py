"""The plan of the VAE, in both directions."""

from dataclasses import replace
from functools import partial

from ..flux import vae_band_plan
from ..offload.weight_sizes import WeightSizes
from ..sizes import CHANNELS
from .device import DeviceProfile
from .plan import DECODE, ENCODE, StagePlan, Workload
from .split import split_budget


def plan_vae(
    name: str,
    weights: WeightSizes,
    workload: Workload,
    itemsize: int,
    budget: int | None,
    profile: DeviceProfile,
) -> StagePlan:
    """name: DECODE or ENCODE. The weights are there as one block, the picture in bands of rows."""
    rows, columns = workload.latent_size
    beside = 0  # bytes of values besides those of the bands
    plan = partial(vae_band_plan.plan_encode, workload.height, workload.width, itemsize)
    if name == DECODE:
        beside = CHANNELS * rows * columns * 2 * itemsize
        plan = partial(vae_band_plan.plan_decode, rows, columns, itemsize)
    limit = float("inf")
    if budget is not None:
        left = budget - weights.root.nbytes - weights.largest_bytes - profile.workspace_bytes
        limit = left - beside - profile.overhead(max(0, left)) + profile.workspace_bytes
    bands = plan(limit)
    choices, least = [(0, bands.peak_bytes + beside)], plan(0).peak_bytes + beside
    stage = split_budget(name, weights, choices, budget, profile, least)
    return stage if budget is None else replace(stage, bands=bands)


plan_decode, plan_encode = partial(plan_vae, DECODE), partial(plan_vae, ENCODE)
