"""A transformer file of majicflus_v134's layout and full size, made up."""

import json
import math
from pathlib import Path

from majicflux.engine.flux_dit import FluxGeometry
from majicflux.loaders.layouts import flux_dit_layout


def write_majicflus(
    path: Path, geometry: FluxGeometry | None = None, content: bytes | None = None
) -> None:
    """Write bf16 tensors of `geometry` (FLUX.1-dev's if None), `content` repeated over and over.

    Without content the file is sparse: its header is real, its tensors were never written.
    """
    header, end = {}, 0
    for name, shape in flux_dit_layout(geometry or FluxGeometry()).items():
        length = 2 * math.prod(shape)
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + length]}
        header[f"model.diffusion_model.{name}"] = entry
        end += length
    text = json.dumps(header).encode()
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if content is None:
            file.truncate(8 + len(text) + end)
        else:
            for start in range(0, end, len(content)):
                file.write(content[: end - start])
    partial.replace(path)
