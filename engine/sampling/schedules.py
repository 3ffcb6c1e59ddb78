"""Noise levels of a run: float32 [steps + 1], falling, the last one 0.

Importing it imports no torch: the nodes list these names when ComfyUI starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import LevelNumbersError, LevelOrderError, NoStepsError, TooFewLevelsError
from ..sizes import STEP
from ..torch_state import torch

if TYPE_CHECKING:
    from torch import Tensor

# schedule(steps, width, height, strength) -> noise levels; sizes in pixels
Schedule = Callable[[int, int, int, float], "Tensor"]
SHIFT = 3.0
SIGMA_MIN = 0.003 / 1.002
BASE_TOKENS, BASE_MU = 256, 0.5
MAX_TOKENS, MAX_MU = 4096, 1.15


def diffsynth_sigmas(steps: int, width: int, height: int, strength: float = 1.0) -> Tensor:
    """Shifted by 3 at every size.

    strength: below 1 all steps are made too, and begin at a lower noise level.
    Source: DiffSynth-Studio 2.1 `FlowMatchScheduler.set_timesteps_flux`.
    """
    start = SIGMA_MIN + (1 - SIGMA_MIN) * strength
    sigmas = torch.linspace(start, SIGMA_MIN, steps, dtype=torch.float32, device="cpu")
    shifted = SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas)
    return torch.cat([shifted, shifted.new_zeros(1)])


def bfl_sigmas(steps: int, width: int, height: int, strength: float = 1.0) -> Tensor:
    """Shifted by the size of the picture: the larger, the longer at high noise levels.

    strength: as of `diffsynth_sigmas`.
    Source: Black Forest Labs' `flux.sampling.get_schedule`.
    """
    tokens = (width // STEP) * (height // STEP)
    slope = (MAX_MU - BASE_MU) / (MAX_TOKENS - BASE_TOKENS)
    shift = math.exp(BASE_MU + slope * (tokens - BASE_TOKENS))
    sigmas = torch.linspace(strength, 0, steps + 1, dtype=torch.float32, device="cpu")[:-1]
    shifted = shift / (shift + (1 / sigmas - 1))
    return torch.cat([shifted, shifted.new_zeros(1)])


def given_sigmas(sigmas: Tensor) -> Schedule:
    """Noise levels that came from elsewhere, whatever the size.

    Raises NoiseLevelsError when a flow model cannot follow them.
    """
    levels = sigmas.detach().float().cpu()
    if levels.ndim != 1 or len(levels) < 2:
        raise TooFewLevelsError(shape=tuple(levels.shape))
    if not levels.isfinite().all():
        raise LevelNumbersError
    if not (levels[0] <= 1 and levels[-1] >= 0 and bool((levels[1:] < levels[:-1]).all())):
        raise LevelOrderError(first=levels[0].item(), last=levels[-1].item())
    return lambda *_: levels


def some_steps(schedule: Schedule, start: int, end: int) -> Schedule:
    """The schedule's steps from `start` to before `end`, counted from 0.

    Raises NoStepsError, when it is asked, if there are none.
    """

    def part(steps: int, width: int, height: int, strength: float) -> Tensor:
        sigmas = schedule(steps, width, height, strength)
        if start >= min(end, len(sigmas) - 1):
            raise NoStepsError(start=start, end=end, steps=len(sigmas) - 1)
        return sigmas[start : end + 1]

    return part


SCHEDULES: dict[str, Schedule] = {
    "DiffSynth (shift 3)": diffsynth_sigmas,
    "resolution-aware (BFL)": bfl_sigmas,
}
