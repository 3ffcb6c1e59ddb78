"""The CLIP-L and T5 files."""

import logging
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.text_encoders import ClipGeometry, T5Geometry, build_text_encoders
from .layouts import clip_layout, t5_layout
from .recognise import CLIP, T5, Kind, require_kind
from .safetensors_file import ModelFileError, SafetensorsFile
from .tensors import Source, Sources, fill, require_layout, sources_of

if TYPE_CHECKING:
    import torch

    from ..engine.offload import OffloadedModule

log = logging.getLogger("majicflux")

CLIP_TOKENS = "text_model.embeddings.token_embedding.weight"
CLIP_POSITIONS = "text_model.embeddings.position_embedding.weight"
T5_POSITIONS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
T5_MLP = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
SHARD = re.compile(r"(?P<stem>.*)-(?P<index>\d{5})-of-(?P<total>\d{5})\.safetensors$")


def inspect_clip(path: Path) -> tuple[ClipGeometry, dict[str, Source]]:
    """Geometry and tensors of a CLIP text encoder, from its header alone.

    Raises ModelFileError when the file is not one, or not whole.
    """
    sources = _open(path, [path], CLIP)
    vocabulary, width = _shape(path, sources, CLIP_TOKENS, 2)
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
    """Geometry and tensors of a T5 encoder, in one file or in a folder of shards.

    Raises ModelFileError when it is not one, or not whole.
    """
    sources = _open(path, shards_in(path) if path.is_dir() else [path], T5)
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


def shards_in(folder: Path) -> list[Path]:
    """The files of a folder of shards named NAME-00001-of-00002.safetensors, all of them.

    Raises ModelFileError when one is missing or when the folder holds none.
    """
    shards = {path.name: m for path in folder.iterdir() if (m := SHARD.match(path.name))}
    if not shards:
        raise ModelFileError(
            f"The folder {folder.name} holds no NAME-00001-of-00002.safetensors shards."
        )
    first = next(iter(shards.values()))
    total = int(first["total"])
    names = [f"{first['stem']}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    missing = [name for name in names if name not in shards]
    if missing:
        raise ModelFileError(
            f"The folder {folder.name} lacks {', '.join(missing)}. Download it into that folder."
        )
    return [folder / name for name in names]


def load_text_encoders(
    clip_path: Path, t5_path: Path, dtype: "torch.dtype"
) -> tuple["OffloadedModule", ClipGeometry, T5Geometry]:
    """Read both encoders into CPU memory in `dtype`, tensor by tensor."""
    from diffsynth.utils.state_dict_converters.flux_text_encoder_clip import (
        FluxTextEncoderClipStateDictConverter,
    )

    start = time.perf_counter()
    clip_geometry, clip_sources = inspect_clip(clip_path)
    t5_geometry, t5_sources = inspect_t5(t5_path)
    weights = build_text_encoders(clip_geometry, t5_geometry, dtype)
    positions = clip_sources.pop(CLIP_POSITIONS)  # the converter would reshape this one
    clip_names = FluxTextEncoderClipStateDictConverter(clip_sources)
    fill(weights.module["clip"], {**clip_names, "position_embeds": positions})
    fill(weights.module["t5"], t5_sources)
    log.info(
        "%s, %s: text encoders, %.2f GB as %s, %.1f s",
        clip_path.name,
        t5_path.name,
        weights.total_bytes / 1e9,
        str(dtype).removeprefix("torch."),
        time.perf_counter() - start,
    )
    return weights, clip_geometry, t5_geometry


def _open(path: Path, files: list[Path], wanted: Kind) -> dict[str, Source]:
    opened = [SafetensorsFile(file) for file in files]
    sources = sources_of(opened)
    require_kind(path, sources, wanted)
    return sources


def _shape(path: Path, sources: Sources, name: str, axes: int) -> tuple[int, ...]:
    entry = sources[name].entry if name in sources else None
    if entry is None or len(entry.shape) != axes or 0 in entry.shape:
        raise ModelFileError(f"{path.name} is incomplete: {name} is missing. Download it again.")
    return entry.shape


def _layers(sources: Sources, pattern: str) -> int:
    return len({m[1] for name in sources if (m := re.match(pattern, name))})
