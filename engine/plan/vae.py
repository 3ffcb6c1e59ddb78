"""The plan of the VAE, in both directions."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ..flux import vae_band_plan
from ..offload.weight_sizes import WeightSizes
from ..sizes import CHANNELS
from .device import DeviceProfile
from .plan import DECODE, ENCODE, StagePlan, Workload
from .split import split_budget


def plan_decode(
    weights: WeightSizes,
    workload: Workload,
    itemsize: int,
    budget: int | None,
    profile: DeviceProfile,
) -> StagePlan:
    """The VAE: its weights are there as one block, the picture in bands of rows."""
    rows, columns = workload.latent_size
    latents = CHANNELS * rows * columns * 2 * itemsize
    plan = partial(vae_band_plan.plan_decode, rows, columns, itemsize)
    return _plan_vae(DECODE, plan, latents, weights, budget, profile)


def plan_encode(
    weights: WeightSizes,
    workload: Workload,
    itemsize: int,
    budget: int | None,
    profile: DeviceProfile,
) -> StagePlan:
    """As of `plan_decode`."""
    plan = partial(vae_band_plan.plan_encode, workload.height, workload.width, itemsize)
    return _plan_vae(ENCODE, plan, 0, weights, budget, profile)


def _plan_vae(
    name: str,
    plan: Callable[[float], vae_band_plan.BandPlan],
    beside: int,
    weights: WeightSizes,
    budget: int | None,
    profile: DeviceProfile,
) -> StagePlan:
    """plan: bands within a limit; beside: bytes of values besides."""
    limit = float("inf")
    if budget is not None:
        left = budget - weights.root.nbytes - weights.largest_bytes - profile.workspace_bytes
        limit = left - beside - profile.overhead(max(0, left)) + profile.workspace_bytes
    bands = plan(limit)
    choices, least = [(0, bands.peak_bytes + beside)], plan(0).peak_bytes + beside
    stage = split_budget(name, weights, choices, budget, profile, least)
    return stage if budget is None else replace(stage, bands=bands)
