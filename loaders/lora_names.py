"""The names that trainers give to the layers of Flux.1 and of CLIP-L in their LoRAs."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from ..engine.diffsynth_files import diffsynth_module
from ..engine.flux.geometry import ClipGeometry, FluxGeometry
from .diffusers_names import SHIFT_AND_SCALE, modules_of
from .layouts import Layout, clip_layout, flux_dit_layout

# Whose names of the layers these are.
BFL, DIFFUSERS, XLABS, DIFFSYNTH = "Black Forest Labs", "Diffusers", "XLabs", "DiffSynth"
CLIP_L = "CLIP-L"
# What may stand before the name of a layer -> who writes it.
PREFIXES = {
    "lora_unet_": "kohya",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS",
    "base_model.model.": "PEFT",
    "model.diffusion_model.": "ComfyUI",
    "diffusion_model.": "ai-toolkit",
    "transformer.": "Diffusers",
    "unet.": "Diffusers",
    "pipe.dit.": "DiffSynth",
    "lora_te1_": "kohya",
    "lora_te_": "kohya",
    "text_encoders.clip_l.": "ComfyUI",
    "text_encoder.": "Diffusers",
    "clip_l.": "ComfyUI",
}
BLOCK = re.compile(r"(?<=blocks[._])\d{1,6}(?=[._])")
T5_PREFIXES = ("lora_te2_", "lora_te3_", "text_encoder_2.", "text_encoder_3.", "text_encoders.t5",
               "t5xxl.")  # fmt: skip
OTHER = "other"  # a part of a method that we do not know
# The last parts of a tensor's name -> what it is of the layer. Of PEFT's, the name of the adapter
# may stand before the last part.
ROLES = {
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": OTHER,
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_A": "down", "lora_B": "up",
    "lora.down.weight": "down", "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down", "lora_linear_layer.up.weight": "up",
    "down.weight": "down", "up.weight": "up",
    "lora_B.bias": "up_bias", "lora_up.bias": "up_bias",
    "alpha": "alpha",
    "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "hada_w1_a": "hada_w1_a", "hada_w1_b": "hada_w1_b",
    "hada_w2_a": "hada_w2_a", "hada_w2_b": "hada_w2_b",
    "hada_t1": OTHER, "hada_t2": OTHER,
    "lokr_w1": "lokr_w1", "lokr_w1_a": "lokr_w1_a", "lokr_w1_b": "lokr_w1_b",
    "lokr_w2": "lokr_w2", "lokr_w2_a": "lokr_w2_a", "lokr_w2_b": "lokr_w2_b",
    "lokr_t1": OTHER, "lokr_t2": OTHER,
    "diff": "diff", "w_norm": "diff", "diff_b": "bias", "b_norm": "bias",
    "set_weight": "set", "scale": "norm", "weight": "norm",
    "oft_blocks": OTHER, "oft_diag": OTHER, "oft_R.weight": OTHER, "rescale": OTHER,
    "a1.weight": OTHER, "a2.weight": OTHER, "b1.weight": OTHER, "b2.weight": OTHER,
}  # fmt: skip
NAMED_ADAPTERS = ("lora_A", "lora_B", "lora_magnitude_vector")
MOST_PARTS = 3  # of a tensor's name that are its role


@dataclass(frozen=True)
class Target:
    """A layer, or some of its output columns; or a norm.

    layer: its name in the engine. outputs: columns of the whole layer. inputs: 0 for a norm.
    swapped: the file has the second half of the columns before the first.
    """

    layer: str
    first: int
    columns: int
    outputs: int
    inputs: int
    swapped: bool = False
    of_text: bool = False


class Found(NamedTuple):
    target: Target
    dialect: str


def role_of(name: str) -> tuple[str, str]:
    """Of a tensor's name: that of the layer, and what it is of it, "" where we do not know."""
    parts = name.split(".")
    for count in range(min(MOST_PARTS, len(parts) - 1), 0, -1):
        layer, last = ".".join(parts[:-count]), parts[-count:]
        if count == 3 and last[0] in NAMED_ADAPTERS:
            del last[1]
        role = ROLES.get(".".join(last))
        if role is not None:
            return layer, role
    return name, ""


def of_t5(layer: str) -> bool:
    return layer.startswith(T5_PREFIXES)


