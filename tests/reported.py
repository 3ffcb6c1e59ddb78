"""Graphs whose pictures are saved in awkward ways, and the report that a picture carries."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

API = Path(__file__).parents[1] / "workflows" / "api"
KEY = "majicflux"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def save(source: str, prefix: str) -> dict[str, Any]:
    return node("SaveImage", images=[source, 0], filename_prefix=prefix)


def saved_late(source: str) -> dict[str, Any]:
    """Nodes that save a picture only when all that others show were made.

    ComfyUI first runs what is near to an output.
    """
    found = {f"{source}-show": node("PreviewImage", images=[source, 0])}
    for turn, above in enumerate((source, f"{source}-0", f"{source}-1")):
        found[f"{source}-{turn}"] = node("ImageInvert", image=[above, 0])
    return {**found, f"{source}-save": save(f"{source}-2", source)}


def read(path: Path) -> Any:
    with Image.open(path) as picture:
        return json.loads(picture.text[KEY])


def unsaved() -> dict[str, Any]:
    """The shipped graph without its SaveImage."""
    graph = json.loads((API / "text_to_image.json").read_text(encoding="utf-8"))
    graph["5"]["inputs"].update(width=64, height=48, steps=2)
    del graph["6"]
    return graph
