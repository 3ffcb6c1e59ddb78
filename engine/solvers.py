"""How the latents follow the velocity from one noise level to the next."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

# velocity(latents, sigma) -> d(latents)/d(sigma), same shape as latents
Velocity = Callable[[Tensor, Tensor], Tensor]
# solver(velocity, latents, sigmas) -> latents at sigmas[-1]. The dtype of the latents is kept.
# latents: [batch, 16, h, w] in model space; sigmas: float32 [steps + 1], falling, on the CPU.
Solver = Callable[[Velocity, Tensor, Tensor], Tensor]


def euler(velocity: Velocity, latents: Tensor, sigmas: Tensor) -> Tensor:
    """First order; one pass a step."""
    for sigma, following in pairwise(sigmas):
        latents = latents + velocity(latents, sigma) * (following - sigma)
    return latents


def heun(velocity: Velocity, latents: Tensor, sigmas: Tensor) -> Tensor:
    """Second order; two passes a step, but one where a step ends at 0, where none is possible.

    Source: algorithm 1 of Karras et al. 2022, arXiv:2206.00364, without its noise.
    """
    for sigma, following in pairwise(sigmas):
        slope = velocity(latents, sigma)
        if following > 0:
            ahead = velocity(latents + slope * (following - sigma), following)
            slope = (slope + ahead) / 2
        latents = latents + slope * (following - sigma)
    return latents


def dpmpp_2m(velocity: Velocity, latents: Tensor, sigmas: Tensor) -> Tensor:
    """Second order; one pass a step, which looks back at the one before.

    Source: DPM-Solver++(2M), algorithm 2 of Lu et al. 2022, arXiv:2211.01095, in -log(sigma), in
    which ComfyUI's `dpmpp_2m` writes it for every model. The first step and one that ends at 0
    are of first order.
    """
    before: Tensor | None = None  # the estimate of the clean latents, one step ago
    log = sigmas.log()
    for step in range(len(sigmas) - 1):
        sigma, following = sigmas[step], sigmas[step + 1]
        clean = latents - velocity(latents, sigma) * sigma
        towards = clean
        if before is not None and following > 0:
            ahead = (log[step + 1] - log[step]) / (2 * (log[step] - log[step - 1]))
            towards = clean + ahead * (clean - before)
        kept = following / sigma
        latents = kept * latents + (1 - kept) * towards
        before = clean
    return latents


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


def passes(solver: Solver, sigmas: Tensor) -> int:
    """How often the solver asks for the velocity."""
    asked = 0

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return latents

    solver(velocity, torch.zeros(1), sigmas)
    return asked
