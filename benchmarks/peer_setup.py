"""What a peer of `budget_peers` is built from.

DiffSynth and diffusers run under no_grad, ComfyUI under inference_mode. The weights are moved in
the mode that the program has, whatever the caller's, so the modes are those of the functions.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from majicflux.engine.flux.geometry import FluxGeometry
from majicflux.lab.steps import Case

from .step import State

FLOAT8 = torch.float8_e4m3fn


class NotMeasured(Exception):
    """What a peer needs is not here; the message says what."""


@dataclass(frozen=True)
class Setup:
    """What a peer is built from. `state` is on the CPU in bfloat16, under the file's names."""

    geometry: FluxGeometry
    state: State
    case: Case
    device: torch.device
    budget: int  # bytes

    @cached_property
    def float8(self) -> State:
        """The weights of a file in float8_e4m3fn without scales."""
        with torch.inference_mode(False), torch.no_grad():
            return {name: tensor.to(FLOAT8) for name, tensor in self.state.items()}
