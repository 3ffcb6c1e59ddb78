"""Makes ComfyUI's own DualCLIPLoader build text encoders in the sizes of the files that it loads.

Put into custom_nodes of a test server. The files must have the rows of the real vocabularies, see
`comfyui_server.Server.real_vocabularies`.
"""

from collections.abc import Iterable
from pathlib import Path

import comfy.sd

from majicflux.loaders.safetensors_file import ModelFileError
from majicflux.loaders.text_encoders import inspect_clip, inspect_t5

CLIP_HEAD_DIM = 64
load_clip = comfy.sd.load_clip


def sizes_in(paths: Iterable[str]) -> dict[str, dict[str, int]]:
    """What ComfyUI calls the sizes of CLIP-L and T5."""
    sizes = {}
    for path in map(Path, paths):
        try:
            clip = inspect_clip(path)[0]
        except ModelFileError:
            t5 = inspect_t5(path)[0]
            sizes["t5xxl_model_config"] = {
                "num_layers": t5.layers, "d_model": t5.width, "d_ff": t5.mlp_width,
                "d_kv": t5.head_dim, "num_heads": t5.heads,
            }  # fmt: skip
        else:
            sizes["model_config"] = {
                "num_hidden_layers": clip.layers, "hidden_size": clip.width,
                "num_attention_heads": clip.width // CLIP_HEAD_DIM,
                "intermediate_size": clip.mlp_width, "projection_dim": clip.width,
            }  # fmt: skip
    return sizes


def load_small(ckpt_paths, *args, model_options=None, **options):
    given = {**(model_options or {}), **sizes_in(ckpt_paths)}
    return load_clip(ckpt_paths, *args, model_options=given, **options)


comfy.sd.load_clip = load_small
NODE_CLASS_MAPPINGS = {}
