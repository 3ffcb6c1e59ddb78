"""The demo models: small trained ones in the real layouts, for a first try without downloads.

They know a little world of simple scenes, and ship with the pack in 8 bits. They are written as
the four files that the workflows name, so that everything which reads real models reads them.
"""

import shutil
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from ..messages import say
from .thin_vae import widened

if TYPE_CHECKING:
    from torch import Tensor

DIT_FILE = "diffusion_models/majicflus_v134.safetensors"
CLIP_FILE = "text_encoders/clip_l.safetensors"
T5_FILE = "text_encoders/t5xxl_fp16.safetensors"
VAE_FILE = "vae/ae.safetensors"
CLIP_TOKENIZER_FOLDER = "text_encoders/tokenizer"
T5_TOKENIZER_FOLDER = "text_encoders/tokenizer_2"

LITTLE_WORLD = Path(__file__).parent / "little_world"  # weights.safetensors and the tokenizers
VALUES_PER_SCALE = 128


def write_demo_models(folder: Path, source: Path = LITTLE_WORLD) -> list[Path]:
    """Write the four model files and two tokenizers under `folder`, in ComfyUI's subfolders.

    The same bytes at every call, about 190 MB, most of it the VAE, which has one size. The names
    are those of the shipped workflows, and a file that is there already is never replaced:
    FileExistsError tells that `folder` may hold real models. Returns the model files.

    source: a folder with `weights.safetensors`, `tokenizer` and `tokenizer_2`.
    """
    import torch
    from safetensors.torch import load_file, save_file

    tokenizers = {}
    for place in (CLIP_TOKENIZER_FOLDER, T5_TOKENIZER_FOLDER):
        for file in sorted((source / Path(place).name).iterdir()):
            tokenizers[folder / place / file.name] = file
    models = [folder / name for name in (DIT_FILE, CLIP_FILE, T5_FILE, VAE_FILE)]
    for path in (*models, *tokenizers):
        _require_absent(path)
    tensors = unpacked(load_file(source / "weights.safetensors"))
    contents = (
        {f"model.diffusion_model.{name}": t for name, t in _part(tensors, "dit.").items()},
        _part(tensors, "clip."),
        _part(tensors, "t5."),
        widened(_part(tensors, "vae.")),
    )
    unfinished = {path: path.with_name(path.name + ".part") for path in (*models, *tokenizers)}
    for path in unfinished:
        path.parent.mkdir(parents=True, exist_ok=True)
    for path, content in zip(models, contents, strict=True):
        in_two_bytes = {name: tensor.to(torch.bfloat16) for name, tensor in content.items()}
        save_file(in_two_bytes, unfinished[path])
    for path, file in tokenizers.items():
        shutil.copyfile(file, unfinished[path])
    for path, part in unfinished.items():
        part.replace(path)  # so that no name stands for half a file, nor for half a set
    return models


def edition(source: Path = LITTLE_WORLD) -> str:
    """Eight letters that tell these weights from those of another training."""
    return sha256((source / "weights.safetensors").read_bytes()).hexdigest()[:8]


def unpacked(packed: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """float32 from 8 bits: each 128 values of NAME in their order share a scale of `NAME:scale`.

    Tensors without scales, vectors, are float16.
    """
    tensors = {}
    for name, tensor in packed.items():
        if name.endswith(":scale"):
            continue
        tensors[name] = tensor.float()
        if f"{name}:scale" in packed:
            scales = packed[f"{name}:scale"].float().repeat_interleave(VALUES_PER_SCALE)
            tensors[name] *= scales[: tensor.numel()].view(tensor.shape)
    return tensors


def _part(tensors: "dict[str, Tensor]", prefix: str) -> "dict[str, Tensor]":
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _require_absent(path: Path) -> None:
    if path.exists():
        raise FileExistsError(
            say("{path} exists already and may be a real model; choose an empty folder.", path=path)
        )
