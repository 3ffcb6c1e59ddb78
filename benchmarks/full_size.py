"""Model files of the real layouts and full size, made up."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from safetensors.torch import save_file

from majicflux.engine.flux.geometry import (
    HEAD_DIM,
    MLP_RATIO,
    TIMESTEP_CHANNELS,
    ClipGeometry,
    FluxGeometry,
    T5Geometry,
)
from majicflux.engine.sizes import OF_LATENTS
from majicflux.loaders import demo_models
from majicflux.loaders.layouts import Layout, clip_layout, flux_dit_layout, t5_layout, vae_layout

from . import random_models
from .flux_graphs import CONTROL_NET, LORA
from .random_lora import random_lora

LORA_RANK = 16
CONTROL_BLOCKS = 6
PREFIX = "model.diffusion_model."


def write_majicflus(
    path: Path, geometry: FluxGeometry | None = None, content: bytes | None = None
) -> None:
    """Write bf16 tensors of `geometry` (FLUX.1-dev's if None), `content` repeated over and over.

    Without content the file is sparse: its header is real, its tensors were never written.
    """

    def repeat(file: BinaryIO, end: int) -> None:
        assert content is not None
        for start in range(0, end, len(content)):
            file.write(content[: end - start])

    layout = flux_dit_layout(geometry or FluxGeometry())
    _write(path, layout, PREFIX, _skip if content is None else repeat)


def write_models(
    folder: Path, small: bool = False, sparse: bool = False, tokenizers: bool = False
) -> None:
    """All files of the documented graph under `folder`, 34 GB, random; those there are kept.

    small: in the sizes of `random_models`, but with a row for every token of the real vocabularies.
    sparse: their headers alone are real. tokenizers: with those of `random_models`, and as many
    rows, where no ComfyUI has the real ones.
    """
    clip, t5 = ClipGeometry(), T5Geometry()
    dit = random_models.DIT if small else FluxGeometry()
    if small:
        clip = replace(random_models.CLIP, vocabulary=clip.vocabulary)
        t5 = replace(random_models.T5, vocabulary=t5.vocabulary)
    if tokenizers:
        clip = replace(clip, vocabulary=random_models.CLIP_VOCABULARY)
        t5 = replace(t5, vocabulary=random_models.T5_VOCABULARY)
        random_models.write_tokenizers(folder)
    for file, layout, prefix in (
        (demo_models.DIT_FILE, flux_dit_layout(dit), PREFIX),
        (demo_models.CLIP_FILE, clip_layout(clip), ""),
        (demo_models.T5_FILE, t5_layout(t5), ""),
        (demo_models.VAE_FILE, vae_layout(), ""),
    ):
        if not (folder / file).exists():
            _write(folder / file, layout, prefix, _skip if sparse else partial(_draw, layout))


def write_lora(folder: Path, small: bool = False) -> None:
    """LORA under `folder`, 153 MB, random, for the blocks; one that is there is kept."""
    path = folder / "loras" / LORA
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        layout = flux_dit_layout(random_models.DIT if small else FluxGeometry())
        tensors = random_lora(layout.items(), LORA_RANK)
        save_file({f"diffusion_model.{name}": t for name, t in tensors.items()}, path)


def write_control_net(folder: Path, small: bool = False) -> None:
    """CONTROL_NET under `folder`, 4 GB, random, as Union-Pro 2.0; one that is there is kept."""
    path = folder / "controlnet" / CONTROL_NET
    if not path.exists():
        layout = _control_net_layout(random_models.DIT if small else FluxGeometry(), small)
        _write(path, layout, "", partial(_draw, layout))


def _control_net_layout(g: FluxGeometry, small: bool) -> Layout:
    width, embedders = g.hidden, "time_text_embed."
    linears = {
        "x_embedder": (width, OF_LATENTS), "controlnet_x_embedder": (width, OF_LATENTS),
        "context_embedder": (width, g.text_width),
    }  # fmt: skip
    for name, inputs in (
        ("timestep", TIMESTEP_CHANNELS), ("guidance", TIMESTEP_CHANNELS), ("text", g.pooled_width)
    ):  # fmt: skip
        linears[f"{embedders}{name}_embedder.linear_1"] = (width, inputs)
        linears[f"{embedders}{name}_embedder.linear_2"] = (width, width)
    norms: Layout = {}
    for number in range(1 if small else CONTROL_BLOCKS):
        block = f"transformer_blocks.{number}."
        linears[f"controlnet_blocks.{number}"] = (width, width)
        for stream, projections in (
            ("", ("to_q", "to_k", "to_v", "to_out.0")),
            ("_context", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        ):
            linears[f"{block}norm1{stream}.linear"] = (6 * width, width)
            linears |= {f"{block}attn.{name}": (width, width) for name in projections}
            linears[f"{block}ff{stream}.net.0.proj"] = (MLP_RATIO * width, width)
            linears[f"{block}ff{stream}.net.2"] = (width, MLP_RATIO * width)
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            norms[f"{block}attn.{norm}.weight"] = (HEAD_DIM,)
    weights = {f"{name}.weight": shape for name, shape in linears.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in linears.items()} | norms


def _skip(file: BinaryIO, end: int) -> None:
    file.truncate(file.tell() + end)


def _draw(layout: Layout, file: BinaryIO, _: int) -> None:
    """Weights that keep the size of what passes through them, drawn on the card if there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(len(layout))
    for name, shape in layout.items():
        if len(shape) == 1:
            norm = "norm" in name and not name.endswith("bias")
            values = torch.full(shape, float(norm), device=device)
        else:
            table = "embed" in name or "shared" in name
            std = 0.02 if table else 1 / math.sqrt(math.prod(shape[1:]))
            values = torch.randn(shape, generator=generator, device=device).mul_(std)
        file.write(values.bfloat16().view(-1).view(torch.uint8).cpu().numpy().data)


def _write(path: Path, layout: Layout, prefix: str, fill: Callable[[BinaryIO, int], None]) -> None:
    """fill: writes the tensors, in the order of the layout, given the bytes of all of them."""
    header, end = {}, 0
    for name, shape in layout.items():
        length = 2 * math.prod(shape)
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + length]}
        header[prefix + name] = entry
        end += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that readers can map the tensors
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        fill(file, end)
    unfinished.replace(path)
