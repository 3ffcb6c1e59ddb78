"""A mask of what may change, and a velocity that keeps the rest."""

from torch import Tensor

from .inputs import SamplerInputs
from .solvers import Velocity


def masked(velocity: Velocity, inputs: SamplerInputs) -> Velocity:
    """A velocity that leads to what is clean where the mask is 0, and in between where it is soft.

    As ComfyUI's `KSamplerX0Inpaint`, so that both paint the same.
    """
    mask, clean = inputs.mask, inputs.clean
    assert mask is not None
    assert clean is not None

    def towards_both(latents: Tensor, sigma: Tensor) -> Tensor:
        x = latents * mask + inputs.known(sigma) * (1 - mask)
        estimate = x - velocity(x, sigma) * sigma
        return (latents - (estimate * mask + clean * (1 - mask))) / sigma

    return towards_both
