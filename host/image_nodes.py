"""SaveImage, PreviewImage and LoadImage for running without ComfyUI."""

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.torch_state import torch
from ..messages import MajicFluxError, say
from .schema import ComfyNode, Schema, io

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PREVIEW = "preview"  # how its pictures are named


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
        def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
            return filename_prefix is None or _verdict(_try_place, output_folder, filename_prefix)

        @classmethod
        def execute(cls, images: "Tensor", filename_prefix: str) -> Any:
            return io.NodeOutput(ui=_save(images, output_folder, filename_prefix, metadata))

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
        def validate_inputs(cls) -> bool | str:
            return _verdict(_try_place, output_folder, PREVIEW)

        @classmethod
        def execute(cls, images: "Tensor") -> Any:
            return io.NodeOutput(ui=_save(images, output_folder, PREVIEW, metadata))

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
        def validate_inputs(cls, image: str | None = None) -> bool | str:
            return image is None or _verdict(_read, input_folder, output_folder, image)

        @classmethod
        def fingerprint_inputs(cls, image: str | None = None) -> Any:
            state = image and _place(input_folder, output_folder, image).stat()
            return state and (state.st_size, state.st_mtime_ns)  # of no other under its name

        @classmethod
        def execute(cls, image: str) -> Any:
            values = torch.from_numpy(_read(input_folder, output_folder, image))[None]
            return io.NodeOutput(values[..., :3], 1 - values[..., 3])

    return {node.__name__: node for node in (SaveImage, PreviewImage, LoadImage)}


def _verdict(check: Callable[..., Any], *arguments: Any) -> bool | str:
    """What a node's `validate_inputs` returns, when `check` raises MajicFluxError for the user."""
    try:
        check(*arguments)
    except MajicFluxError as error:
        return str(error)
    return True


def _save(images: "Tensor", folder: Path, prefix: str, metadata: dict[str, Any]) -> list[Path]:
    """Float RGB [batch, height, width, 3] in 0..1 -> PREFIX_00001_.png and so on."""
    import numpy as np
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in metadata.items():
        # A graph may be nested so deeply that it can be read but not written.
        with suppress(ValueError, TypeError, RecursionError):
            info.add_text(key, json.dumps(value))
    _, height, width, _ = images.shape
    target = _target(folder, prefix, width, height)
    paths = []
    for index, image in enumerate(images):
        pixels = (image.cpu().numpy() * 255).clip(0, 255).astype(np.uint8)
        data = BytesIO()
        Image.fromarray(pixels).save(data, "PNG", pnginfo=info)
        name = target.name.replace("%batch_num%", str(index))
        paths.append(_write_new(target.with_name(name), data.getvalue()))
    return paths


def _target(folder: Path, prefix: str, width: int, height: int) -> Path:
    """The path of the pictures but for their number, from what ComfyUI takes as a prefix."""
    now = datetime.now()
    fields = {"width": width, "height": height, "year": now.year} | {
        name: f"{getattr(now, name):02d}" for name in ("month", "day", "hour", "minute", "second")
    }
    for name, value in fields.items():
        prefix = prefix.replace(f"%{name}%", str(value))
    inside, name = os.path.split(os.path.normpath(prefix))
    if name in ("", ".", "..") or not _within(folder, folder / inside):
        raise MajicFluxError(
            "The file name prefix {prefix} leads out of the output folder or names no file.",
            prefix=prefix,
        )
    return Path(os.path.realpath(folder / inside), name)


def _within(folder: Path, path: Path) -> bool:
    """Whether the path is in the folder once links are followed."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except ValueError:  # no file can have this name
        return False


def _try_place(folder: Path, prefix: str) -> None:
    """Raise MajicFluxError unless pictures can be saved under that prefix."""
    _write_new(_target(folder, prefix, 0, 0), b"").unlink()


def _write_new(target: Path, data: bytes) -> Path:
    """Write TARGET_NUMBER_.png, one more than the highest there is, as ComfyUI counts.

    No file is overwritten and no half of one stays. Raises MajicFluxError when it cannot be
    written.
    """
    start = os.path.normcase(f"{target.name}_")
    path = target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        others = [n for n in os.listdir(target.parent) if os.path.normcase(n).startswith(start)]
        numbers = (re.match(r"\d+(?=[_.]|$)", name[len(start) :]) for name in others)
        number = max((int(found[0]) for found in numbers if found), default=0)
        while True:
            number += 1
            path = target.with_name(f"{target.name}_{number:05d}_.png")
            with suppress(FileExistsError):  # of another run that began after the list was made
                file = path.open("xb")
                break
        try:
            with file:
                file.write(data)
        except BaseException:
            path.unlink()
            raise
    except (OSError, ValueError) as error:  # ValueError: a name that the system cannot encode
        raise MajicFluxError(
            "{file} cannot be written: {reason}.", file=path, reason=error
        ) from error
    return path


def picture_path(input_folder: Path, output_folder: Path, name: str) -> Path:
    """Where the picture of that name belongs; raises MajicFluxError when that is elsewhere."""
    folder = output_folder if name.endswith(" [output]") else input_folder
    path = folder / re.sub(r" \[(input|output)\]$", "", name)
    if not _within(folder, path):
        raise MajicFluxError(
            say("{file} leads out of the folder {folder}.", file=path, folder=folder)
        )
    return path


def _place(input_folder: Path, output_folder: Path, name: str) -> Path:
    """Where the picture of that name is; raises MajicFluxError when it is not there."""
    path = picture_path(input_folder, output_folder, name)
    if not path.is_file():  # a pipe would be waited for
        raise MajicFluxError(say("There is no picture {file}.", file=path))
    return path


def _read(input_folder: Path, output_folder: Path, name: str) -> "np.ndarray":
    """A picture as float32 RGBA [height, width, 4] in 0..1.

    name: in the input folder, or in that which ComfyUI puts behind it, as in `a.png [output]`.
    Raises MajicFluxError when it is not there or cannot be read.
    """
    import numpy as np
    from PIL import Image, ImageOps

    path = _place(input_folder, output_folder, name)
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
        if picture.mode.startswith(("I", "F")):  # Pillow would clip all of 16 bits at 255
            grey = np.asarray(picture).astype(np.float32)
            grey = grey if picture.mode == "F" else grey / 65535
            opaque = np.ones_like(grey)
            return np.stack([grey.clip(0, 1)] * 3 + [opaque], axis=-1)
        return np.asarray(picture.convert("RGBA")).astype(np.float32) / 255
    except Exception as error:  # anything: decoders raise many things at a damaged file
        raise MajicFluxError("{file} cannot be read: {reason}.", file=path, reason=error) from error
