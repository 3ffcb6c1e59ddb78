"""Noise levels of a run."""

import torch
from torch import Tensor

SHIFT = 3.0
SIGMA_MIN = 0.003 / 1.002


def shifted_sigmas(steps: int) -> Tensor:
    """DiffSynth's Flux.1 schedule: float32 [steps], falling from 1; the step after the last is 0.

    Source: DiffSynth-Studio 2.1 `FlowMatchScheduler.set_timesteps_flux`, shift 3 at every size.
    """
    sigmas = torch.linspace(1.0, SIGMA_MIN, steps)
    return SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas)
