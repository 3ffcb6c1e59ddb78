"""The English texts, which are the node definitions' own: `python locales/english.py` writes them.

The other languages are translated by hand, from these.
"""

import json
from pathlib import Path
from typing import Any

from majicflux.nodes import NODES

FOLDER = Path(__file__).parent / "en"


def texts() -> dict[str, dict[str, Any]]:
    """Each file's content by its name, in the layout of ComfyUI's own locales."""
    schemas = [node.define_schema() for node in NODES]
    names = {name for schema in schemas for name in schema.category.split("/")}
    return {
        "main.json": {"nodeCategories": {name: name for name in sorted(names)}},
        "nodeDefs.json": {schema.node_id: _of_node(schema) for schema in schemas},
    }


def _of_node(schema: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "display_name": schema.display_name,
        "description": schema.description,
    }
    if schema.inputs:
        found["inputs"] = {
            socket.id: {"name": socket.id, "tooltip": socket.options["tooltip"]}
            for socket in schema.inputs
        }
    if schema.outputs:
        found["outputs"] = {
            str(index): {
                "name": socket.options["display_name"],
                "tooltip": socket.options["tooltip"],
            }
            for index, socket in enumerate(schema.outputs)
        }
    return found


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, content in texts().items():
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (FOLDER / name).write_text(text, encoding="utf-8")
