"""ComfyUI's own text encoders with the weights of the random models, in float32."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from majicflux.benchmarks.random_models import CLIP, T5
from majicflux.loaders import demo_models

FLOAT = torch.float32


def float_state(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(path).items()}


END = CLIP.vocabulary - 1  # of a text, among CLIP's ids


def their_clip(models: Path, file: str = demo_models.CLIP_FILE) -> Any:
    """file: in the names of Transformers or of OpenAI."""
    from comfy.sd1_clip import SDClipModel
    from comfy.utils import clip_text_transformers_convert

    state = float_state(models / file)
    if "transformer.resblocks.0.ln_1.weight" in state:
        state = clip_text_transformers_convert(state, "", "")
        state = {name: tensor for name, tensor in state.items() if name.startswith("text_model.")}
    positions = len(state["text_model.embeddings.position_embedding.weight"])

    config = {
        "num_hidden_layers": CLIP.layers, "hidden_size": CLIP.width, "num_attention_heads": 2,
        "intermediate_size": CLIP.mlp_width, "hidden_act": "quick_gelu", "eos_token_id": END,
        "vocab_size": CLIP.vocabulary, "max_position_embeddings": positions,
        "projection_dim": CLIP.width,
    }  # fmt: skip
    special = {"start": END - 1, "end": END, "pad": END}
    theirs = SDClipModel(
        textmodel_json_config=config, dtype=FLOAT, special_tokens=special,
        return_projected_pooled=False,
    )  # fmt: skip
    state["text_projection.weight"] = torch.eye(CLIP.width)
    table = "text_model.embeddings.token_embedding.weight"  # theirs always has CLIP-L's rows
    state[table] = torch.nn.functional.pad(state[table], (0, 0, 0, 49408 - CLIP.vocabulary))
    assert theirs.load_sd(state) == ([], [])
    return theirs


def their_t5(models: Path) -> Any:
    from comfy.sd1_clip import SDClipModel
    from comfy.text_encoders.t5 import T5 as ComfyT5

    config = {
        "num_layers": T5.layers, "d_model": T5.width, "d_ff": T5.mlp_width, "d_kv": T5.head_dim,
        "num_heads": T5.heads, "vocab_size": T5.vocabulary, "dense_act_fn": "gelu_pytorch_tanh",
        "is_gated_act": True, "model_type": "t5",
    }  # fmt: skip
    theirs = SDClipModel(
        textmodel_json_config=config, dtype=FLOAT, special_tokens={"end": 1, "pad": 0},
        model_class=ComfyT5,
    )  # fmt: skip
    assert theirs.load_sd(float_state(models / demo_models.T5_FILE)) == ([], [])
    return theirs
