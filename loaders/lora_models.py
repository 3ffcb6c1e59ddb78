"""Which model a LoRA is for, told from the names and sizes in its header."""

import re
from collections.abc import Mapping
from functools import partial

from ..messages import later
from .recognise import OTHER_MODEL, Kind, named

FLUX_LORA = Kind((), later("a LoRA for Flux.1"))
MORE_BLOCKS = Kind((), later("a LoRA for a model of more blocks than Flux.1 has"), OTHER_MODEL)
_lora_of = partial(named, later("a LoRA for {name}"), OTHER_MODEL)


FLUX_2 = _lora_of("Flux.2", "double_stream_modulation_", "_to_qkv_mlp_proj", "_ff_linear_in",
                  "_ff_context_linear_in")  # fmt: skip
SDXL, SD_1 = _lora_of("SDXL"), _lora_of("Stable Diffusion 1.x / 2.x")
SD_3 = _lora_of("Stable Diffusion 3", "joint_blocks_", "joint_transformer_blocks_")
# By what is in the names, all dots of which have become underscores.
OTHER_MODELS = (
    FLUX_2,
    _lora_of("Chroma", "distilled_guidance_layer_"),
    _lora_of("Qwen-Image", "_img_mlp_net_", "_txt_mlp_net_", "_img_mod_1", "_txt_mod_1"),
    _lora_of("HunyuanVideo", "_img_mlp_fc", "_txt_mlp_fc", "_mod_linear", "_modulation_linear",
             "_token_refiner_"),
    SD_3,
    _lora_of("HiDream", "double_stream_blocks_"),
    _lora_of("Wan", "_cross_attn_"),
    _lora_of("Z-Image / Lumina", "_attention_to_", "_attention_qkv", "noise_refiner_"),
)  # fmt: skip
UNET = re.compile(r"(?:down|up|input|output|mid|middle)_blocks?_(?:\d|attentions)")
SDXL_ONLY = re.compile(r"attentions?_\d_transformer_blocks_[1-9]|"
                       r"put_blocks_\d_1_transformer_blocks_[1-9]|lora_te2_|text_encoder_2_|"
                       r"add_embedding_|label_emb_")  # fmt: skip
SDXL_TEXT = 2048  # width of what its attention reads of the prompt
ATTENDED = re.compile(r"_attn2_to_[kv]_lora_(?:down|A)_")
CROSS = re.compile(r"_attn[12]_")
FLUX_2_WIDTH = 6144
SD_3_WIDTHS = (1536, 2432)


def lora_of_another_model(shapes: Mapping[str, tuple[int, ...]]) -> Kind | None:
    """The kind of a LoRA that is not for Flux.1, from the names and shapes of its tensors."""
    alike = {name.replace(".", "_"): shape for name, shape in shapes.items()}
    text = "\n".join(alike)
    if UNET.search(text):
        attended = (shape for name, shape in alike.items() if ATTENDED.search(name))
        of_sdxl = SDXL_ONLY.search(text) or any(SDXL_TEXT in shape for shape in attended)
        return SDXL if of_sdxl else SD_1
    for kind in OTHER_MODELS:
        if any(marker in text for marker in kind.markers):
            return kind
    return _lora_of("LTX-Video / PixArt") if CROSS.search(text) else None


def model_of_size(layer: str, rows: int, columns: int) -> Kind | None:
    """The same from the size of the change of a layer, as the engine names it."""
    mlp = layer.endswith(("to_qkv_mlp", "ff_a.0", "ff_b.0")) and rows in (6 * columns, 9 * columns)
    if mlp or (".attn." in layer and columns == FLUX_2_WIDTH):
        return FLUX_2
    return SD_3 if ".attn." in layer and columns in SD_3_WIDTHS else None
