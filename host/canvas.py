"""Canvas workflows and the API graphs that they stand for."""

from collections.abc import Mapping
from typing import Any

from .graph import Graph
from .schema import Schema

WIDGETS = ("BOOLEAN", "COMBO", "FLOAT", "INT", "STRING")
NOTES = ("MarkdownNote", "Note")


def node_types(canvas: dict[str, Any]) -> dict[str, str]:
    """The types of the nodes that `to_graph` gives, by their id there."""
    return {str(n["id"]): n["type"] for n in canvas["nodes"] if n["type"] not in NOTES}


def to_graph(canvas: dict[str, Any], schemas: Mapping[str, Schema]) -> Graph:
    """The API graph of a flat canvas workflow (format 0.4), as the canvas itself would queue it."""
    links = {link[0]: [str(link[1]), link[2]] for link in canvas["links"]}
    graph: Graph = {}
    for node in canvas["nodes"]:
        if node["type"] in NOTES:
            continue
        schema = schemas[node["type"]]
        # A workflow of an older version has no values yet for inputs that came later.
        inputs = dict(zip(_widget_names(schema), node["widgets_values"], strict=False))
        inputs.pop(None, None)
        linked = {i["name"]: links[i["link"]] for i in node["inputs"] if i["link"] is not None}
        title = node.get("title", schema.display_name)
        graph[str(node["id"])] = {
            "inputs": {**inputs, **linked},
            "class_type": node["type"],
            "_meta": {"title": title},
        }
    return graph


def with_values(
    canvas: dict[str, Any], graph: Graph, schemas: Mapping[str, Schema]
) -> dict[str, Any]:
    """The canvas workflow with the widget values of `graph`, a variation of its API graph."""

    def updated(node: dict[str, Any]) -> dict[str, Any]:
        if str(node["id"]) not in graph:
            return node
        inputs = graph[str(node["id"])]["inputs"]
        names = _widget_names(schemas[node["type"]])
        old = node["widgets_values"]
        values = [inputs.get(name, value) for name, value in zip(names, old, strict=False)]
        return {**node, "widgets_values": values}

    return {**canvas, "nodes": [updated(node) for node in canvas["nodes"]]}


def _widget_names(schema: Schema) -> list[str | None]:
    """The input behind each entry of `widgets_values`; None for what the canvas adds by itself."""
    names: list[str | None] = []
    for socket in schema.inputs:
        if socket.io_type in WIDGETS:
            names += [socket.id, *[None] * bool(socket.options.get("control_after_generate"))]
    return names
