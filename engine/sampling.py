"""Noise -> latents: what a run of the denoising loop is given, and the loop."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .solvers import Solver, Velocity, euler

# on_pass(estimate of the clean latents): called after each pass of the transformer
OnPass = Callable[[Tensor], None]


@dataclass(frozen=True)
class Task:
    """A run of the denoising loop. Latents are float32 in model space, on the CPU.

    sigmas: float32 [steps + 1], falling; noise: [batch, 16, h, w], zeros to go on where another
    run stopped; clean: latents to begin from, None for an empty picture; mask: [batch, 1, h, w] in
    0..1, of what may change, None for everything; cfg: how far to go from the negative prompt to
    the positive one, 1 for no negative prompt.
    """

    sigmas: Tensor
    noise: Tensor
    clean: Tensor | None = None
    mask: Tensor | None = None
    cfg: float = 1.0
    solver: Solver = euler

    def on(self, device: torch.device, dtype: torch.dtype) -> "Task":
        tensors = {"noise": self.noise, "clean": self.clean, "mask": self.mask}
        there = {name: t.to(device, dtype) for name, t in tensors.items() if t is not None}
        return replace(self, **there)

    def known(self, sigma: Tensor) -> Tensor:
        """The latents that this run begins from, at a noise level."""
        noise = sigma * self.noise
        return noise if self.clean is None else (1 - sigma) * self.clean + noise


def sample(
    task: Task,
    velocity: Velocity,
    on_pass: OnPass,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Latents at the last of the task's sigmas, of `dtype` on `device`.

    Those above 0 are divided by 1 - sigma, as ComfyUI hands them from one sampler to the next.
    """
    task = task.on(device, dtype)
    velocity = reported(velocity, on_pass)
    if task.mask is not None:
        velocity = masked(velocity, task)
    latents = task.solver(velocity, task.known(task.sigmas[0]), task.sigmas)
    if task.mask is not None:
        latents = torch.where(task.mask == 0, task.known(task.sigmas[-1]), latents)
    return latents / (1 - task.sigmas[-1])


def unpainted(task: Task) -> Tensor:
    """What `sample` gives where the mask lets nothing change."""
    return task.known(task.sigmas[-1]) / (1 - task.sigmas[-1])


def reported(velocity: Velocity, on_pass: OnPass) -> Velocity:
    """The same velocity; `on_pass` learns where it leads."""

    def and_tell(latents: Tensor, sigma: Tensor) -> Tensor:
        slope = velocity(latents, sigma)
        on_pass(latents - slope * sigma)
        return slope

    return and_tell


def masked(velocity: Velocity, task: Task) -> Velocity:
    """A velocity that leads to what is clean where the mask is 0, and in between where it is soft.

    As ComfyUI's `KSamplerX0Inpaint`, so that both paint the same.
    """
    mask, clean = task.mask, task.clean
    assert mask is not None
    assert clean is not None

    def towards_both(latents: Tensor, sigma: Tensor) -> Tensor:
        x = latents * mask + task.known(sigma) * (1 - mask)
        estimate = x - velocity(x, sigma) * sigma
        return (latents - (estimate * mask + clean * (1 - mask))) / sigma

    return towards_both
