"""Sizes that are told from a geometry alone, against those of the modules themselves."""

import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from control_nets import FILES

from majicflux.benchmarks import random_models
from majicflux.engine.flux.controlnet import build_control_net
from majicflux.engine.flux.geometry import (
    VAE_DECODER,
    VAE_ENCODER,
    ClipGeometry,
    ControlGeometry,
    FluxGeometry,
    T5Geometry,
    VAEPart,
)
from majicflux.engine.flux.model_sizes import (
    conversion_bytes,
    flux_dit_sizes,
    text_encoder_sizes,
    vae_sizes,
)
from majicflux.engine.flux.text_encoders import build_text_encoders
from majicflux.engine.flux.transformer import build_flux_dit
from majicflux.engine.flux.vae import build_vae
from majicflux.engine.kernels.row_format import LIMITS
from majicflux.engine.offload.weight_sizes import WeightSizes
from majicflux.engine.quant.compute import ComputePrecision
from majicflux.engine.quant.formats import FLOAT8, FLOAT8_UNSCALED, FLOAT32, PRECISIONS, uniform

GEOMETRIES = [
    FluxGeometry(),
    FluxGeometry(guidance=False),
    random_models.DIT,
    FluxGeometry(hidden=640, double_blocks=1, single_blocks=0, in_channels=384, pooled_width=33),
]
# Those that are offered, float32, and each kind in a storage of its own.
STORED = {
    **PRECISIONS,
    "float32": uniform(FLOAT32),
    "mixed": PRECISIONS["int8 rotated"].with_kinds(
        attention=FLOAT8, modulation=FLOAT32, rest=FLOAT8_UNSCALED
    ),
}
DTYPES = ["bfloat16", "float32"]


def told(sizes: WeightSizes) -> tuple[object, ...]:
    blocks, once = ([b.nbytes for b in part] for part in (sizes.blocks, sizes.once))
    return sizes.root.nbytes, blocks, once, sizes.rotated, sizes.integers


@pytest.mark.parametrize("precision", STORED)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_transformer_is_as_large_as_its_geometry_says(
    geometry: FluxGeometry, precision: str
) -> None:
    stored = STORED[precision]
    weights = build_flux_dit(geometry, stored)
    assert told(weights.sizes) == told(flux_dit_sizes(geometry, stored))
    for dtype in DTYPES:
        for formats in (frozenset(LIMITS), frozenset()):
            computing = ComputePrecision(getattr(torch, dtype), formats)
            found = computing.conversion_bytes(weights.module)
            assert found == conversion_bytes(geometry, stored, dtype, bool(formats))


@pytest.mark.parametrize("precision", STORED)
@pytest.mark.parametrize("geometry", [*FILES.values(), ControlGeometry()])
def test_a_control_net_is_as_large_as_its_geometry_says(
    geometry: ControlGeometry, precision: str
) -> None:
    stored = STORED[precision]
    weights = build_control_net(geometry, stored)
    assert told(weights.sizes) == told(flux_dit_sizes(geometry, stored))
    computing = ComputePrecision(torch.bfloat16)
    found = computing.conversion_bytes(weights.module)
    assert found == conversion_bytes(geometry, stored, "bfloat16", eight_bit=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("clip", "t5"),
    [
        (ClipGeometry(), T5Geometry()),
        (random_models.CLIP, random_models.T5),
        (ClipGeometry(64, 100, 1, 9, 5), T5Geometry(72, 31, 2, 3, 17, 40, 6)),
    ],
)
def test_text_encoders_are_as_large_as_their_geometry_says(
    clip: ClipGeometry, t5: T5Geometry, dtype: str
) -> None:
    weights = build_text_encoders(clip, t5, getattr(torch, dtype))
    assert told(weights.sizes) == told(text_encoder_sizes(clip, t5, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_vae_is_as_large_as_its_geometry_says(dtype: str) -> None:
    weights = build_vae(getattr(torch, dtype))
    assert told(weights.sizes) == told(vae_sizes(dtype))


def shapes(part: VAEPart) -> Iterator[tuple[int, ...]]:
    """Of the weights of a decoder or encoder that has these steps."""
    before = part.first
    yield from convolution(part.channels_in, before)
    for kind, after in part.steps:
        if kind == "attention":
            yield from (*[(after,)] * 2, *convolution(after, after, side=1) * 4)
        elif kind == "residual":
            yield from (*[(before,)] * 2, *convolution(before, after))
            yield from (*[(after,)] * 2, *convolution(after, after))
            if before != after:
                yield from convolution(before, after, side=1)
        else:
            yield from convolution(before, after)
        before = after
    yield from (*[(before,)] * 2, *convolution(before, part.channels_out))


def convolution(before: int, after: int, side: int = 3) -> list[tuple[int, ...]]:
    return [(after, before, side, side), (after,)]


@pytest.mark.parametrize(("name", "part"), [("decoder", VAE_DECODER), ("encoder", VAE_ENCODER)])
def test_the_vae_has_the_steps_that_its_geometry_says(name: str, part) -> None:
    """In their order, by which the bands are planned."""
    kinds = {
        "ResnetBlock": "residual",
        "VAEAttentionBlock": "attention",
        "UpSampler": "up",
        "DownSampler": "down",
    }
    module = build_vae(torch.float32).module[name]
    steps = []
    for block in module.blocks:
        channels = next(p for p in reversed([*block.parameters()]) if p.ndim == 1).numel()
        steps.append((kinds[type(block).__name__], channels))
    assert part.steps == tuple(steps)
    assert (part.channels_in, part.channels_out) == (
        module.conv_in.in_channels,
        module.conv_out.out_channels,
    )
    assert Counter(shapes(part)) == Counter(tuple(p.shape) for p in module.parameters())


def test_the_parameters_of_flux_are_12_billion() -> None:
    sizes = flux_dit_sizes(FluxGeometry(), PRECISIONS["bfloat16"])
    everything = sum(b.nbytes for b in (sizes.root, *sizes.blocks, *sizes.once))
    assert math.isclose(everything, 2 * 11.9e9, rel_tol=0.001)
