"""A small set of random models in the real layouts, for a first try without downloads."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.flux.geometry import ClipGeometry, FluxGeometry, T5Geometry
from ..messages import say
from .demo_lora import LORA_FILE, demo_lora
from .layouts import Layout, clip_layout, flux_dit_layout, t5_layout, vae_layout

if TYPE_CHECKING:
    import torch

DIT_FILE = "diffusion_models/majicflus_v134.safetensors"
CLIP_FILE = "text_encoders/clip_l.safetensors"
T5_FILE = "text_encoders/t5xxl_fp16.safetensors"
VAE_FILE = "vae/ae.safetensors"
CLIP_TOKENIZER_FOLDER = "text_encoders/tokenizer"
T5_TOKENIZER_FOLDER = "text_encoders/tokenizer_2"

CLIP_VOCABULARY = 2 * 256 + 2  # each byte inside a word and at its end, start and end of text
T5_VOCABULARY = 128  # three special pieces, the word mark and the letters of ASCII, padded

CLIP = ClipGeometry(width=128, mlp_width=256, layers=3, vocabulary=CLIP_VOCABULARY)
T5 = T5Geometry(width=192, mlp_width=256, layers=3, heads=3, vocabulary=T5_VOCABULARY)
DIT = FluxGeometry(
    hidden=256, double_blocks=2, single_blocks=4, text_width=T5.width, pooled_width=CLIP.width
)


def write_demo_models(folder: Path) -> list[Path]:
    """Write the four model files, a LoRA and two tokenizers, in ComfyUI's subfolders of `folder`.

    Random weights, the same at every call, about 170 MB, most of it the VAE, which has one size.
    The names are those of the shipped workflows, and a file that is there already is never
    replaced: FileExistsError tells that `folder` may hold real models. Returns the files.
    """
    import torch

    layouts: dict[str, Layout] = {
        DIT_FILE: {f"model.diffusion_model.{k}": s for k, s in flux_dit_layout(DIT).items()},
        CLIP_FILE: clip_layout(CLIP),
        T5_FILE: t5_layout(T5),
        VAE_FILE: vae_layout(),
    }
    paths = [folder / name for name in (*layouts, LORA_FILE)]
    for path in paths:
        if path.exists():
            raise FileExistsError(
                say(
                    "{path} exists already and may be a real model; choose an empty folder.",
                    path=path,
                )
            )
    for seed, (path, layout) in enumerate(zip(paths, layouts.values(), strict=False)):
        _write(path, random_tensors(layout, seed, torch.bfloat16))
    _write(folder / LORA_FILE, demo_lora(layouts[DIT_FILE].items()))
    _write_clip_tokenizer(folder / CLIP_TOKENIZER_FOLDER)
    _write_t5_tokenizer(folder / T5_TOKENIZER_FOLDER)
    return paths


def random_tensors(layout: Layout, seed: int, dtype: "torch.dtype") -> dict[str, "torch.Tensor"]:
    """Weights that keep the size of what passes through them, as trained ones do."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in layout.items():
        if len(shape) == 1:
            is_norm = "norm" in name and not name.endswith("bias")
            tensor = torch.full(shape, 1.0 if is_norm else 0.0)
            tensor += 0.02 * torch.randn(shape, generator=generator)
        else:
            fan_in = math.prod(shape[1:])
            tensor = torch.randn(shape, generator=generator) / math.sqrt(fan_in)
        tensors[name] = tensor.to(dtype)
    return tensors


def _write(path: Path, tensors: dict[str, "torch.Tensor"]) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    save_file(tensors, partial)
    partial.replace(path)  # so that a name never stands for half a file


def _write_clip_tokenizer(folder: Path) -> None:
    """CLIP's byte-level BPE without a single merge: every byte is a token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    # CLIP pools at the highest id, so the end of the text must come last.
    vocabulary = [*words, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: index for index, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP.positions}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _write_t5_tokenizer(folder: Path) -> None:
    """T5's SentencePiece model with single letters only; like the real one it knows no Chinese."""
    from tokenizers import Tokenizer, models

    special = ["<pad>", "</s>", "<unk>"]
    letters = ["\u2581", *(chr(code) for code in range(0x21, 0x7F))]  # word mark, printable ASCII
    pieces = [*((token, 0.0) for token in special), *((letter, -2.0) for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    Tokenizer(models.Unigram(pieces, unk_id=2)).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5TokenizerFast", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
