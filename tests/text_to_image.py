"""The shipped graph, small, and its pictures."""

import copy
import json
from pathlib import Path

from PIL import Image

API = Path(__file__).parents[1] / "workflows" / "api" / "text_to_image.json"
ALL_NODES = {"1", "2", "3", "4", "5", "6"}
STEPS = 3
SIZE = (64, 48)  # width, height


def small() -> dict:
    graph = json.loads(API.read_text(encoding="utf-8"))
    graph["5"]["inputs"].update(width=SIZE[0], height=SIZE[1], steps=STEPS)
    return graph


def seeded(graph: dict, seed: int) -> dict:
    changed = copy.deepcopy(graph)
    changed["5"]["inputs"]["seed"] = seed
    return changed


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()
