"""Plans at the sizes of FLUX.1-dev, and modules of these sizes without memory."""

from collections.abc import Sequence
from functools import cache

import torch

from majicflux.engine.flux.controlnet import build_control_net
from majicflux.engine.flux.geometry import ClipGeometry, ControlGeometry, FluxGeometry, T5Geometry
from majicflux.engine.flux.text_encoders import build_text_encoders
from majicflux.engine.flux.transformer import build_flux_dit
from majicflux.engine.flux.vae import build_vae
from majicflux.engine.kernels.row_format import LIMITS
from majicflux.engine.offload.offloaded_module import OffloadedModule
from majicflux.engine.offload.weight_sizes import joined
from majicflux.engine.plan.denoising import NO_ADAPTERS, AdapterSizes, plan_denoising
from majicflux.engine.plan.device import DeviceProfile
from majicflux.engine.plan.plan import StagePlan, Workload
from majicflux.engine.quant.attention import PYTORCH, Attention
from majicflux.engine.quant.compute import ComputePrecision
from majicflux.engine.quant.formats import PRECISIONS

FULL = FluxGeometry()
ONE_OF_EACH = FluxGeometry(double_blocks=1, single_blocks=1)  # all blocks of a kind are alike
SIZES = [(512, 512), (768, 1344), (1024, 1024), (2048, 2048), (1536, 640)]
# Name: precision, whether products are in 8 bits.
COMPUTED = {
    "bfloat16": ("bfloat16", False),
    "float8 dequantized": ("float8_e4m3fn", False),
    "float8": ("float8_e4m3fn", True),
    "int8 rotated": ("int8 rotated", True),
    "int8 rotated dequantized": ("int8 rotated", False),
}
INT8_ATTENTION = "int8 attention"  # behind "and" after one of COMPUTED
CARDS = {"plain": DeviceProfile(), "fused": DeviceProfile(128 * 2**20, True)}


@cache
def transformer(geometry: FluxGeometry, precision: str) -> OffloadedModule:
    weights = build_flux_dit(geometry, PRECISIONS[precision])
    weights.forget()
    return weights


@cache
def control_net(geometry: ControlGeometry, precision: str) -> OffloadedModule:
    weights = build_control_net(geometry, PRECISIONS[precision])
    weights.forget()
    return weights


@cache
def encoders(layers: int) -> OffloadedModule:
    weights = build_text_encoders(ClipGeometry(), T5Geometry(layers=layers), torch.bfloat16)
    weights.forget()
    return weights


@cache
def autoencoder() -> OffloadedModule:
    weights = build_vae(torch.bfloat16)
    weights.forget()
    return weights


def computing_of(name: str) -> tuple[str, ComputePrecision]:
    products, _, attending = name.partition(" and ")
    precision, eight_bit = COMPUTED[products]
    return precision, ComputePrecision(
        torch.bfloat16,
        frozenset(LIMITS) if eight_bit else frozenset(),
        attention=Attention(0) if attending == INT8_ATTENTION else PYTORCH,
    )


def plan_of(
    name: str,
    job: Workload,
    budget: int | None,
    card: DeviceProfile,
    geometry: FluxGeometry = FULL,
    adapters: AdapterSizes = NO_ADAPTERS,
    controls: Sequence[ControlGeometry] = (),
    reuse: bool = False,
) -> StagePlan:
    precision, computing = computing_of(name)
    weights, converted = transformer(geometry, precision), conversion_bytes(name, geometry)
    sizes = joined([weights.sizes, *(control_net(net, precision).sizes for net in {*controls})])
    given = (job, 2, bool(computing.eight_bit), converted, budget, card, adapters, controls)
    return plan_denoising(sizes, geometry, *given, computing.attention, reuse)


@cache
def conversion_bytes(name: str, geometry: FluxGeometry) -> int:
    precision, computing = computing_of(name)
    return computing.conversion_bytes(transformer(geometry, precision).module)