def find(layer: str, names: Mapping[str, Found]) -> Found | None:
    """The layer of this name in `names`, whatever stands before it."""
    if of_t5(layer):
        return None
    written_by, rest = "", layer
    while True:
        alike = plain(rest)
        found = names.get(alike) or names.get(alike.removesuffix("_lora"))
        if found is not None:
            return found._replace(dialect=written_by or found.dialect)
        prefix = next((p for p in PREFIXES if rest.startswith(p)), None)
        if prefix is None:
            return None
        written_by, rest = written_by or PREFIXES[prefix], rest[len(prefix) :]


def in_first_block(layer: str) -> str:
    """The layer of the same name in the first block."""
    return BLOCK.sub("0", layer, count=1)


def completed(g: FluxGeometry) -> FluxGeometry:
    """The geometry with what any Flux.1 model has."""
    largest = FluxGeometry()
    return replace(
        g,
        double_blocks=max(g.double_blocks, largest.double_blocks),
        single_blocks=max(g.single_blocks, largest.single_blocks),
        guidance=True,
    )


def plain(layer: str) -> str:
    """The name with what trainers write differently made alike."""
    return layer.replace(".", "_").replace("processor_", "").rstrip("_")


@lru_cache(8)
def names_of(flux: FluxGeometry, clip: ClipGeometry) -> Mapping[str, Found]:
    """Every layer and norm of the models, by each of the names that it may have in a file."""
    names: dict[str, Found] = {}
    whole: dict[str, Target] = {}
    to_engine = diffsynth_module("utils.state_dict_converters.flux_dit").FluxDiTStateDictConverter
    for engine, ours, target in _targets(flux_dit_layout(flux), to_engine):
        whole[ours] = target
        names[plain(ours)] = Found(target, BFL)
        names.setdefault(plain(engine), Found(target, DIFFSYNTH))
    for theirs, target in _diffusers(flux, whole):
        names[plain(theirs)] = Found(target, DIFFUSERS)
    for theirs, target in _xlabs(flux, whole):
        names[plain(theirs)] = Found(target, XLABS)
    to_engine = diffsynth_module("utils.state_dict_converters.flux_text_encoder_clip")
    convert = to_engine.FluxTextEncoderClipStateDictConverter
    layers = {n: s for n, s in clip_layout(clip).items() if ".layers." in n and "norm" not in n}
    for engine, ours, target in _targets(layers, convert):
        found = Found(replace(target, layer=f"clip.{engine}", of_text=True), CLIP_L)
        # Transformers 5.6 dropped the first part.
        for name in (ours, ours.removeprefix("text_model.")):
            names[plain(name)] = found
    return names


def _targets(layout: Layout, to_engine) -> Iterator[tuple[str, str, Target]]:
    """The engine's name and that in `layout` of each layer or norm, and what it is."""
    weights = {n: n for n in layout if n.endswith((".weight", ".scale"))}
    for engine, name in to_engine(weights).items():
        shape = layout[name]
        layer = engine.removesuffix(".weight")
        target = Target(layer, 0, shape[0], shape[0], shape[1] if len(shape) > 1 else 0)
        yield layer, name.rpartition(".")[0], target


def _diffusers(g: FluxGeometry, whole: Mapping[str, Target]) -> Iterator[tuple[str, Target]]:
    for name, parts in modules_of(range(g.double_blocks), range(g.single_blocks)):
        target = whole.get(name)
        if target is None:  # guidance, of a model that has none
            continue
        first = target.first
        for part in parts:
            columns = target.columns - first if part == parts[-1] else g.hidden
            swapped = name == SHIFT_AND_SCALE
            yield part, replace(target, first=first, columns=columns, swapped=swapped)
            first += columns


def _xlabs(g: FluxGeometry, whole: Mapping[str, Target]) -> Iterator[tuple[str, Target]]:
    for index in range(g.double_blocks):
        for number, stream in enumerate(("img", "txt"), start=1):
            for part in ("qkv", "proj"):
                target = whole[f"double_blocks.{index}.{stream}_attn.{part}"]
                yield f"double_blocks.{index}.{part}_lora{number}", target
    for index in range(g.single_blocks):
        block = f"single_blocks.{index}."
        qkv = replace(whole[block + "linear1"], columns=3 * g.hidden)
        yield block + "qkv_lora", qkv
        yield block + "linear1_qkv", qkv
        yield block + "proj_lora", whole[block + "linear2"]
