"""Denoising steps of a transformer with random weights, for measurements."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..engine.flux.conditioning import conditions_of
from ..engine.flux.geometry import FluxGeometry
from ..engine.flux.text_encoders import TextEmbedding
from ..engine.flux.velocity import flux_velocity
from ..engine.offload.offloaded_module import OffloadedModule
from ..engine.quant.compute import ComputePrecision

GUIDANCE = 4.0  # 4000 is a bfloat16, as DiffSynth has it; of 3500 it would make 3504
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One step's inputs: float32 latents, text states [1, 512, width], pooled text; bfloat16, in
    which peers take them, holds all of them exactly."""

    latents: Tensor
    text: TextEmbedding
    sigma: Tensor


def random_case(geometry: FluxGeometry, side: int, device: torch.device) -> Case:
    """side: of the latents."""
    torch.manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float32).bfloat16().float()

    text = TextEmbedding(drawn(1, 512, geometry.text_width), drawn(1, geometry.pooled_width))
    return Case(drawn(1, 16, side, side), text, torch.tensor(0.7, dtype=torch.float32))


@contextmanager
def our_step(
    module: Any, computing: ComputePrecision, case: Case, device: torch.device
) -> Iterator[Step]:
    """One of the steps of a run, as the run takes it: what the conditions give is computed once,
    and the products are chosen once, before the first step."""
    sigmas = case.sigma[None]
    with computing.applied_to(module, device):
        given = (computing.dtype, device, case.latents.dtype, sigmas)
        (conditions,) = conditions_of(module, [case.text], GUIDANCE, *given)
    velocity = flux_velocity(module, conditions)
    with computing.applied_to(module, device):
        yield lambda: velocity(case.latents, case.sigma)


def seconds_of(step: Step, device: torch.device, warm_up: int, steps: int) -> float:
    """The median of so many."""
    found = []
    for _ in range(warm_up + steps):
        wait_for(device)
        start = time.perf_counter()
        step()
        wait_for(device)
        found.append(time.perf_counter() - start)
    return median(found[warm_up:])


def wait_for(device: torch.device) -> None:
    """Until all that was begun on it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fill_randomly(
    weights: OffloadedModule,
    device: torch.device,
    before: Callable[[Tensor], object] = lambda _: None,
) -> None:
    """Random weights, drawn on `device`, that keep the values in range from block to block.

    before: called with each parameter that is about to be written.
    """
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in weights.module.named_parameters():
        before(parameter)
        if parameter.dim() < 2:
            value = float("norm" in name)
            parameter.fill_(2e-4 if parameter.dtype == torch.float32 else value)
        elif parameter.dtype == torch.int8:
            draw = torch.randint(-127, 128, parameter.shape, device=device, generator=generator)
            parameter.copy_(draw.to(torch.int8))
        else:
            draw = torch.randn(
                parameter.shape, device=device, dtype=torch.float32, generator=generator
            )
            std = 90 if parameter.itemsize == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(draw.mul_(std).clamp_(-400, 400).to(parameter.dtype))
