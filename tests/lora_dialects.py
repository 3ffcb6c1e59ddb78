"""Small LoRAs for the demo models, and one LoRA as each program would write it."""

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from file_layouts import Tensors, to_diffusers
from majicflux.benchmarks.random_models import CLIP, DIT
from majicflux.engine.diffsynth_files import diffsynth_module
from majicflux.engine.flux.geometry import FluxGeometry
from majicflux.loaders.layouts import Layout, flux_dit_layout

Save = Callable[..., Path]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # layer -> down, up, alpha

AB = (".lora_A.weight", ".lora_B.weight")
DOWN_UP = (".lora_down.weight", ".lora_up.weight")
DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")
OLD = (".lora.down.weight", ".lora.up.weight")
OLDEST = ("_lora.down.weight", "_lora.up.weight")

H = DIT.hidden
LAYERS = {
    name.removesuffix(".weight"): shape
    for name, shape in flux_dit_layout(DIT).items()
    if name.endswith(".weight")
}
QKV, PROJ = "double_blocks.1.img_attn.qkv", "double_blocks.0.txt_attn.proj"
CLIP_LAYERS = {
    "self_attn.q_proj": (CLIP.width, CLIP.width),
    "self_attn.out_proj": (CLIP.width, CLIP.width),
    "mlp.fc1": (CLIP.mlp_width, CLIP.width),
    "mlp.fc2": (CLIP.width, CLIP.mlp_width),
}


def random_of(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values that bfloat16 holds, and their products too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-7, 8, shape, generator=generator) / 8


def random_factors(layers: Iterable[str] = LAYERS, rank: int = 4, alpha: float = 2.0) -> Factors:
    return {
        layer: (
            random_of(rank, LAYERS[layer][1], seed=index),
            random_of(LAYERS[layer][0], rank, seed=1000 + index),
            alpha,
        )
        for index, layer in enumerate(layers)
    }


def to_diffusers_names(factors: Factors) -> Factors:
    """The same with query, key and value apart, and the last shift and scale exchanged."""
    ups = to_diffusers({f"{layer}.weight": up for layer, (_, up, _) in factors.items()})
    # Which layer a part came from: one of the same name whose rows are marked by its number.
    marked = to_diffusers(
        {
            f"{layer}.weight": torch.full((up.shape[0], 1), float(number))
            for number, (layer, (_, up, _)) in enumerate(factors.items())
        }
    )
    sources = list(factors.values())
    found = {}
    for name, up in ups.items():
        down, _, alpha = sources[int(marked[name][0].item())]
        found[name.removesuffix(".weight")] = (down.clone(), up, alpha)
    return found


def written(
    factors: Factors,
    prefix: str = "",
    endings: tuple[str, str] = AB,
    alphas: bool = True,
    underscores: bool = False,
) -> Tensors:
    """The tensors; without alphas, ups hold the scale."""
    tensors: Tensors = {}
    for layer, (down, up, alpha) in factors.items():
        name = prefix + (layer.replace(".", "_") if underscores else layer)
        scale = 1.0 if alphas else alpha / len(down)
        tensors[name + endings[0]] = down.clone()
        tensors[name + endings[1]] = (up * scale).to(up.dtype)
        if alphas:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def to_xlabs(factors: Factors) -> Tensors:
    tensors: Tensors = {}
    for layer, (down, up, alpha) in factors.items():
        match = re.fullmatch(r"(double_blocks\.\d+)\.(img|txt)_attn\.(qkv|proj)", layer)
        if match is None:
            block, which = re.fullmatch(r"(single_blocks\.\d+)\.(linear\d)", layer).groups()
            name = f"{block}.processor.{ {'linear1': 'qkv', 'linear2': 'proj'}[which] }_lora"
        else:
            number = {"img": 1, "txt": 2}[match[2]]
            name = f"{match[1]}.processor.{match[3]}_lora{number}"
        tensors[f"{name}.down.weight"] = down.clone()
        tensors[f"{name}.up.weight"] = up * (alpha / len(down))
    return tensors


