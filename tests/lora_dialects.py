"""One LoRA as each program would write it, made from factors under Black Forest Labs' names."""

import re
from collections.abc import Iterable

import torch

from file_layouts import Tensors, to_diffusers

Factors = dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # layer -> down, up, alpha

AB = (".lora_A.weight", ".lora_B.weight")
DOWN_UP = (".lora_down.weight", ".lora_up.weight")
DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")
OLD = (".lora.down.weight", ".lora.up.weight")


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
    from majicflux.engine.diffsynth_files import diffsynth_module

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
        "Diffusers, bare": written(apart),
        "ai-toolkit": written(factors, "diffusion_model.", alphas=False),
        "OneTrainer": written(apart, "lora_transformer_", DOWN_UP, underscores=True),
        "OneTrainer, bare": written(factors),
        "LyCORIS": written(apart, "lycoris_", DOWN_UP, underscores=True),
        "PEFT": written(factors, "base_model.model.", alphas=False),
        "PEFT, Diffusers' names": written(apart, "base_model.model.", alphas=False),
        "DiffSynth": written(ours, "", DEFAULT, alphas=False),
    }
