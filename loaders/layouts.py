"""Names and shapes of the tensors in the real model files.

They are what the loaders demand of a file and what demo and random models are made of. At full size
their key-and-shape hash is the one by which DiffSynth knows the real files (see the tests).
"""

import re
from collections.abc import Iterable
from pathlib import Path

from ..engine.flux.geometry import (
    HEAD_DIM,
    MLP_RATIO,
    TIMESTEP_CHANNELS,
    ClipGeometry,
    ControlGeometry,
    FluxGeometry,
    T5Geometry,
)
from .safetensors_file import ModelFileError

MAX_BLOCKS = 256  # of one kind; Flux.1 has 38 at most
Layout = dict[str, tuple[int, ...]]


def flux_dit_layout(g: FluxGeometry) -> Layout:
    """The names of Black Forest Labs, as in flux1-dev.safetensors."""
    layout: Layout = {}
    _add(layout, "img_in", g.hidden, g.in_channels)
    _add(layout, "txt_in", g.hidden, g.text_width)
    embedders = {"time_in": TIMESTEP_CHANNELS, "vector_in": g.pooled_width}
    if g.guidance:
        embedders["guidance_in"] = TIMESTEP_CHANNELS
    for name, width in embedders.items():
        _add(layout, f"{name}.in_layer", g.hidden, width)
        _add(layout, f"{name}.out_layer", g.hidden, g.hidden)
    for index in range(g.double_blocks):
        for stream in ("img", "txt"):
            prefix = f"double_blocks.{index}.{stream}_"
            _add(layout, prefix + "mod.lin", 6 * g.hidden, g.hidden)
            _add(layout, prefix + "attn.qkv", 3 * g.hidden, g.hidden)
            _add(layout, prefix + "attn.proj", g.hidden, g.hidden)
            layout[prefix + "attn.norm.query_norm.scale"] = (HEAD_DIM,)
            layout[prefix + "attn.norm.key_norm.scale"] = (HEAD_DIM,)
            _add(layout, prefix + "mlp.0", MLP_RATIO * g.hidden, g.hidden)
            _add(layout, prefix + "mlp.2", g.hidden, MLP_RATIO * g.hidden)
    for index in range(g.single_blocks):
        prefix = f"single_blocks.{index}."
        _add(layout, prefix + "modulation.lin", 3 * g.hidden, g.hidden)
        _add(layout, prefix + "linear1", (3 + MLP_RATIO) * g.hidden, g.hidden)
        _add(layout, prefix + "linear2", g.hidden, (1 + MLP_RATIO) * g.hidden)
        layout[prefix + "norm.query_norm.scale"] = (HEAD_DIM,)
        layout[prefix + "norm.key_norm.scale"] = (HEAD_DIM,)
    _add(layout, "final_layer.linear", g.out_channels, g.hidden)
    _add(layout, "final_layer.adaLN_modulation.1", 2 * g.hidden, g.hidden)
    return layout


def control_net_layout(g: ControlGeometry) -> Layout:
    """The same names for the layers of a transformer, and Diffusers' for what else it has."""
    layout = flux_dit_layout(g)
    layout = {name: shape for name, shape in layout.items() if not name.startswith("final_layer.")}
    for kind, count in (("", g.double_blocks), ("single_", g.single_blocks)):
        for index in range(count):
            _add(layout, f"controlnet_{kind}blocks.{index}", g.hidden, g.hidden)
    _add(layout, "controlnet_x_embedder", g.hidden, g.hint_channels)
    if g.modes:
        layout["controlnet_mode_embedder.weight"] = (g.modes, g.hidden)
    return layout


def clip_layout(g: ClipGeometry) -> Layout:
    """The names of Transformers' CLIPTextModel."""
    layout: Layout = {
        "text_model.embeddings.token_embedding.weight": (g.vocabulary, g.width),
        "text_model.embeddings.position_embedding.weight": (g.positions, g.width),
    }
    for index in range(g.layers):
        prefix = f"text_model.encoder.layers.{index}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            _add(layout, f"{prefix}self_attn.{name}", g.width, g.width)
        _add(layout, prefix + "layer_norm1", g.width)
        _add(layout, prefix + "layer_norm2", g.width)
        _add(layout, prefix + "mlp.fc1", g.mlp_width, g.width)
        _add(layout, prefix + "mlp.fc2", g.width, g.mlp_width)
    _add(layout, "text_model.final_layer_norm", g.width)
    return layout


