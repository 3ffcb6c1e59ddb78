"""Makes ComfyUI's own loaders take text encoders, SigLIP and Redux in the sizes of their files.

Put into custom_nodes of a test server. Where a tokenizer of as many entries lies beside a file, it
is taken too; else the file must have the rows of ComfyUI's own, see
`comfyui_server.Server.real_vocabularies`.
"""

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import comfy.clip_vision
import comfy.sd
import comfy.utils
from comfy.ldm.flux.redux import ReduxImageEncoder
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


def siglip_sizes(tensors: dict[str, Any]) -> dict[str, Any]:
    embeddings = "vision_model.embeddings."
    width, _, patch, _ = tensors[f"{embeddings}patch_embedding.weight"].shape
    patches = len(tensors[f"{embeddings}position_embedding.weight"])
    layers = sum(name.endswith("mlp.fc1.bias") for name in tensors)
    return {
        "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "num_channels": 3,
        "hidden_size": width, "num_attention_heads": 1, "num_hidden_layers": layers,
        "intermediate_size": len(tensors["vision_model.encoder.layers.0.mlp.fc1.bias"]),
        "patch_size": patch, "image_size": patch * math.isqrt(patches),
    }  # fmt: skip


def load_vision(tensors: dict[str, Any], *args: Any, **options: Any) -> Any:
    """SigLIP, where ComfyUI does not know the sizes."""
    found = load_clip_vision(tensors, *args, **options)
    if found is None:
        found = comfy.clip_vision.ClipVisionModel(siglip_sizes(tensors))
        missing, _ = found.load_sd(tensors)
        assert not missing
    return found


def load_redux(path: str) -> comfy.sd.StyleModel:
    tensors = load_file(path)
    model = ReduxImageEncoder(tensors["redux_up.weight"].shape[1], len(tensors["redux_down.bias"]))
    model.load_state_dict(tensors)
    return comfy.sd.StyleModel(model)


load_clip_vision = comfy.clip_vision.load_clipvision_from_sd
comfy.sd.load_clip = load_small
comfy.clip_vision.load_clipvision_from_sd = load_vision
comfy.sd.load_style_model = load_redux
NODE_CLASS_MAPPINGS = {}
