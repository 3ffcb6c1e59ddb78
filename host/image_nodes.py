"""SaveImage, PreviewImage and LoadImage for running without ComfyUI."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..messages import say
from .schema import ComfyNode, Schema, io

if TYPE_CHECKING:
    from torch import Tensor


def image_nodes(
    output_folder: Path, input_folder: Path, metadata: dict[str, Any]
) -> dict[str, type[ComfyNode]]:
    """The three nodes by name. Saved pictures carry `metadata` as ComfyUI's do: text of JSON."""

    class SaveImage(ComfyNode):
        @classmethod
        def define_schema(cls) -> Schema:
            prefix = io.String.Input("filename_prefix", default="ComfyUI")
            return Schema(
                node_id="SaveImage",
                display_name="Save Image",
                category="image",
                inputs=[io.Image.Input("images"), prefix],
                is_output_node=True,
            )

        @classmethod
        def execute(cls, images: "Tensor", filename_prefix: str) -> Any:
            paths = _save(images, output_folder, filename_prefix, metadata)
            return io.NodeOutput(ui=paths)

    class PreviewImage(ComfyNode):
        @classmethod
        def define_schema(cls) -> Schema:
            return Schema(
                node_id="PreviewImage",
                display_name="Preview Image",
                category="image",
                inputs=[io.Image.Input("images")],
                is_output_node=True,
            )

        @classmethod
        def execute(cls, images: "Tensor") -> Any:
            return io.NodeOutput(ui=_save(images, output_folder, "preview", metadata))

    class LoadImage(ComfyNode):
        @classmethod
        def define_schema(cls) -> Schema:
            return Schema(
                node_id="LoadImage",
                display_name="Load Image",
                category="image",
                inputs=[io.Combo.Input("image")],
                outputs=[io.Image.Output(), io.Custom("MASK").Output()],
            )

        @classmethod
        def execute(cls, image: str) -> Any:
            return io.NodeOutput(*_load(input_folder / image))

    return {node.__name__: node for node in (SaveImage, PreviewImage, LoadImage)}


def _save(images: "Tensor", folder: Path, prefix: str, metadata: dict[str, Any]) -> list[Path]:
    """Float RGB [batch, height, width, 3] in 0..1 -> PREFIX_00001_.png and so on."""
    import numpy as np
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    target = (folder / prefix).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise ValueError(
            say("The file name prefix {prefix} leads out of the output folder.", prefix=prefix)
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    for key, value in metadata.items():
        info.add_text(key, json.dumps(value))
    taken = [int(p.stem.split("_")[-2]) for p in target.parent.glob(f"{target.name}_*_.png")]
    paths = []
    for number, image in enumerate(images, start=max(taken, default=0) + 1):
        path = target.with_name(f"{target.name}_{number:05d}_.png")
        pixels = (image.cpu().numpy() * 255).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, pnginfo=info)
        paths.append(path)
    return paths


def _load(path: Path) -> tuple["Tensor", "Tensor"]:
    """A picture as float RGB [1, height, width, 3], and a mask, 1 where it is transparent."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file).convert("RGBA")
    values = torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None]
    return values[..., :3], 1 - values[..., 3]
