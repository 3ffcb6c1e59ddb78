"""Makes ComfyUI's own DualCLIPLoader take text encoders in the sizes of their files.

Put into custom_nodes of a test server. Where a tokenizer of as many entries lies beside a file, it
is taken too; else the file must have the rows of ComfyUI's own, see
`comfyui_server.Server.real_vocabularies`.
"""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import comfy.sd
import comfy.utils
from comfy.sd1_clip import SDTokenizer
from comfy.text_encoders import flux
from torch.nn import functional as F
from transformers import T5TokenizerFast

from majicflux.loaders.safetensors_file import ModelFileError
from majicflux.loaders.text_encoders import inspect_clip, inspect_t5
from majicflux.loaders.tokenizers import CLIP_TOKENIZER, T5_TOKENIZER, load_tokenizer

CLIP_HEAD_DIM = 64
CLIP_ROWS = 49408  # of ComfyUI's table, whatever the sizes say
CLIP_TABLE = "text_model.embeddings.token_embedding.weight"
load_clip, load_file = comfy.sd.load_clip, comfy.utils.load_torch_file


def clip_sizes(path: Path) -> dict[str, Any]:
    clip = inspect_clip(path)[0]
    sizes = {
        "num_hidden_layers": clip.layers, "hidden_size": clip.width,
        "num_attention_heads": clip.width // CLIP_HEAD_DIM,
        "intermediate_size": clip.mlp_width, "projection_dim": clip.width,
    }  # fmt: skip
    try:
        tokenizer = load_tokenizer(CLIP_TOKENIZER, path, clip.vocabulary, None)
    except ModelFileError:
        return sizes
    special = {
        "start": tokenizer.bos_token_id, "end": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }  # fmt: skip
    own = {"folder": tokenizer.name_or_path, "special": special}
    return sizes | own | {"eos_token_id": tokenizer.eos_token_id}


def t5_sizes(path: Path) -> dict[str, Any]:
    t5 = inspect_t5(path)[0]
    sizes = {
        "num_layers": t5.layers, "d_model": t5.width, "d_ff": t5.mlp_width,
        "d_kv": t5.head_dim, "num_heads": t5.heads, "vocab_size": t5.vocabulary,
    }  # fmt: skip
    try:
        tokenizer = load_tokenizer(T5_TOKENIZER, path, t5.vocabulary, None)
    except ModelFileError:
        return sizes
    return sizes | {"folder": tokenizer.name_or_path}


class OwnTokenizers(flux.FluxTokenizer):
    """Both from the folders beside the files."""

    clip_folder = t5_folder = ""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None):
        self.clip_l = SDTokenizer(self.clip_folder)
        self.t5xxl = SDTokenizer(
            self.t5_folder, tokenizer_class=T5TokenizerFast, embedding_key="t5xxl",
            pad_with_end=False, has_start_token=False, pad_to_max_length=False,
            max_length=99999999, min_length=256,
        )  # fmt: skip


def load_padded(path: str, *args: Any, **options: Any) -> Any:
    tensors, *rest = load_file(path, *args, **options)
    if CLIP_TABLE in tensors:
        missing = CLIP_ROWS - len(tensors[CLIP_TABLE])
        tensors[CLIP_TABLE] = F.pad(tensors[CLIP_TABLE], (0, 0, 0, missing))
    return tensors, *rest


def load_small(ckpt_paths: list[str], *args: Any, model_options: Any = None, **options: Any) -> Any:
    clip, t5 = {}, {}
    for path in map(Path, ckpt_paths):
        try:
            clip = clip_sizes(path)
        except ModelFileError:
            t5 = t5_sizes(path)
    OwnTokenizers.clip_folder, OwnTokenizers.t5_folder = (x.pop("folder", "") for x in (clip, t5))
    own = OwnTokenizers.clip_folder and OwnTokenizers.t5_folder
    special = clip.pop("special", {})
    given = {**(model_options or {}), "model_config": clip, "t5xxl_model_config": t5}
    with (
        patch.object(comfy.utils, "load_torch_file", load_padded),
        patch.object(flux, "FluxTokenizer", OwnTokenizers if own else flux.FluxTokenizer),
    ):
        loaded = load_clip(ckpt_paths, *args, model_options=given, **options)
    if own:  # at the end of the text is what CLIP says of all of it
        loaded.cond_stage_model.clip_l.special_tokens = special
    return loaded


comfy.sd.load_clip = load_small
NODE_CLASS_MAPPINGS = {}
