"""What a run of the denoising loop is given."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .solvers import Solver, euler


@dataclass(frozen=True)
class SamplerInputs:
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

    def on(self, device: torch.device, dtype: torch.dtype) -> "SamplerInputs":
        tensors = {"noise": self.noise, "clean": self.clean, "mask": self.mask}
        there = {name: t.to(device, dtype) for name, t in tensors.items() if t is not None}
        return replace(self, **there)

    def known(self, sigma: Tensor) -> Tensor:
        """The latents that this run begins from, at a noise level."""
        noise = sigma * self.noise
        return noise if self.clean is None else (1 - sigma) * self.clean + noise
