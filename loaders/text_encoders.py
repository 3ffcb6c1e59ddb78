"""The CLIP-L and T5 files."""

import re
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.diffsynth_files import diffsynth_module
from ..engine.flux.geometry import CLIP_HEAD_DIM, ClipGeometry, T5Geometry
from ..engine.torch_state import own_state, torch
from ..messages import log, say
from .convert import Progress, convert_into
from .inspect_once import inspect_once
from .layouts import blocks_in, clip_layout, t5_layout
from .recognise import CLIP, T5, expecting
from .report import size_and_time, where_kept
from .safetensors_file import ModelFileError
from .shards import files_at
from .tensor_sources import Sources, files_of, in_layout, missing, prefix_before, sources_of, split
from .weight_cache import map_or_convert

if TYPE_CHECKING:
    from ..engine.offload.offloaded_module import OffloadedModule


CLIP_TOKENS = "text_model.embeddings.token_embedding.weight"
CLIP_POSITIONS = "text_model.embeddings.position_embedding.weight"
CLIP_MLP = "text_model.encoder.layers.0.mlp.fc1.weight"
OPENAI_NAMES = (
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)
T5_TOKENS, T5_TOKENS_AGAIN = "shared.weight", "encoder.embed_tokens.weight"
T5_POSITIONS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
T5_MLP = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"


@inspect_once
def inspect_clip(path: Path) -> tuple[ClipGeometry, Sources]:
    """Geometry and weights of a CLIP text encoder, from its header alone.

    In the names of Transformers, of which version 5.6 dropped the first part, or in OpenAI's.
    Raises ModelFileError when the file is not one, or not whole.
    """
    files, names = files_at(path)
    with expecting(path, names, CLIP):
        theirs, openai = CLIP.markers
        if any(theirs in name for name in names):
            named = sources_of(files, prefix_before(names, theirs))
        else:
            named = _from_openai(sources_of(files, prefix_before(names, openai)))
        sources = {f"text_model.{name}": source for name, source in named.items()}
        vocabulary, width = _shape(path, sources, CLIP_TOKENS, 2)
        if width % CLIP_HEAD_DIM:
            raise ModelFileError(
                "{file} is {width} wide, which is no multiple of {heads} as in every CLIP text "
                "encoder. Choose clip_l.safetensors.",
                file=path.name,
                width=width,
                heads=CLIP_HEAD_DIM,
            )
        geometry = ClipGeometry(
            width=width,
            mlp_width=_shape(path, sources, CLIP_MLP, 2)[0],
            layers=blocks_in(
                path, sources, "text_model.encoder.layers.", clip_layout(ClipGeometry())
            ),
            vocabulary=vocabulary,
            positions=_shape(path, sources, CLIP_POSITIONS, 2)[0],
        )
        return geometry, in_layout(path, sources, clip_layout(geometry))


@inspect_once
def inspect_t5(path: Path) -> tuple[T5Geometry, Sources]:
    """Geometry and weights of a T5 encoder, in one file or in a folder of shards.

    Raises ModelFileError when it is not one, or not whole.
    """
    files, names = files_at(path)
    with expecting(path, names, T5):
        sources = sources_of(files, prefix_before(names, T5.markers[0]))
        if T5_TOKENS not in sources and T5_TOKENS_AGAIN in sources:
            sources[T5_TOKENS] = sources[T5_TOKENS_AGAIN]  # one table under two names
        vocabulary, width = _shape(path, sources, T5_TOKENS, 2)
        buckets, heads = _shape(path, sources, T5_POSITIONS, 2)
        geometry = T5Geometry(
            width=width,
            mlp_width=_shape(path, sources, T5_MLP, 2)[0],
            layers=blocks_in(path, sources, "encoder.block.", t5_layout(T5Geometry())),
            heads=heads,
            head_dim=_shape(path, sources, T5.markers[0], 2)[0] // heads,
            vocabulary=vocabulary,
            buckets=buckets,
        )
        return geometry, in_layout(path, sources, t5_layout(geometry))


@own_state()
def load_text_encoders(
    clip_path: Path,
    t5_path: Path,
    dtype: "torch.dtype",
    progress: Progress | None = None,
    cache_folder: Path | None = None,
) -> "OffloadedModule":
    """Read both encoders into CPU memory in `dtype`.

    With a `cache_folder` they are kept there, laid out as they travel, and mapped from there.
    """
    from ..engine.flux.text_encoders import build_text_encoders

    start = time.perf_counter()
    clip_geometry, clip_sources = inspect_clip(clip_path)
    t5_geometry, t5_sources = inspect_t5(t5_path)
    weights = build_text_encoders(clip_geometry, t5_geometry, dtype)
    # The converter would reshape the positions.
    others = {name: source for name, source in clip_sources.items() if name != CLIP_POSITIONS}
    names = diffsynth_module("utils.state_dict_converters.flux_text_encoder_clip")
    clip_names = names.FluxTextEncoderClipStateDictConverter(others)

    sources = {f"clip.{name}": source for name, source in clip_names.items()}
    sources |= {f"t5.{name}": source for name, source in t5_sources.items()}
    sources["clip.position_embeds"] = clip_sources[CLIP_POSITIONS]
    convert = partial(convert_into, weights.module, sources, progress, None)
    files = [*files_of(t5_sources), *files_of(clip_sources)]
    given = (cache_folder, files, weights, f"text encoders {dtype}", convert, progress)
    mapped = map_or_convert(*given)
    weights.report = say(
        "{clip}, {t5}: text encoders, {size}, {where}",
        clip=clip_path.name,
        t5=t5_path.name,
        size=size_and_time(weights, dtype, start),
        where=where_kept(mapped),
    )
    log.info(weights.report)
    return weights


def _from_openai(sources: Sources) -> Sources:
    """A CLIP text encoder in the names of Transformers."""
    renamed = {}
    for name, source in sources.items():
        for theirs, ours in OPENAI_NAMES:
            name = re.sub(theirs, ours, name)
        joint = re.fullmatch(r"(encoder\.layers\.\d+\.)attn\.in_proj_(weight|bias)", name)
        if joint is None:
            renamed[name] = source
            continue
        for part, rows in zip("qkv", split(source, 3), strict=True):
            renamed[f"{joint[1]}self_attn.{part}_proj.{joint[2]}"] = rows
    return renamed


def _shape(path: Path, sources: Sources, name: str, axes: int) -> tuple[int, ...]:
    shape = sources[name].shape if name in sources else ()
    if len(shape) != axes or 0 in shape:
        raise missing(path, name)
    return shape
