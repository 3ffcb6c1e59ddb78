"""Seconds and memory of a denoising step at 1024x1024, with full-size random weights.

Ours in float8, resident and with less and less of the card, against DiffSynth's own modules in
bfloat16, all in one process on one CUDA card with 32 GB or more. --quick runs a small transformer
on the CPU, which only shows that the script works.
"""

import sys
import time
from dataclasses import dataclass

import torch

from majicflux.engine.denoise import euler, flux_velocity
from majicflux.engine.flux_dit import FluxGeometry, build_flux_dit
from majicflux.engine.latents import draw_noise
from majicflux.engine.offload import OffloadedModule
from majicflux.engine.schedule import shifted_sigmas
from majicflux.engine.stored_linear import FLOAT8_DTYPE
from majicflux.engine.text_encoders import TextEmbedding

from .table import Row, options, report

STEPS = 4
GB = 2**30


@dataclass(frozen=True)
class Measured:
    seconds: float  # a step, the first one left out
    peak_gb: float  # reserved by the allocator, 0 on a CPU
    latents: torch.Tensor


def main() -> None:
    chosen = options(__doc__ or "")
    if not chosen.quick and not torch.cuda.is_available():
        sys.exit("not measured: no CUDA card here; --quick shows that the script works")
    device = torch.device("cpu") if chosen.quick else torch.device("cuda", 0)
    small = FluxGeometry(hidden=256, double_blocks=2, single_blocks=4, text_width=64)
    geometry, side = (small, 128) if chosen.quick else (FluxGeometry(), 1024)
    print(torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", torch.__version__)

    bfloat16 = _random(build_flux_dit(geometry, torch.bfloat16))
    peer = measure(bfloat16, geometry, side, device, float("inf"))
    del bfloat16
    ours = _random(build_flux_dit(geometry, FLOAT8_DTYPE))
    rows = []
    first = None
    for share in (1.0, 0.5, 0.0):
        found = measure(ours, geometry, side, device, share * ours.total_bytes)
        first = first or found
        if not torch.equal(found.latents, first.latents):
            sys.exit(f"streaming {1 - share:.0%} of the blocks changed the latents")
        name = f"float8, {share:.0%} resident"
        rows.append(Row(f"{name}, step", found.seconds, "s", peer.seconds, "bfloat16, resident"))
        if found.peak_gb:
            rows.append(Row(f"{name}, peak", found.peak_gb, "GB", peer.peak_gb, "the same"))
    report(rows, chosen.check)


@torch.inference_mode()
def measure(
    weights: OffloadedModule,
    geometry: FluxGeometry,
    side: int,
    device: torch.device,
    budget_bytes: float,
) -> Measured:
    torch.manual_seed(0)
    text = TextEmbedding(
        torch.randn(1, 512, geometry.text_width), torch.randn(1, geometry.pooled_width)
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    weights.keep_resident(device, budget_bytes)
    marks: list[float] = []

    def on_step(*_: object) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())

    noise = draw_noise(0, 1, side, side).to(device)
    with weights.running_on(device) as module:
        velocity = flux_velocity(module, text, 3.5, torch.bfloat16)
        latents = euler(velocity, noise, shifted_sigmas(STEPS), on_step).cpu()
    peak = torch.cuda.max_memory_reserved(device) / GB if device.type == "cuda" else 0.0
    weights.release(float("inf"))
    return Measured((marks[-1] - marks[0]) / (STEPS - 1), peak, latents)


def _random(weights: OffloadedModule) -> OffloadedModule:
    """Weights of the size of trained ones; float8 values with a scale that brings them there."""
    weights.allocate()
    with torch.no_grad():
        for name, parameter in weights.module.named_parameters():
            if name.endswith(".scale"):
                parameter.fill_(0.02 / 100)
            elif parameter.dtype == FLOAT8_DTYPE:
                for rows in parameter.split(1024):
                    rows.copy_((100 * torch.randn(rows.shape)).clamp_(-448, 448))
            elif parameter.ndim > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1.0 if "norm_" in name else 0.0)
    return weights


if __name__ == "__main__":
    main()
