"""How the latents follow the velocity from one noise level to the next.

Importing it imports no torch: the nodes list these names when ComfyUI starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# velocity(latents, sigma) -> d(latents)/d(sigma), same shape as latents
Velocity = Callable[["Tensor", "Tensor"], "Tensor"]
# solver(velocity, latents, sigmas) -> latents at sigmas[-1]. The dtype of the latents is kept.
# latents: [batch, 16, h, w] in model space; sigmas: float32 [steps + 1], falling, on the CPU.
Solver = Callable[[Velocity, "Tensor", "Tensor"], "Tensor"]


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


def deis(order: int, velocity: Velocity, latents: Tensor, sigmas: Tensor) -> Tensor:
    """Of order 2 or 3; one pass a step, which goes on as the last ones curve.

    The polynomial through the velocities of the last steps is integrated: Adams and Bashforth's
    method for uneven steps. Source: rhoAB-DEIS of Zhang and Chen 2022, arXiv:2204.13902, where rho
    is sigma. The velocity of a flow has no singularity at 0, so the last step is of full order too.
    """
    levels: list[float] = []  # of the last steps, the latest first
    slopes: list[Tensor] = []
    for sigma, following in pairwise(sigmas):
        levels = [sigma.item(), *levels][:order]
        slopes = [velocity(latents, sigma), *slopes][:order]
        shares = _integrals(levels, sigma.item(), following.item())
        latents = latents + sum(share * slope for share, slope in zip(shares, slopes, strict=True))
    return latents


def _integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Of each Lagrange polynomial of up to four nodes, from start to end."""
    middle, half = (start + end) / 2, (end - start) / 2
    points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))  # Gauss: exact to cubes

    def polynomial(node: float, at: float) -> float:
        return math.prod((at - other) / (node - other) for other in nodes if other != node)

    return [half * sum(polynomial(node, at) for at in points) for node in nodes]


SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "deis_2m": partial(deis, 2),
    "deis_3m": partial(deis, 3),
    "heun": heun,
}


def levels_of_passes(solver: Solver, sigmas: Tensor) -> list[float]:
    """The noise level of each velocity that the solver asks for."""
    levels: list[float] = []

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        levels.append(sigma.item())
        return latents

    solver(velocity, sigmas[:1], sigmas)
    return levels


def passes(solver: Solver, sigmas: Tensor) -> int:
    """How often the solver asks for the velocity."""
    return len(levels_of_passes(solver, sigmas))
