"""Noise -> latents: the denoising loop."""

from collections.abc import Callable

import torch
from torch import Tensor

from .inpaint import masked
from .inputs import SamplerInputs
from .solvers import Velocity

# on_pass(estimate of the clean latents): called after each pass of the transformer
OnPass = Callable[[Tensor], None]


def sample(
    inputs: SamplerInputs,
    velocity: Velocity,
    on_pass: OnPass,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Latents at the last of the sigmas, of `dtype` on `device`.

    Those above 0 are divided by 1 - sigma, as ComfyUI hands them from one sampler to the next.
    """
    inputs = inputs.on(device, dtype)
    velocity = reported(velocity, on_pass)
    if inputs.mask is not None:
        velocity = masked(velocity, inputs)
    latents = inputs.solver(velocity, inputs.known(inputs.sigmas[0]), inputs.sigmas)
    if inputs.mask is not None:
        latents = torch.where(inputs.mask == 0, inputs.known(inputs.sigmas[-1]), latents)
    return latents / (1 - inputs.sigmas[-1])


def unpainted(inputs: SamplerInputs) -> Tensor:
    """What `sample` gives where the mask lets nothing change."""
    return inputs.known(inputs.sigmas[-1]) / (1 - inputs.sigmas[-1])


def reported(velocity: Velocity, on_pass: OnPass) -> Velocity:
    """The same velocity; `on_pass` learns where it leads."""

    def and_tell(latents: Tensor, sigma: Tensor) -> Tensor:
        slope = velocity(latents, sigma)
        on_pass(latents - slope * sigma)
        return slope

    return and_tell
