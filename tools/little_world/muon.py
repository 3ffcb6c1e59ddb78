"""Optimizers for small transformers: Muon for the matrices of blocks, AdamW for all else."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
DECAY = 0.01
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that pulls singular values towards 1
SMALLEST_NORM = 1e-7
of_lists: Any = torch  # whose functions for lists of tensors its types leave out


class Muon:
    """`torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` that takes matrices of one shape at once.

    The models have half a hundred small matrices of a dozen shapes. One by one they are 1,500
    launches a step, which takes the host longer than the card.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], rate: float) -> None:
        self.rate = rate
        self._of_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            self._of_shape[matrix.shape].append(matrix)
        self.forget()

    def forget(self) -> None:
        """Begin with no velocity."""
        self._velocity = {
            shape: [torch.zeros_like(matrix) for matrix in matrices]
            for shape, matrices in self._of_shape.items()
        }

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """factor: of the rate, at this step."""
        rate = self.rate * factor
        for shape, matrices in self._of_shape.items():
            gradients = [matrix.grad for matrix in matrices]
            velocity = self._velocity[shape]
            of_lists._foreach_lerp_(velocity, gradients, 1 - MOMENTUM)
            ahead = of_lists._foreach_lerp(gradients, velocity, MOMENTUM)  # Nesterov's
            update = orthogonal(torch.stack(ahead)).float()
            of_lists._foreach_mul_(matrices, 1 - rate * DECAY)
            # As large as an update of AdamW, whose rates can then be used.
            size = 0.2 * math.sqrt(max(shape))
            of_lists._foreach_add_(matrices, list(update.unbind()), alpha=-rate * size)
            for matrix in matrices:
                matrix.grad = None


class AdamW:
    def __init__(self, parameters: Iterable[nn.Parameter], rate: float, decay: float = 0.0) -> None:
        self.rate, self._decay, self._parameters = rate, decay, list(parameters)
        self.forget()

    def forget(self) -> None:
        on_a_card = self._parameters[0].device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            self._parameters, self.rate, (0.9, 0.98), weight_decay=self._decay, fused=on_a_card
        )

    def step(self, factor: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate * factor
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def orthogonal(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> bfloat16, each with all its singular values near 1."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon_and_adamw(
    blocks: Iterable[nn.Module], model: nn.Module, muon_rate: float, adamw_rate: float
) -> list[Muon | AdamW]:
    """For the parameters of `model`: Muon for what the blocks multiply by, but not for modulation,
    which begins at zero, nor for position biases, which are a table."""
    matrices = []
    for block in blocks:
        for name, parameter in block.named_parameters():
            if parameter.ndim == 2 and "lin." not in name and "relative" not in name:
                matrices.append(parameter)
    taken = {id(matrix) for matrix in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    return [Muon(matrices, muon_rate), AdamW(others, adamw_rate)]