def engine_names(layers: Iterable[str]) -> dict[str, str]:
    """The engine's name of each layer."""
    convert = diffsynth_module("utils.state_dict_converters.flux_dit").FluxDiTStateDictConverter
    names = convert({f"{layer}.weight": layer for layer in layers})
    return {layer: name.removesuffix(".weight") for name, layer in names.items()}


def dialects(factors: Factors) -> dict[str, Tensors]:
    """Every dialect that can name all layers."""
    apart = to_diffusers_names(factors)
    ours = {name: factors[layer] for layer, name in engine_names(factors).items()}
    return {
        "kohya": written(factors, "lora_unet_", DOWN_UP, underscores=True),
        "kohya, Diffusers' names": written(apart, "lora_unet_", DOWN_UP, underscores=True),
        "Diffusers": written(apart, "transformer.", alphas=False),
        "Diffusers, alphas": written(apart, "transformer."),
        "Diffusers, old": written(apart, "transformer.", OLD, alphas=False),
        "Diffusers, oldest": written(apart, "transformer.", OLDEST, alphas=False),
        "Diffusers, bare": written(apart),
        "ai-toolkit": written(factors, "diffusion_model.", alphas=False),
        "OneTrainer": written(apart, "lora_transformer_", DOWN_UP, underscores=True),
        "OneTrainer, bare": written(factors),
        "LyCORIS": written(apart, "lycoris_", DOWN_UP, underscores=True),
        "PEFT": written(factors, "base_model.model.", alphas=False),
        "PEFT, Diffusers' names": written(apart, "base_model.model.", alphas=False),
        "DiffSynth": written(ours, "", DEFAULT, alphas=False),
    }


def of_clip(prefix: str, index: int = 2) -> Tensors:
    factors = {
        f"encoder.layers.{index}.{name}": (random_of(2, shape[1]), random_of(shape[0], 2), 1.0)
        for name, shape in CLIP_LAYERS.items()
    }
    return written(factors, prefix, underscores="." not in prefix)


def control_lora_layout(flux: FluxGeometry, rank: int) -> Layout:
    """As Black Forest Labs write them: every linear layer with its bias, the first one with the
    channels of a picture, and the norms."""
    layout: Layout = {}
    for name, shape in flux_dit_layout(flux).items():
        layer = name.rpartition(".")[0]
        if name.endswith("norm.scale"):
            layout[name] = shape
        elif name.endswith(".weight"):
            inputs = 2 * shape[1] if layer == "img_in" else shape[1]
            ranks = min(rank, shape[0])  # the last layer has but 64 outputs
            layout[f"{layer}.lora_A.weight"] = ranks, inputs
            layout[f"{layer}.lora_B.weight"] = shape[0], ranks
            layout[f"{layer}.lora_B.bias"] = shape[:1]
    return layout


def control_lora(rank: int = 8) -> Tensors:
    """A small one."""

    def random(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale

    return {
        name: 1 + random(shape, 1 / 4) if name.endswith("norm.scale")
        else random(shape, shape[1] ** -0.5 if "lora_A" in name else 1 / 8)
        for name, shape in control_lora_layout(DIT, rank).items()
    }  # fmt: skip


def kronecker(whole: tuple[bool, bool], first: tuple[int, int], rank: int) -> Tensors:
    """The parts of a LoKr of PROJ, whose first matrix is of this shape."""
    second = H // first[0], H // first[1]
    parts: Tensors = {}
    for number, (shape, as_one) in enumerate(zip((first, second), whole, strict=True), start=1):
        if as_one:
            parts[f"lokr_w{number}"] = random_of(*shape, seed=number)
        else:
            parts[f"lokr_w{number}_a"] = random_of(shape[0], rank, seed=10 + number)
            parts[f"lokr_w{number}_b"] = random_of(rank, shape[1], seed=20 + number)
    return parts


def full_size(tensors: dict[str, tuple[int, ...]], path: Path, dtype: str = "BF16") -> Path:
    """A file of zeros of the real size, which takes no place on the disk."""
    header, at = {}, 0
    for name, shape in tensors.items():
        size = math.prod(shape) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return path
