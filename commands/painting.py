"""A graph runs without a server, with all nodes that a command may meet."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..host import standalone
from ..host.canvas import node_types, with_values
from ..host.graph import Graph, read_json, run_graph, set_inputs
from ..host.image_nodes import image_nodes
from ..host.schema import ComfyNode
from ..nodes import NODES


def paint(
    workflow: Path,
    graph: Graph,
    models: Path,
    output: Path,
    input_folder: Path,
    settings: Sequence[str] = (),
    change: Callable[[Graph], None] | None = None,
) -> list[Any]:
    """Run the graph; returns the paths of its pictures. change: called with it as it will run."""
    standalone.models_folder = models
    metadata: dict[str, Any] = {"prompt": graph}
    ComfyNode.hidden.extra_pnginfo = metadata
    classes = {node.define_schema().node_id: node for node in NODES}
    classes |= image_nodes(output, input_folder, metadata)
    set_inputs(graph, settings, classes)
    if change is not None:
        change(graph)
    with suppress(Exception):  # anything: a file of another shape, and no picture is lost for it
        canvas = _canvas_of(workflow)
        schemas = {name: node.define_schema() for name, node in classes.items()}
        types = {key: node["class_type"] for key, node in graph.items()}
        if canvas is not None and types == node_types(canvas):
            metadata["workflow"] = with_values(canvas, graph, schemas)
    return [path for shown in run_graph(graph, classes) for path in shown]


def _canvas_of(workflow: Path) -> dict[str, Any] | None:
    """The canvas twin of `workflows/api/NAME.json`, which is `workflows/NAME.json`."""
    twin = workflow.resolve().parent.parent / workflow.name
    return read_json(twin) if workflow.resolve().parent.name == "api" and twin.is_file() else None
