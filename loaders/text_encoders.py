"""The CLIP-L and T5 files."""

import logging
import re
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.diffsynth_files import diffsynth_module
from ..engine.geometry import CLIP_HEAD_DIM, ClipGeometry, T5Geometry
from ..engine.torch_state import own_state
from ..messages import say
from .fill import Progress, fill
from .layouts import clip_layout, t5_layout
from .prepared import keep
from .recognise import CLIP, T5, Kind, require_kind
from .report import size_and_time, where_kept
from .safetensors_file import ModelFileError, SafetensorsFile
from .shards import model_parts
from .sources import Source, Sources, missing, prefix_before, require_layout, sources_of

if TYPE_CHECKING:
    import torch

    from ..engine.offload import OffloadedModule

log = logging.getLogger("majicflux")

CLIP_TOKENS = "text_model.embeddings.token_embedding.weight"
CLIP_POSITIONS = "text_model.embeddings.position_embedding.weight"
T5_POSITIONS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
T5_MLP = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"


def inspect_clip(path: Path) -> tuple[ClipGeometry, dict[str, Source]]:
    """Geometry and weights of a CLIP text encoder, from its header alone.

    Raises ModelFileError when the file is not one, or not whole.
    """
    sources = _open(path, CLIP)
    vocabulary, width = _shape(path, sources, CLIP_TOKENS, 2)
    if width % CLIP_HEAD_DIM:
        raise ModelFileError(
            say(
                "{file} is {width} wide, which is no multiple of {heads} as in every CLIP text "
                "encoder. Choose clip_l.safetensors.",
                file=path.name,
                width=width,
                heads=CLIP_HEAD_DIM,
            )
        )
    geometry = ClipGeometry(
        width=width,
        mlp_width=_shape(path, sources, CLIP.markers[0], 2)[0],
        layers=_layers(sources, r"text_model\.encoder\.layers\.(\d+)\."),
        vocabulary=vocabulary,
        positions=_shape(path, sources, CLIP_POSITIONS, 2)[0],
    )
    layout = clip_layout(geometry)
    require_layout(path, sources, layout)
    return geometry, {name: sources[name] for name in layout}


def inspect_t5(path: Path) -> tuple[T5Geometry, dict[str, Source]]:
    """Geometry and weights of a T5 encoder, in one file or in a folder of shards.

    Raises ModelFileError when it is not one, or not whole.
    """
    sources = _open(path, T5)
    vocabulary, width = _shape(path, sources, "shared.weight", 2)
    buckets, heads = _shape(path, sources, T5_POSITIONS, 2)
    geometry = T5Geometry(
        width=width,
        mlp_width=_shape(path, sources, T5_MLP, 2)[0],
        layers=_layers(sources, r"encoder\.block\.(\d+)\."),
        heads=heads,
        head_dim=_shape(path, sources, T5.markers[0], 2)[0] // heads,
        vocabulary=vocabulary,
        buckets=buckets,
    )
    layout = t5_layout(geometry)
    require_layout(path, sources, layout)
    return geometry, {name: sources[name] for name in layout}


@own_state()
def load_text_encoders(
    clip_path: Path,
    t5_path: Path,
    dtype: "torch.dtype",
    progress: Progress | None = None,
    prepared_folder: Path | None = None,
) -> "OffloadedModule":
    """Read both encoders into CPU memory in `dtype`.

    With a `prepared_folder` they are kept there, laid out as they travel, and mapped from there.
    """
    from ..engine.text_encoders import build_text_encoders

    start = time.perf_counter()
    clip_geometry, clip_sources = inspect_clip(clip_path)
    t5_geometry, t5_sources = inspect_t5(t5_path)
    weights = build_text_encoders(clip_geometry, t5_geometry, dtype)
    positions = clip_sources.pop(CLIP_POSITIONS)  # the converter would reshape this one
    names = diffsynth_module("utils.state_dict_converters.flux_text_encoder_clip")
    clip_names = names.FluxTextEncoderClipStateDictConverter(clip_sources)

    sources = {f"clip.{name}": source for name, source in clip_names.items()}
    sources |= {f"t5.{name}": source for name, source in t5_sources.items()}
    sources["clip.position_embeds"] = positions
    convert = partial(fill, weights.module, sources, progress, None)
    parts = [*model_parts(t5_path), *model_parts(clip_path)]
    mapped = prepared_folder is not None and keep(
        prepared_folder, parts, weights, f"text encoders {dtype}", convert, progress
    )
    if not mapped:
        weights.allocate()
        convert()
    weights.report = say(
        "{clip}, {t5}: text encoders, {size}, {where}",
        clip=clip_path.name,
        t5=t5_path.name,
        size=size_and_time(weights, dtype, start),
        where=where_kept(mapped),
    )
    log.info(weights.report)
    return weights


def _open(path: Path, wanted: Kind) -> dict[str, Source]:
    files = [SafetensorsFile(part) for part in model_parts(path)]
    names = [name for file in files for name in file.tensors]
    require_kind(path, names, wanted)
    return sources_of(files, prefix_before(names, wanted.markers[0]))


def _shape(path: Path, sources: Sources, name: str, axes: int) -> tuple[int, ...]:
    shape = sources[name].shape if name in sources else ()
    if len(shape) != axes or 0 in shape:
        raise missing(path, name)
    return shape


def _layers(sources: Sources, pattern: str) -> int:
    return len({m[1] for name in sources if (m := re.match(pattern, name))})
