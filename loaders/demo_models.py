"""The demo models: small trained ones in the real layouts, for a first try without downloads.

They know a little world of simple scenes, and ship with the pack in 8 bits. They are written as
the four files that the workflows name, so that everything which reads real models reads them. With
them comes a LoRA, by which they paint the same scenes as old photographs in sepia.
"""

import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from ..engine.torch_state import torch
from ..messages import say
from .full_width_vae import widened

DIT_FILE = "diffusion_models/majicflus_v134.safetensors"
CLIP_FILE = "text_encoders/clip_l.safetensors"
T5_FILE = "text_encoders/t5xxl_fp16.safetensors"
VAE_FILE = "vae/ae.safetensors"
LORA_FILE = "loras/sepia_lora.safetensors"
TEMPLATE_LORA_FILE = "loras/FLUX.1-Turbo-Alpha.safetensors"  # which a workflow names
CLIP_TOKENIZER_FOLDER = "text_encoders/tokenizer"
T5_TOKENIZER_FOLDER = "text_encoders/tokenizer_2"

LITTLE_WORLD = Path(__file__).parent / "little_world"
WEIGHTS = "weights.safetensors"
LORA = "sepia_lora.safetensors"
VALUES_PER_SCALE = 128


def write_demo_models(folder: Path, source: Path = LITTLE_WORLD) -> list[Path]:
    """Write four model files, a LoRA and two tokenizers under `folder`, in ComfyUI's subfolders.

    The same bytes at every call, about 190 MB, most of it the VAE, which has one size. The names
    are those of the shipped workflows, and a file that is there already is never replaced:
    FileExistsError tells that `folder` may hold real models. Returns all files.

    source: a folder with the weights in 8 bits, the LoRA and the two tokenizers.
    """
    from safetensors.torch import save_file

    models = [folder / name for name in (DIT_FILE, CLIP_FILE, T5_FILE, VAE_FILE)]
    copied = {folder / name: source / LORA for name in (LORA_FILE, TEMPLATE_LORA_FILE)}
    copied |= _tokenizers(folder, source)
    paths = [*models, *copied]
    for path in paths:
        _require_absent(path)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    for path, tensors in zip(models, _tensors(source / WEIGHTS), strict=True):
        save_file({n: t.to(torch.bfloat16) for n, t in tensors.items()}, _unfinished(path))
    for path, original in copied.items():
        shutil.copyfile(original, _unfinished(path))
    for path in paths:  # not before, so that no name stands for half a file or half a set
        _unfinished(path).replace(path)
    return paths


def edition(source: Path = LITTLE_WORLD) -> str:
    """Eight letters that tell these weights from those of another training."""
    files = (source / name for name in (WEIGHTS, LORA))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def unpacked(packed: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
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


def _tensors(weights: Path) -> "Iterator[dict[str, torch.Tensor]]":
    """Those of each model file, float32."""
    from safetensors.torch import load_file

    tensors = unpacked(load_file(weights))
    dit, clip, t5, vae = (_part(tensors, f"{name}.") for name in ("dit", "clip", "t5", "vae"))
    yield {f"model.diffusion_model.{name}": tensor for name, tensor in dit.items()}
    yield clip
    yield t5
    yield widened(vae)


def _part(tensors: "dict[str, torch.Tensor]", prefix: str) -> "dict[str, torch.Tensor]":
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _tokenizers(folder: Path, source: Path) -> dict[Path, Path]:
    """Where under `folder` each file of `source` goes."""
    places = (folder / CLIP_TOKENIZER_FOLDER, folder / T5_TOKENIZER_FOLDER)
    originals = ((place, file) for place in places for file in (source / place.name).iterdir())
    return {place / original.name: original for place, original in originals}


def _require_absent(path: Path) -> None:
    if path.exists():
        raise FileExistsError(
            say("{path} exists already and may be a real model; choose an empty folder.", path=path)
        )


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".part")
