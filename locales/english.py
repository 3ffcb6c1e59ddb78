"""The English texts, which are the node definitions' own: `python locales/english.py` writes them.

The other languages are translated by hand, from these.
"""

import json
from pathlib import Path
from typing import Any

from majicflux.nodes import NODES

FOLDER = Path(__file__).parent / "en"
FILES = {"file", "clip_l", "t5", "model"}  # combos whose options are the user's own files
WRITTEN = {  # by web/majicflux.js itself, which fills in words in capitals, min and max
    "stopped": "stopped",
    "missing": "INPUT is not connected.",
    "outside": "INPUT goes from min to max, it cannot be VALUE.",
    "choice": "INPUT has no choice VALUE. Press R if it is a new file.",
}
CONTROL = {  # what ComfyUI's canvas puts below a seed
    "name": "control_after_generate",
    "tooltip": "What becomes of the number above after each run.",
    "options": {name: name for name in ("fixed", "increment", "decrement", "randomize")},
}


def texts() -> dict[str, dict[str, Any]]:
    """Each file's content by its name, in the layout of ComfyUI's own locales."""
    schemas = [node.define_schema() for node in NODES]
    names = {name for schema in schemas for name in schema.category.split("/")}
    return {
        "main.json": {
            "nodeCategories": {name: name for name in sorted(names)},
            "templateWorkflows": {"category": {"majicflux": "MajicFlux"}},
            "majicflux": WRITTEN,
        },
        "nodeDefs.json": {schema.node_id: _of_node(schema) for schema in schemas},
    }


def _of_node(schema: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "display_name": schema.display_name,
        "description": schema.description,
    }
    if schema.inputs:
        found["inputs"] = {}
        for socket in schema.inputs:
            text = found["inputs"][socket.id] = {
                "name": socket.id,
                "tooltip": socket.options["tooltip"],
            }
            options = socket.options.get("options", [])
            if socket.io_type == "BOOLEAN":
                options = ["true", "false"]  # what the canvas writes on a switch
            if options and socket.id not in FILES:
                text["options"] = {option: option for option in options}
            if socket.options.get("control_after_generate"):
                found["inputs"][CONTROL["name"]] = CONTROL
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
