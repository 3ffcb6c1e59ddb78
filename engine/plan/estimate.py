"""The plan of a card that is not here, for models that are not here either."""

from collections.abc import Sequence

from ..flux.geometry import ClipGeometry, ControlGeometry, FluxGeometry, T5Geometry
from ..flux.model_sizes import conversion_bytes, flux_dit_sizes, text_encoder_sizes, vae_sizes
from ..offload.weight_sizes import joined
from ..quant.formats import BFLOAT16, Precision, itemsize
from .denoising import plan_denoising, step_seconds
from .device import WORKSPACE_BYTES, DeviceProfile
from .plan import Plan, Workload
from .text import plan_text
from .units import GB
from .vae import plan_decode, plan_encode

ATTENTION_SHARE = 0.5  # of the rate of products in 8 bits that attention, in bfloat16, reaches


def estimate_plan(
    geometry: FluxGeometry | None,
    precision: Precision,
    picture: tuple[int, int, int, int],
    vram_gb: float | None,
    eight_bit: bool,
    copy_rate: float | None,
    matrix_rate: float | None,
    references: Sequence[tuple[int, int]] = (),
    controls: Sequence[ControlGeometry] = (),
) -> Plan:
    """The plan for an NVIDIA card with fused kernels, CLIP-L, T5-XXL and the VAE in bfloat16.

    picture: width, height, batch size, steps; references: widths and heights; controls: control
    nets, in the same precision. Rates in GB/s and TFLOP/s, to predict the time.
    """
    geometry, dtype = geometry or FluxGeometry(), BFLOAT16.dtype
    seen = [Workload(*size) for size in references]
    workload = Workload(*picture, reference_tokens=sum(each.image_tokens for each in seen))
    if geometry.takes_picture or controls:
        seen.append(workload)
    dit, *nets = (flux_dit_sizes(each, precision) for each in (geometry, *controls))
    encoders = text_encoder_sizes(ClipGeometry(), T5Geometry(), dtype)
    vae = vae_sizes(dtype)
    rates = () if not (copy_rate and matrix_rate) else (
        copy_rate * 1e9, matrix_rate * 1e12, matrix_rate * 1e12 * ATTENTION_SHARE
    )  # fmt: skip
    profile = DeviceProfile(WORKSPACE_BYTES, True, *rates)
    budget = None if vram_gb is None else int(vram_gb * GB)
    others = sum(each.travelling_bytes for each in (dit, *nets, vae))
    denoising = plan_denoising(
        joined([dit, *nets]), geometry, workload, itemsize(dtype),
        eight_bit and precision.eight_bit,
        max(conversion_bytes(g, precision, dtype, eight_bit) for g in (geometry, *controls)),
        budget, profile, controls=controls,
    )  # fmt: skip
    largest = sorted(seen, key=lambda each: each.image_tokens)[-1:]
    stages = (
        plan_text(encoders, T5Geometry(), itemsize(dtype), budget, profile, others),
        *(plan_encode(vae, each, itemsize(dtype), budget, profile) for each in largest),
        denoising,
        plan_decode(vae, workload, itemsize(dtype), budget, profile),
    )
    seconds = step_seconds(denoising, geometry, workload, profile, controls)
    return Plan(workload, budget, stages, seconds)
