"""What a model file is, told from the names in its header."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..messages import later, say
from .safetensors_file import ModelFileError


@dataclass(frozen=True)
class Kind:
    """A kind of model file: how it shows, what it is called, where it belongs. Both for `say`."""

    markers: tuple[str, ...]  # any one of these inside any tensor name
    description: str
    advice: str = ""


FLUX_DIT = Kind(
    ("double_blocks.0.img_attn.qkv.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
    later("a Flux.1 transformer"),
    later("Choose it in the Majic float8 DiT loader; it belongs in models/diffusion_models."),
)
CLIP = Kind(
    ("text_model.encoder.layers.0.mlp.fc1.weight",),
    later("a CLIP text encoder"),
    later(
        "Choose it as CLIP-L in the bf16 text encoders node; it belongs in models/text_encoders."
    ),
)
T5 = Kind(
    ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    later("a T5 text encoder"),
    later("Choose it as T5 in the bf16 text encoders node; it belongs in models/text_encoders."),
)
VAE = Kind(
    ("decoder.mid.block_1.conv1.weight", "decoder.mid_block.resnets.0.conv1.weight"),
    later("a VAE"),
    later("Choose it in the Flux VAE node; it belongs in models/vae."),
)

BETTER_FILE = later("MajicFlux cannot read it; use the bf16 or float8 .safetensors.")
CHECKPOINT = later("Load it with ComfyUI's Load Checkpoint; it belongs in models/checkpoints.")

# The first kind whose marker is found is the answer, so the special comes before the general.
KINDS = (
    Kind(
        (".lora_A.", ".lora_B.", ".lora_up.", ".lora_down.", "lora_unet_"),
        later("a LoRA"),
        later("It belongs in models/loras and is applied to a transformer, not loaded as one."),
    ),
    Kind((".wscales", ".smooth_factor", ".qweight"), later("an SVDQuant (nunchaku) file"),
         BETTER_FILE),
    Kind((".quant_state.bitsandbytes", ".absmax"), later("an NF4 (bitsandbytes) file"),
         BETTER_FILE),
    Kind(("double_stream_modulation_img.",), later("a Flux.2 transformer"),
         later("MajicFlux runs Flux.1 models.")),
    Kind(("conditioner.embedders.", "label_emb.0.0.weight"), later("an SDXL checkpoint"),
         CHECKPOINT),
    Kind(("cond_stage_model.", "model.diffusion_model.input_blocks."),
         later("a Stable Diffusion 1.x or 2.x checkpoint"), CHECKPOINT),
    Kind(("controlnet_",), later("a ControlNet"), later("It belongs in models/controlnet.")),
    FLUX_DIT,
    CLIP,
    T5,
    VAE,
)  # fmt: skip


def kind_of(names: Collection[str]) -> Kind | None:
    """The kind of file that holds tensors of these names, or None when it is none we know."""
    for kind in KINDS:
        if _shows(kind, names):
            return kind
    return None


def require_kind(path: Path, names: Collection[str], wanted: Kind) -> None:
    """Raise ModelFileError, saying what the file is, unless it holds the wanted kind.

    A whole checkpoint holds several kinds at once, the transformer being the first.
    """
    found = kind_of(names)
    if found is wanted or (found is FLUX_DIT and _shows(wanted, names)):
        return
    if found is None:
        said = say(
            "{file} is not {wanted}: none of its {count} tensors has a name that MajicFlux knows. "
            "Choose another file.",
            file=path.name,
            wanted=say(wanted.description),
            count=len(names),
        )
        some = say("Its names: {names} ...", names=", ".join(sorted(names)[:3]))
        raise ModelFileError("\n".join([said, some]))
    raise ModelFileError(
        say(
            "{file} is {found}, not {wanted}. {advice}",
            file=path.name,
            found=say(found.description),
            wanted=say(wanted.description),
            advice=say(found.advice),
        )
    )


def _shows(kind: Kind, names: Collection[str]) -> bool:
    return any(marker in name for name in names for marker in kind.markers)