def t5_layout(g: T5Geometry) -> Layout:
    """The names of Transformers' T5EncoderModel."""
    inner = g.heads * g.head_dim
    layout: Layout = {"shared.weight": (g.vocabulary, g.width)}
    for index in range(g.layers):
        attention, mlp = (f"encoder.block.{index}.layer.{i}." for i in (0, 1))
        for name in ("q", "k", "v"):
            layout[f"{attention}SelfAttention.{name}.weight"] = (inner, g.width)
        layout[f"{attention}SelfAttention.o.weight"] = (g.width, inner)
        if index == 0:
            bias = f"{attention}SelfAttention.relative_attention_bias.weight"
            layout[bias] = (g.buckets, g.heads)
        layout[f"{attention}layer_norm.weight"] = (g.width,)
        layout[f"{mlp}DenseReluDense.wi_0.weight"] = (g.mlp_width, g.width)
        layout[f"{mlp}DenseReluDense.wi_1.weight"] = (g.mlp_width, g.width)
        layout[f"{mlp}DenseReluDense.wo.weight"] = (g.width, g.mlp_width)
        layout[f"{mlp}layer_norm.weight"] = (g.width,)
    layout["encoder.final_layer_norm.weight"] = (g.width,)
    return layout


def vae_layout() -> Layout:
    """The names of Black Forest Labs, as in ae.safetensors. Flux has one VAE, of one size."""
    layout: Layout = {}
    widths = (128, 256, 512, 512)
    # Two blocks a level going down, three going up, where level 3 comes first.
    _conv(layout, "encoder.conv_in", 3, widths[0])
    width = widths[0]
    for level, out in enumerate(widths):
        for block in range(2):
            _resnet(layout, f"encoder.down.{level}.block.{block}", width, out)
            width = out
        if level < 3:
            _conv(layout, f"encoder.down.{level}.downsample.conv", out, out)
    _middle(layout, "encoder", width)
    _conv(layout, "encoder.conv_out", width, 2 * 16)
    _conv(layout, "decoder.conv_in", 16, width)
    _middle(layout, "decoder", width)
    for level, out in reversed(list(enumerate(widths))):
        for block in range(3):
            _resnet(layout, f"decoder.up.{level}.block.{block}", width, out)
            width = out
        if level > 0:
            _conv(layout, f"decoder.up.{level}.upsample.conv", out, out)
    _conv(layout, "decoder.conv_out", width, 3)
    return layout


def blocks_in(path: Path, names: Iterable[str], prefix: str, layout: Layout) -> int:
    """How many blocks PREFIX.N. have something of what the first has in `layout`.

    What else is in the file, as a LoRA of a model with more blocks, makes none. Raises
    ModelFileError when no model has as many: a layout of all of them would be built.
    """
    first = f"{prefix}0."
    needed = {name.removeprefix(first) for name in layout if name.startswith(first)}
    matches = (re.match(rf"{re.escape(prefix)}(\d+)\.(.+)", name) for name in names)
    count = len({match[1] for match in matches if match and match[2] in needed})
    if count > MAX_BLOCKS:
        raise ModelFileError(
            "{file} has {count:,} blocks; no Flux.1 model has more than {most}. Choose another "
            "file.",
            file=path.name,
            count=count,
            most=MAX_BLOCKS,
        )
    return count


def _add(layout: Layout, name: str, *shape: int) -> None:
    """A weight of this shape, and a bias for its rows."""
    layout[f"{name}.weight"] = shape
    layout[f"{name}.bias"] = shape[:1]


def _conv(layout: Layout, name: str, width_in: int, width_out: int, kernel: int = 3) -> None:
    _add(layout, name, width_out, width_in, kernel, kernel)


def _resnet(layout: Layout, name: str, width_in: int, width_out: int) -> None:
    _add(layout, f"{name}.norm1", width_in)
    _conv(layout, f"{name}.conv1", width_in, width_out)
    _add(layout, f"{name}.norm2", width_out)
    _conv(layout, f"{name}.conv2", width_out, width_out)
    if width_in != width_out:
        _conv(layout, f"{name}.nin_shortcut", width_in, width_out, kernel=1)


def _middle(layout: Layout, coder: str, width: int) -> None:
    """The middle of an encoder or decoder, and the norm before its last convolution."""
    for block in (1, 2):
        _resnet(layout, f"{coder}.mid.block_{block}", width, width)
    for name in ("q", "k", "v", "proj_out"):
        _conv(layout, f"{coder}.mid.attn_1.{name}", width, width, kernel=1)
    _add(layout, f"{coder}.mid.attn_1.norm", width)
    _add(layout, f"{coder}.norm_out", 512 if coder == "encoder" else 128)
