"""Graphs without ComfyUI, for tests."""

from pathlib import Path

from majicflux.host.image_nodes import image_nodes
from majicflux.host.schema import ComfyNode
from majicflux.nodes import NODES


def node_classes(folder: Path) -> dict[str, type[ComfyNode]]:
    """The pack's, and those of pictures, which are saved and looked for in `folder`."""
    own = {node.define_schema().node_id: node for node in NODES}
    return own | image_nodes(folder, folder, {"prompt": {}})


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value
