"""Sizes of the weights of models that are not here, from their geometry alone.

They are what `build_flux_dit` and its likes would give blocks of; a test compares them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from math import prod

from ..offload.weight_sizes import BlockSize, WeightSizes, aligned
from ..quant.formats import Precision, itemsize, rotation_group
from .geometry import (
    HEAD_DIM,
    MLP_RATIO,
    TIMESTEP_CHANNELS,
    ClipGeometry,
    ControlGeometry,
    FluxGeometry,
    T5Geometry,
)

# Of Flux's VAE, which has one size: decoder and encoder.
VAE_BYTES = {"bfloat16": (99_091_200, 68_548_608), "float32": (198_182_144, 137_096_960)}


@dataclass(frozen=True)
class _Linear:
    """bare: without a bias and a scale, as rows that are looked up."""

    kind: str  # a field of Precision
    out: int
    inputs: int
    bare: bool = False

    def nbytes(self, precision: Precision) -> int:
        storage = getattr(precision, self.kind)
        matrix = aligned(self.out * self.inputs * itemsize(storage.dtype))
        bias = aligned(self.out * itemsize(storage.vector_dtype))
        scale = aligned(self.out * 4 if storage.scaled else 0)
        return matrix if self.bare else matrix + bias + scale


_Blocks = list[list[_Linear]]


def _flux_layers(g: FluxGeometry) -> tuple[_Blocks, _Blocks, list[_Linear]]:
    """The blocks of a pass, those that a run needs once, and what is in none, of a transformer, or
    of a control net, whose blocks are each followed by an output."""
    d, wide = g.hidden, MLP_RATIO * g.hidden
    qkv, out = _Linear("attention", 3 * d, d), _Linear("attention", d, d)
    stream = [out, _Linear("mlp", wide, d), _Linear("mlp", d, wide)]
    single = [_Linear("mlp", 3 * d + wide, d), _Linear("mlp", d, d + wide)]
    timestep = [_Linear("rest", d, TIMESTEP_CHANNELS), _Linear("rest", d, d)]
    pooled = [_Linear("rest", d, g.pooled_width), _Linear("rest", d, d)]
    text = _Linear("rest", d, g.text_width)
    embedders = [text, *pooled, *timestep, *(timestep if g.guidance else [])]
    last, root, output = [], [_Linear("rest", d, g.in_channels)], []
    if isinstance(g, ControlGeometry):
        output = [[_Linear("attention", d, d)]]
        root.append(_Linear("rest", d, g.hint_channels))
        if g.modes:
            embedders.append(_Linear("rest", g.modes, d, bare=True))
    else:
        last = [[_Linear("rest", 2 * d, d)]]
        root.append(_Linear("rest", g.out_channels, d))
    passes = [[qkv, qkv], stream, stream, *output] * g.double_blocks
    passes += [single, *output] * g.single_blocks
    once = [embedders, *[[_Linear("modulation", 6 * d, d)]] * (2 * g.double_blocks)]
    once += [[_Linear("modulation", 3 * d, d)]] * g.single_blocks + last
    return passes, once, root


def flux_dit_sizes(g: FluxGeometry, precision: Precision) -> WeightSizes:
    """Of a transformer or of a control net."""
    passes, once, root = _flux_layers(g)

    def norm(kind: str) -> int:
        """Of the queries or keys."""
        return aligned(HEAD_DIM * itemsize(getattr(precision, kind).vector_dtype))

    def size(part: Iterable[_Linear], beside: int = 0) -> BlockSize:
        return BlockSize(sum(layer.nbytes(precision) for layer in part) + beside)

    norms = 4 * g.double_blocks * norm("attention") + 2 * g.single_blocks * norm("mlp")
    layers = chain(*passes, *once, root)
    storages = {layer: getattr(precision, layer.kind) for layer in layers}
    return WeightSizes(
        size(root, norms),
        [*map(size, passes)],
        [*map(size, once)],
        any(rotation_group(layer.inputs, storage.rotated) for layer, storage in storages.items()),
        any(storage.dtype == "int8" for storage in storages.values()),
    )


def conversion_bytes(g: FluxGeometry, precision: Precision, dtype: str, eight_bit: bool) -> int:
    """Of the buffer for matrices that are multiplied in `dtype`, but kept in another.

    eight_bit: whether those that are kept in 8 bits are multiplied so.
    """
    passes, once, root = _flux_layers(g)
    converted = (
        layer.out * layer.inputs
        for layer in chain(*passes, *once, root)
        if (storage := getattr(precision, layer.kind)).dtype != dtype
        and not (eight_bit and storage.eight_bit)
    )
    return max(converted, default=0) * itemsize(dtype)


def text_encoder_sizes(clip: ClipGeometry, t5: T5Geometry, dtype: str) -> WeightSizes:
    def size(*shapes: tuple[int, ...]) -> int:
        return _nbytes(shapes, dtype)

    width, wide, inner = clip.width, clip.mlp_width, t5.heads * t5.head_dim
    layer = size(
        *[(width, width)] * 4, (wide, width), (width, wide), (wide,), *[(width,)] * 9
    )  # CLIP's
    attention = [size((inner, t5.width))] * 3 + [size((t5.width, inner))]
    mlp = [size((t5.mlp_width, t5.width))] * 2 + [size((t5.width, t5.mlp_width))]
    root = size((clip.positions, width), (width,), (width,), (t5.buckets, t5.heads))
    norms = size((t5.width,)) * (2 * t5.layers + 1)
    blocks = [layer] * clip.layers + (attention + mlp) * t5.layers
    return WeightSizes(BlockSize(root + norms), [*map(BlockSize, blocks)], [])


def vae_sizes(dtype: str) -> WeightSizes:
    decoder, encoder = map(BlockSize, VAE_BYTES[dtype])
    return WeightSizes(BlockSize(0), [decoder], [encoder])


def _nbytes(shapes: Iterable[tuple[int, ...]], dtype: str) -> int:
    return sum(aligned(prod(shape) * itemsize(dtype)) for shape in shapes)
