"""Sizes of the models. Nothing here needs PyTorch."""

import re
from bisect import bisect_right
from dataclasses import dataclass

from ..sizes import OF_LATENTS, OF_MASK, PATCH

ROPE_AXES = (16, 56, 56)  # share of the head for (index, row, column)
HEAD_DIM = sum(ROPE_AXES)
TIMESTEP_CHANNELS = 256
MLP_RATIO = 4
FIRST_LAYER = "x_embedder"  # in DiffSynth's names, as below
CLIP_HEAD_DIM = 64  # of every CLIP text encoder
BLOCK = re.compile(r"(single_)?blocks\.\d+\.")
CONTROL_OUTPUT = re.compile(r"controlnet_(single_)?blocks\.\d+")  # of a control net's block


@dataclass(frozen=True)
class FluxGeometry:
    """Sizes of a Flux.1 transformer. The defaults are those of FLUX.1-dev."""

    hidden: int = 3072
    double_blocks: int = 19
    single_blocks: int = 38
    in_channels: int = OF_LATENTS  # more in fill, depth and canny models
    out_channels: int = OF_LATENTS
    text_width: int = 4096
    pooled_width: int = 768
    guidance: bool = True  # absent in schnell

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_DIM

    @property
    def blocks(self) -> int:
        return self.double_blocks + self.single_blocks

    @property
    def takes_picture(self) -> bool:
        """As further channels: a fill, depth or canny model."""
        return self.in_channels >= 2 * OF_LATENTS

    @property
    def takes_mask(self) -> bool:
        """Besides the picture: a fill model."""
        return self.in_channels == 2 * OF_LATENTS + OF_MASK


@dataclass(frozen=True)
class ControlGeometry(FluxGeometry):
    """Sizes of a control net for Flux.1, which has the first blocks of a transformer and no last
    layer. Its blocks are those that are used; the defaults are Union-Pro 2.0's.

    hint_channels: of the tokens of the picture that it is shown; modes: that it must be told one
    of, 0 for a net of one kind.
    """

    double_blocks: int = 5
    single_blocks: int = 0
    hint_channels: int = OF_LATENTS
    modes: int = 0

    @property
    def inpaints(self) -> bool:
        """It is shown a mask besides the picture."""
        return self.hint_channels == OF_LATENTS + PATCH**2


def blocks_used(double_blocks: int, single_blocks: int) -> int:
    """How many of a control net's double blocks tell the transformer something, or what follows."""
    joint = FluxGeometry().double_blocks
    return double_blocks if single_blocks else -(-joint // -(-joint // double_blocks))


def lockstep(transformer: FluxGeometry, net: ControlGeometry) -> list[list[int]]:
    """For each block of a transformer the numbers of a control net's that run just before it.

    What the last of them found is added after each block until others run, or the joint blocks
    end. The blocks of the net, joint and then single ones, are spread over those of FLUX.1-dev
    whatever the transformer has, as in ComfyUI and DiffSynth.
    """
    joint, single = FluxGeometry().double_blocks, FluxGeometry().single_blocks
    apart = -(-joint // net.double_blocks)
    places = [min(number * apart, joint) for number in range(net.double_blocks)]
    if net.single_blocks:
        apart = -(-single // net.single_blocks)
        places += [joint + number * apart for number in range(net.single_blocks)]
    found, done = [], 0
    for place in _places(transformer):
        if place < joint or net.single_blocks:
            found.append([*range(done, due := bisect_right(places, place))])
            done = due
        else:
            found.append([])
    return found


def _places(transformer: FluxGeometry) -> list[int]:
    """Where its blocks are among those of FLUX.1-dev."""
    joint = FluxGeometry().double_blocks
    singles = range(joint, joint + transformer.single_blocks)
    return [*range(transformer.double_blocks), *singles]


@dataclass(frozen=True)
class ClipGeometry:
    """Sizes of a CLIP text encoder. The defaults are CLIP-L's."""

    width: int = 768
    mlp_width: int = 3072
    layers: int = 12
    vocabulary: int = 49408
    positions: int = 77


@dataclass(frozen=True)
class T5Geometry:
    """Sizes of a T5 v1.1 encoder. The defaults are T5-XXL's."""

    width: int = 4096
    mlp_width: int = 10240
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    vocabulary: int = 32128
    buckets: int = 32  # relative positions


@dataclass(frozen=True)
class VAEPart:
    """Flux's VAE decoder or encoder: 3x3 convolutions at both ends, and what lies between.

    steps: residual, attention, up or down, and the channels of the map that it gives.
    """

    channels_in: int
    steps: tuple[tuple[str, int], ...]
    channels_out: int

    @property
    def first(self) -> int:
        """Channels after the first convolution."""
        return self.steps[0][1]


_MIDDLE = (("residual", 512), ("attention", 512), ("residual", 512))
VAE_DECODER = VAEPart(
    16,
    (
        *_MIDDLE,
        *(step for c in (512, 512, 256) for step in (*[("residual", c)] * 3, ("up", c))),
        *[("residual", 128)] * 3,
    ),
    3,
)
VAE_ENCODER = VAEPart(
    3,
    (
        *(step for c in (128, 256, 512) for step in (*[("residual", c)] * 2, ("down", c))),
        *[("residual", 512)] * 2,
        *_MIDDLE,
    ),
    32,  # mean and variance; the latents are the mean
)


def kind_of_layer(name: str) -> str:
    """The field of `Precision` that a layer or norm of this name belongs to."""
    if not BLOCK.match(name):
        return "attention" if CONTROL_OUTPUT.match(name) else "rest"
    if ".linear" in name:
        return "modulation"
    return "attention" if ".attn." in name else "mlp"
