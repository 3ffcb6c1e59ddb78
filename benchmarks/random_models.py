"""A small set of random models in the real layouts, for tests and measurements."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers.convert_slow_tokenizer import bytes_to_unicode

from majicflux.engine.flux.geometry import ClipGeometry, FluxGeometry, T5Geometry
from majicflux.loaders.demo_models import (
    CLIP_FILE,
    CLIP_TOKENIZER_FOLDER,
    DIT_FILE,
    T5_FILE,
    T5_TOKENIZER_FOLDER,
    TEMPLATE_LORA_FILE,
    VAE_FILE,
)
from majicflux.loaders.layouts import Layout, clip_layout, flux_dit_layout, t5_layout, vae_layout

from .random_lora import random_lora

CLIP_VOCABULARY = 2 * 256 + 2  # each byte inside a word and at its end, start and end of text
T5_VOCABULARY = 128  # three special pieces, the word mark and the letters of ASCII, padded

CLIP = ClipGeometry(width=128, mlp_width=256, layers=3, vocabulary=CLIP_VOCABULARY)
T5 = T5Geometry(width=192, mlp_width=256, layers=3, heads=3, vocabulary=T5_VOCABULARY)
DIT = FluxGeometry(
    hidden=256, double_blocks=2, single_blocks=4, text_width=T5.width, pooled_width=CLIP.width
)


def write_random_models(folder: Path) -> None:
    """Write four model files, a LoRA and two tokenizers under `folder`, in ComfyUI's subfolders.

    The names are those of the demo models, the weights the same at every call; about 170 MB, most
    of it the VAE, which has one size.
    """
    layouts: dict[str, Layout] = {
        DIT_FILE: {f"model.diffusion_model.{k}": s for k, s in flux_dit_layout(DIT).items()},
        CLIP_FILE: clip_layout(CLIP),
        T5_FILE: t5_layout(T5),
        VAE_FILE: vae_layout(),
    }
    for seed, (name, layout) in enumerate(layouts.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(random_tensors(layout, seed, torch.bfloat16), path)
    (folder / TEMPLATE_LORA_FILE).parent.mkdir(exist_ok=True)
    save_file(random_lora(layouts[DIT_FILE].items()), folder / TEMPLATE_LORA_FILE)
    write_tokenizers(folder)


def write_tokenizers(folder: Path) -> None:
    """Of CLIP_VOCABULARY and T5_VOCABULARY entries."""
    _write_clip_tokenizer(folder / CLIP_TOKENIZER_FOLDER)
    _write_t5_tokenizer(folder / T5_TOKENIZER_FOLDER)


def random_tensors(layout: Layout, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights that keep the size of what passes through them, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in layout.items():
        if len(shape) == 1:
            is_norm = "norm" in name and not name.endswith("bias")
            tensor = torch.full(shape, 1.0 if is_norm else 0.0)
            tensor += 0.02 * torch.randn(shape, generator=generator)
        else:
            deviation = 1 / math.sqrt(math.prod(shape[1:]))
            if name == "shared.weight":  # T5's vectors, which are not normalised
                deviation = 1.0
            elif name.endswith("SelfAttention.q.weight"):  # T5 does not divide its scores
                deviation /= math.sqrt(T5.head_dim)
            tensor = deviation * torch.randn(shape, generator=generator)
        tensors[name] = tensor.to(dtype)
    return tensors


def _write_clip_tokenizer(folder: Path) -> None:
    """CLIP's byte-level BPE without a single merge: every byte is a token."""
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
    special = ["<pad>", "</s>", "<unk>"]
    letters = ["\u2581", *(chr(code) for code in range(0x21, 0x7F))]  # word mark, printable ASCII
    pieces = [*((token, 0.0) for token in special), *((letter, -2.0) for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    Tokenizer(models.Unigram(pieces, unk_id=2)).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5TokenizerFast", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
