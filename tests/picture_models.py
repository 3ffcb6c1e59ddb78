"""Small random models of the templates that take a picture, under the names of the real ones."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from control_nets import FILES, control_net_tensors
from safetensors.torch import save_file

from file_layouts import Tensors
from lora_dialects import control_lora
from majicflux.benchmarks.random_models import DIT, T5, random_tensors
from majicflux.downloads.catalogue import (
    DEPTH_LORA,
    FILL,
    KONTEXT_FLOAT8,
    REDUX,
    SIGCLIP,
    UNION_PRO_2,
    KnownFile,
)
from majicflux.loaders.layouts import Layout, flux_dit_layout

VISION_WIDTH, VISION_MLP, VISION_LAYERS, PATCHES, PATCH = 64, 128, 3, 16, 14


def write_picture_models(folder: Path) -> None:
    """Fill, Kontext, a control LoRA, a control net and Redux with what it sees with, under
    ComfyUI's folders."""
    layouts = {
        FILL: flux_dit_layout(replace(DIT, in_channels=384)),
        KONTEXT_FLOAT8: flux_dit_layout(DIT),
        REDUX: redux_layout(T5.width),
        SIGCLIP: vision_layout(),
    }
    tensors = {
        file: random_tensors(layout, seed, torch.bfloat16)
        for seed, (file, layout) in enumerate(layouts.items())
    }
    tensors[DEPTH_LORA] = {n: t.contiguous() for n, t in control_lora().items()}
    net = replace(FILES["Union-Pro 2.0"], hidden=DIT.hidden)
    net_tensors = control_net_tensors(net, dtype=torch.bfloat16)
    tensors[UNION_PRO_2] = {n: t.contiguous() for n, t in net_tensors.items()}
    write_files(folder, tensors)


def write_files(folder: Path, tensors: Mapping[KnownFile, Tensors]) -> None:
    for file, found in tensors.items():
        path = folder / file.folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(found, path)


def redux_layout(text_width: int) -> Layout:
    up, down = (3 * text_width, VISION_WIDTH), (text_width, 3 * text_width)
    return {
        "redux_up.weight": up, "redux_up.bias": up[:1],
        "redux_down.weight": down, "redux_down.bias": down[:1],
    }  # fmt: skip


def vision_layout() -> Layout:
    """Of SigLIP's vision model, as Transformers names it."""
    width, mlp = VISION_WIDTH, VISION_MLP
    layout: Layout = {
        "embeddings.patch_embedding.weight": (width, 3, PATCH, PATCH),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (PATCHES, width),
        "post_layernorm.weight": (width,), "post_layernorm.bias": (width,),
    }  # fmt: skip
    linear = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    linear |= {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}
    for number in range(VISION_LAYERS):
        for name, shape in linear.items():
            layout[f"encoder.layers.{number}.{name}.weight"] = shape
            layout[f"encoder.layers.{number}.{name}.bias"] = shape[:1]
        for norm in ("layer_norm1", "layer_norm2"):
            layout[f"encoder.layers.{number}.{norm}.weight"] = (width,)
            layout[f"encoder.layers.{number}.{norm}.bias"] = (width,)
    return {f"vision_model.{name}": shape for name, shape in layout.items()}
