"""The names of Diffusers for the same weights, as the names of Black Forest Labs."""

import re
from collections.abc import Iterable, Iterator

from .tensor_sources import Source, Sources, halves_swapped, stacked

# Black Forest Labs' module -> Diffusers' modules, whose rows are stacked to make it.
FLUX_ROOT = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
FLUX_DOUBLE = {
    "img_mod.lin": ["norm1.linear"],
    "txt_mod.lin": ["norm1_context.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.norm.query_norm": ["attn.norm_q"],
    "img_attn.norm.key_norm": ["attn.norm_k"],
    "txt_attn.norm.query_norm": ["attn.norm_added_q"],
    "txt_attn.norm.key_norm": ["attn.norm_added_k"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
FLUX_SINGLE = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "norm.query_norm": ["attn.norm_q"],
    "norm.key_norm": ["attn.norm_k"],
}
DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"  # Diffusers' blocks
SHIFT_AND_SCALE = "final_layer.adaLN_modulation.1"  # Diffusers keeps scale and shift

VAE_RENAMES = (
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.down_blocks\.(\d)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)


def flux_from_diffusers(sources: Sources) -> dict[str, Source]:
    """A Flux.1 transformer under the names of Black Forest Labs; what is missing stays missing."""
    renamed: dict[str, Source] = {}
    blocks = (_indices(sources, block) for block in (DOUBLE, SINGLE))
    for ours, theirs in modules_of(*blocks):
        for ending in ("weight", "bias"):
            needed = [f"{part}.{ending}" for part in theirs]
            if all(part in sources for part in needed):
                found = stacked(sources[part] for part in needed)
                # Black Forest Labs calls the weight of a norm its scale.
                kind = "scale" if ours.endswith("_norm") else ending
                swapped = ours == SHIFT_AND_SCALE
                renamed[f"{ours}.{kind}"] = halves_swapped(found) if swapped else found
    return renamed


def modules_of(double: Iterable[int], single: Iterable[int]) -> Iterator[tuple[str, list[str]]]:
    """Each module and Diffusers' for it, with the blocks of these numbers."""
    yield from FLUX_ROOT.items()
    for numbers, ours, theirs, modules in (
        (double, "double_blocks", DOUBLE, FLUX_DOUBLE),
        (single, "single_blocks", SINGLE, FLUX_SINGLE),
    ):
        for number in numbers:
            for name, parts in modules.items():
                yield f"{ours}.{number}.{name}", [f"{theirs}.{number}.{part}" for part in parts]


def vae_from_diffusers(sources: Sources) -> dict[str, Source]:
    """A Flux VAE under the names of Black Forest Labs."""
    renamed = {}
    for name, source in sources.items():
        for pattern, replacement in VAE_RENAMES:
            name = re.sub(pattern, replacement, name)
        # Diffusers counts the levels of the decoder from the smallest picture up.
        name = re.sub(r"\.up_blocks\.(\d)\.resnets\.", _level("block"), name)
        name = re.sub(r"\.up_blocks\.(\d)\.upsamplers\.0\.", _level("upsample"), name)
        renamed[name] = source
    return renamed


def _level(kind: str):
    return lambda match: f".up.{3 - int(match[1])}.{kind}."


def _indices(sources: Iterable[str], block: str) -> set[int]:
    # No Flux has a hundred blocks: a broken file that counts on would be looked through for ages.
    pattern = re.compile(rf"{block}\.(\d\d?)\.")
    return {int(match[1]) for name in sources if (match := pattern.match(name))}
