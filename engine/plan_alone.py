"""The plan of a card that is not here, for models that are not here either."""

import torch

from .card import WORKSPACE_BYTES
from .flux_dit import FluxGeometry, build_flux_dit
from .plan import GB, Card, Job, Plan
from .planning import plan_decode, plan_denoising, plan_text, step_seconds
from .precision import Precision
from .products import Computing
from .stored_linear import LIMITS
from .text_encoders import ClipGeometry, T5Geometry, build_text_encoders
from .vae import build_vae

ATTENTION_SHARE = 0.5  # of the rate of products in 8 bits that attention, in bfloat16, reaches


def plan_alone(
    geometry: FluxGeometry | None,
    precision: Precision,
    job: tuple[int, int, int, int],
    vram_gb: float | None,
    eight_bit: bool,
    copy_rate: float | None,
    matrix_rate: float | None,
) -> Plan:
    """The plan for an NVIDIA card with fused kernels, CLIP-L, T5-XXL and the VAE in bfloat16.

    job: width, height, pictures, steps. Rates in GB/s and TFLOP/s, for a prediction of the time.
    """
    geometry, the_job, dtype = geometry or FluxGeometry(), Job(*job), torch.bfloat16
    dit = build_flux_dit(geometry, precision)
    encoders = build_text_encoders(ClipGeometry(), T5Geometry(), dtype)
    vae = build_vae(dtype)
    computing = Computing(dtype, frozenset(LIMITS) if eight_bit else frozenset())
    rates = () if not (copy_rate and matrix_rate) else (
        copy_rate * 1e9, matrix_rate * 1e12, matrix_rate * 1e12 * ATTENTION_SHARE
    )  # fmt: skip
    card = Card(WORKSPACE_BYTES, True, *rates)
    budget = None if vram_gb is None else int(vram_gb * GB)
    others = dit.travelling_bytes + vae.travelling_bytes
    denoising = plan_denoising(
        dit, geometry, the_job, dtype.itemsize, eight_bit and precision.eight_bit,
        computing.conversion_bytes(dit.module), budget, card,
    )  # fmt: skip
    phases = (
        plan_text(encoders, T5Geometry(), dtype.itemsize, budget, card, others),
        denoising,
        plan_decode(vae, the_job, dtype.itemsize, budget, card),
    )
    return Plan(the_job, budget, phases, step_seconds(denoising, geometry, the_job, card))
