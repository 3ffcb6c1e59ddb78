"""Makes ComfyUI's own DualCLIPLoader build text encoders in the sizes of the random models.

Put into custom_nodes of a test server. The files must have the rows of the real vocabularies, see
`comfyui_server.Server.real_vocabularies`.
"""

import comfy.sd

from majicflux.benchmarks.random_models import CLIP, T5

SIZES = {
    "model_config": {  # of CLIP
        "num_hidden_layers": CLIP.layers, "hidden_size": CLIP.width, "num_attention_heads": 2,
        "intermediate_size": CLIP.mlp_width, "projection_dim": CLIP.width,
    },
    "t5xxl_model_config": {
        "num_layers": T5.layers, "d_model": T5.width, "d_ff": T5.mlp_width, "d_kv": T5.head_dim,
        "num_heads": T5.heads,
    },
}  # fmt: skip
load_clip = comfy.sd.load_clip


def load_small(*args, model_options=None, **options):
    return load_clip(*args, model_options={**(model_options or {}), **SIZES}, **options)


comfy.sd.load_clip = load_small
NODE_CLASS_MAPPINGS = {}
