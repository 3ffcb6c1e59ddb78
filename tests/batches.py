"""What batches in tests begin with and leave behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

API = Path(__file__).parents[1] / "workflows" / "api"
Save = Callable[..., Path]


def small_graph() -> dict[str, Any]:
    """From a text to a picture of 32 x 32 in one step; the node 5 samples."""
    nodes = json.loads((API / "text_to_image.json").read_text(encoding="utf-8"))
    nodes["5"]["inputs"] |= {"width": 32, "height": 32, "steps": 1}
    return nodes


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
