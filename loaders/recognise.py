"""What a model file is, told from the names in its header."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..messages import later, say
from .safetensors_file import ModelFileError


@dataclass(frozen=True)
class Kind:
    """A kind of model file: how it shows, what it is called, what to do about it.

    description, advice: for `say`, the first with a field `name`.
    """

    markers: tuple[str, ...]  # any one of these inside any tensor name
    description: str
    advice: str = ""
    name: str = ""

    def __str__(self) -> str:
        return say(self.description, name=self.name)


FLUX_DIT = Kind(
    ("double_blocks.0.img_attn.qkv.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
    later("a Flux.1 transformer"),
    later("Choose it in the Majic float8 DiT loader; it belongs in models/diffusion_models."),
)
CLIP = Kind(
    ("embeddings.token_embedding.weight", "ln_final.weight"),  # of Transformers, of OpenAI
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
PARTS = (FLUX_DIT, CLIP, T5, VAE)
CONTROL_NET = Kind(
    ("controlnet_x_embedder.weight",),
    later("a ControlNet for Flux.1"),
    later("Choose it in the ControlNet node; it belongs in models/controlnet."),
)

BETTER_FILE = later("MajicFlux cannot read it; use the bf16 or float8 .safetensors.")
CHECKPOINT = later("Load it with ComfyUI's Load Checkpoint; it belongs in models/checkpoints.")
OTHER_MODEL = later("MajicFlux runs Flux.1 models.")
VARY = later(
    "MajicFlux cannot apply it; to paint by a picture use FLUX.1-Redux with ComfyUI's Apply Style "
    "Model."
)
FACES = later("MajicFlux cannot apply it: it needs further models, which read faces.")
TRANSFORMER_OF = later("a transformer of {name}")
QUANTISED = later("a file quantized by {name}")
FLUX_ENCODERS = later(
    "Flux.1 reads prompts with CLIP-L and T5-XXL: choose clip_l.safetensors and "
    "t5xxl_fp16.safetensors."
)


def named(description: str, advice: str, name: str, *markers: str) -> Kind:
    return Kind(markers, description, advice, name)


_other = partial(named, TRANSFORMER_OF, OTHER_MODEL)
_quantised = partial(named, QUANTISED, BETTER_FILE)


# It has all that a T5 has, and means something else by it.
UMT5 = Kind(
    ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",),
    later("a UMT5 text encoder, as Wan's"),
    FLUX_ENCODERS,
)

# Of each group, the first kind whose marker is found is the answer. These have tensors of the same
# names as ours.
RELATIVES = (
    Kind(("controlnet_cond_embedding.", "control_model.", "zero_convs.", "lora_controlnet",
          "lllite_"), later("a ControlNet for SDXL or Stable Diffusion"), OTHER_MODEL),
    Kind(("controlnet_", "control_net."), later("a ControlNet"), CONTROL_NET.advice),
    Kind(("double_stream_modulation_img.",), later("a Flux.2 transformer"), OTHER_MODEL),
    _other("Chroma", "distilled_guidance_layer."),
    _other("HunyuanVideo", "individual_token_refiner.", "context_embedder.token_refiner."),
    _other("Qwen-Image", "transformer_blocks.0.img_mod."),
    _other("AuraFlow", "joint_transformer_blocks.0."),
    _other("Stable Diffusion 3", "pos_embed.proj.", "joint_blocks.0."),
    _other("Ovis-Image", "img_mlp.gate_proj.", "double_blocks.0.img_mlp.up_proj."),
    UMT5,
    Kind(("DenseReluDense.wi.weight",), later("a T5 text encoder of the first version"),
         FLUX_ENCODERS),
)  # fmt: skip
CHECKPOINTS = (
    Kind(("label_emb.0.0.weight",), later("an SDXL checkpoint"), CHECKPOINT),
    Kind(("model.diffusion_model.input_blocks.",),
         later("a Stable Diffusion 1.x or 2.x checkpoint"), CHECKPOINT),
)  # fmt: skip
QUANTISATIONS = (
    _quantised("GPTQ / AWQ", ".qzeros"),
    Kind((".wscales", ".smooth_factor", ".qweight"), later("an SVDQuant (nunchaku) file"),
         BETTER_FILE),
    Kind((".quant_state.bitsandbytes", ".absmax"), later("an NF4 (bitsandbytes) file"),
         BETTER_FILE),
    _quantised("bitsandbytes", ".SCB", ".weight_format"),
    _quantised("optimum-quanto", ".weight._data"),
    _quantised("torchao", "._weight_qdata"),
    _quantised("HQQ", ".W_q"),
    _quantised("compressed-tensors", ".weight_packed", ".weight_zero_point"),
    _quantised("W4A8", ".weight_s_rel"),
    _quantised("NVFP4", ".weight_scale_2"),
    _quantised("ModelOpt", ".pre_quant_scale", ".weight_quantizer."),
    _quantised("block-wise float8", ".weight_scale_inv"),
)  # fmt: skip
LORA = Kind(
    (".lora_A", ".lora_B", ".lora_up.", ".lora_down.", ".lora.up.", ".lora.down.", "_lora1.",
     "_lora2.", "_lora.up.", "_lora.down.", "lora_unet_", "lora_transformer_", "lora_te",
     "lycoris_", ".lokr_w", ".hada_w", ".oft_blocks", ".diff_b", ".set_weight"),
    later("a LoRA"),
    later("It belongs in models/loras and is applied to a transformer, not loaded as one."),
)  # fmt: skip
OTHER_CONTROL_NET = later("MajicFlux runs those for Flux.1: Union-Pro 2.0 knows most kinds.")
# Of control nets, with tensors of the same names or none.
CONTROL_NETS = (
    Kind(("controlnet_cond_embedding.", "zero_convs.", "lora_controlnet", "lllite_"),
         later("a ControlNet for SDXL or Stable Diffusion"), OTHER_CONTROL_NET),
    Kind(("controlnet_blocks.0.linear.",), later("Mistoline's ControlNet"), OTHER_CONTROL_NET),
    Kind(("pos_embed_input.weight", "input_hint_block."),
         later("a ControlNet of XLabs, which looks at pixels"), OTHER_CONTROL_NET),
    Kind((".img_mod.", ".img_mlp.net.", "control_blocks.0."), later("a ControlNet for Qwen-Image"),
         OTHER_CONTROL_NET),
    Kind(("pos_embed_input.proj.", "pos_embed.proj."),
         later("a ControlNet for Stable Diffusion 3"), OTHER_CONTROL_NET),
)  # fmt: skip
# Of those that have nothing of ours: Flux.2's, Z-Image's and so on.
ANOTHER_CONTROL_NET = Kind(
    ("controlnet_", "control_img_in.", "control_layers."),
    later("a ControlNet for another model"),
    OTHER_CONTROL_NET,
)
INFUSENET = Kind(
    (),
    later("InfuseNet of InfiniteYou, which needs a face model that runs code when opened"),
    OTHER_CONTROL_NET,
)
OTHERS = (
    LORA,
    Kind(("ip_adapter_double_stream_", "ip_adapter_proj_model."),
         later("an IP-Adapter of XLabs"), VARY),
    Kind(("ip_adapter.", ".to_k_ip."), later("an IP-Adapter"), VARY),
    Kind(("pulid_", "id_adapter_attn_layers."), later("a PuLID model"), FACES),
    Kind(("image_proj.",), later("a part of InfiniteYou or of an IP-Adapter"), FACES),
    Kind(("redux_up.",), later("a Redux style model"),
         later("Choose it in ComfyUI's Load Style Model; it belongs in models/style_models.")),
    Kind(("layers.0.post_attention_layernorm.weight", "layers.0.mlp.gate_proj.weight"),
         later("a language model, the text encoder of other models"), FLUX_ENCODERS),
    Kind(("vision_model.encoder.layers.0.", "visual.transformer.resblocks.0."),
         later("a CLIP vision model"), later("It belongs in models/clip_vision.")),
    Kind(("taesd_", "decoder.layers.1.weight"), later("a small VAE for previews"),
         later("It belongs in models/vae_approx.")),
    _other("Wan", "blocks.0.cross_attn.norm_k.", "head.modulation"),
    _other("HiDream", "double_stream_blocks.0."),
    _other("LTX-Video", "patchify_proj."),
    _other("Z-Image / Lumina", "noise_refiner.0."),
    _other("PixArt", "t_block.1."),
    _other("SDXL / Stable Diffusion", "input_blocks.0.0.", "down_blocks.0.resnets.0."),
)  # fmt: skip


def kind_of(names: Collection[str]) -> Kind | None:
    """The kind of file that holds tensors of these names, or None when it is none we know."""
    whole = (*RELATIVES, FLUX_DIT, *CHECKPOINTS, CLIP, T5, VAE, *QUANTISATIONS, *OTHERS)
    return _first(whole, names)


def is_lora(names: Collection[str]) -> bool:
    """Whether these are the names of a LoRA, for any model."""
    return bool(_shown([LORA], names)) and not parts_in(names)


def parts_in(names: Collection[str]) -> list[Kind]:
    """The kinds of PARTS that seem to be in the file; what is not needed does not count.

    Those of a checkpoint of Stable Diffusion are not for Flux.
    """
    parts = _shown(PARTS, names)
    return [] if FLUX_DIT not in parts and _first(CHECKPOINTS, names) else parts


@contextmanager
def expecting(path: Path, names: Collection[str], wanted: Kind) -> Iterator[None]:
    """Raise ModelFileError, saying what the file is, unless it holds the wanted kind.

    So does an error that is raised within, when the file looks like another kind than the wanted.
    """
    if wanted not in parts_in(names):
        raise not_wanted(path, names, kind_of(names), wanted)
    if wanted is T5 and _first([UMT5], names):
        raise not_wanted(path, names, UMT5, wanted)
    with _told_as(path, names, (*RELATIVES, *QUANTISATIONS), wanted):
        yield


@contextmanager
def expecting_control_net(path: Path, names: Collection[str]) -> Iterator[None]:
    """The same for a control net, which is a part of no checkpoint."""
    other = _first(CONTROL_NETS, names)
    if other is None and not _shown([CONTROL_NET], names):
        other = _first([ANOTHER_CONTROL_NET], names) or kind_of(names)
    if other is not None or not _shown([CONTROL_NET], names):
        raise not_wanted(path, names, other, CONTROL_NET)
    with _told_as(path, names, QUANTISATIONS, CONTROL_NET):
        yield


@contextmanager
def _told_as(
    path: Path, names: Collection[str], kinds: Iterable[Kind], wanted: Kind
) -> Iterator[None]:
    """What is wrong with a file that looks like one of the kinds is that it is one."""
    try:
        yield
    except ModelFileError as error:
        kind = _first(kinds, names)
        if kind is None:
            raise
        raise not_wanted(path, names, kind, wanted) from error


def not_wanted(
    path: Path, names: Collection[str], found: Kind | None, wanted: Kind
) -> ModelFileError:
    """The error of a file that is of the kind `found`, None being none that we know."""
    if found is None:
        said = say(
            "{file} is not {wanted}: none of its {count} tensors has a name that MajicFlux knows. "
            "Choose another file.",
            file=path.name,
            wanted=wanted,
            count=len(names),
        )
        some = say("Its names: {names} ...", names=", ".join(sorted(names)[:3]))
        return ModelFileError("\n".join([said, some]))
    return ModelFileError(
        "{file} is {found}, not {wanted}. {advice}",
        file=path.name,
        found=found,
        wanted=wanted,
        advice=say(found.advice),
    )


def _shown(kinds: Iterable[Kind], names: Collection[str]) -> list[Kind]:
    text = "\n".join(names)  # to be searched at once
    return [kind for kind in kinds if any(marker in text for marker in kind.markers)]


def _first(kinds: Iterable[Kind], names: Collection[str]) -> Kind | None:
    return next(iter(_shown(kinds, names)), None)
