"""Runs API-format graphs of this pack's nodes without ComfyUI.

For a first try, for scripts and for tests; ComfyUI stays the place for everything else.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from inspect import signature
from pathlib import Path
from reprlib import Repr
from typing import Any

from ..messages import MajicFluxError, say, title
from . import standalone
from .place import Graph
from .schema import ComfyNode, Schema, Socket

NUMBERS = {"INT": int, "FLOAT": float}
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
SWITCH = {"true": True, "false": False}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
SHOWN = Repr()  # values in messages: no more than a line of them
SHOWN.maxstring = 80


class GraphError(MajicFluxError):
    """The graph cannot be run."""


def set_inputs(
    graph: Graph, assignments: Iterable[str], node_classes: Mapping[str, type[ComfyNode]]
) -> None:
    """Apply assignments like `5.seed=42` or, where one node only has that input, `seed=42`.

    A value takes the type that its node declares. Raises GraphError for what does not fit.
    """
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        if not equals or input_named(graph, target) is None:
            raise GraphError(
                "--set {assignment}: give NODE.INPUT=VALUE with one of {inputs}",
                assignment=assignment,
                inputs=", ".join(settable(graph)),
            )
        if is_linked(graph, target):
            raise GraphError(
                "--set {assignment}: that input is linked to another node.", assignment=assignment
            )
        set_input(graph, target, text, node_classes, f"--set {target}")


def input_named(graph: Graph, target: str) -> tuple[str, str] | None:
    """Node and name of the one input that `NODE.INPUT` or `INPUT` stands for; None if none is."""
    node_id, _, name = target.rpartition(".")
    holders = [key for key, node in graph.items() if name in node["inputs"]]
    if node_id:
        holders = [key for key in holders if key == node_id]
    return (holders[0], name) if len(holders) == 1 else None


def is_linked(graph: Graph, target: str) -> bool:
    """Whether the input that is named so takes what another node gives."""
    found = input_named(graph, target)
    return found is not None and isinstance(graph[found[0]]["inputs"][found[1]], list)


def set_input(
    graph: Graph, target: str, value: Any, node_classes: Mapping[str, type[ComfyNode]], where: str
) -> None:
    """Give the input that is named so a value, in the type that its node declares.

    where: what the GraphError that is raised for a value which does not fit begins with.
    """
    found = input_named(graph, target)
    if found is None:
        raise KeyError(target)
    key, name = found
    node = graph[key]
    node["inputs"][name] = value
    if node["class_type"] not in node_classes:  # then the graph is refused for that
        return
    for socket in node_classes[node["class_type"]].define_schema().inputs:
        if socket.id == name:
            switch = socket.io_type == "BOOLEAN" and isinstance(value, str)
            value = SWITCH.get(value.lower(), value) if switch else value
            node["inputs"][name] = _checked_value(where, value, socket)


def settable(graph: Graph) -> list[str]:
    """The inputs that have a value of their own, as `NODE.INPUT`."""
    return [
        f"{key}.{name}"
        for key, node in graph.items()
        for name, value in node["inputs"].items()
        if not isinstance(value, list)
    ]


Kept = dict[str, tuple[str, tuple[Any, ...]]]  # node id -> origin of its outputs, and these


def run_graph(
    graph: Graph, node_classes: Mapping[str, type[ComfyNode]], kept: Kept | None = None
) -> list[Any]:
    """Check the whole graph, then run its output nodes and what they need, each once.

    kept: what the nodes of an earlier run gave. Those that would be fed the same again are not
    run, output nodes excepted; the others are dropped from it, and what this run gives is added.

    Returns what the output nodes show (`NodeOutput.ui`). Raises GraphError before anything runs
    when the graph is not sound; what a node raises passes through.
    """
    schemas = require_sound(graph, node_classes)
    standalone.set_up_torch()  # not before: PyTorch takes seconds to import
    order = _order(graph, [k for k, s in schemas.items() if s.is_output_node])
    origins = _origins(graph, order, node_classes)
    kept = {} if kept is None else kept
    for key in [key for key in kept if kept[key][0] != origins.get(key)]:
        del kept[key]
    shown = []
    try:
        for key in order:
            if key in kept and not schemas[key].is_output_node:
                continue
            inputs = {
                name: kept[value[0]][1][value[1]] if isinstance(value, list) else value
                for name, value in graph[key]["inputs"].items()
            }
            ComfyNode.hidden.unique_id, ComfyNode.hidden.prompt = key, graph
            output = node_classes[graph[key]["class_type"]].execute(**inputs)
            kept[key] = origins[key], output.args
            if output.ui is not None:
                shown.append(output.ui)
    finally:
        ComfyNode.hidden.unique_id = ComfyNode.hidden.prompt = None
    return shown


def origin_of(graph: Graph, key: str, node_classes: Mapping[str, type[ComfyNode]]) -> str:
    """A digest of all that the outputs of a node come from. Raises MajicFluxError."""
    return _origins(graph, _order(graph, [key]), node_classes)[key]


def _origins(
    graph: Graph, order: Sequence[str], node_classes: Mapping[str, type[ComfyNode]]
) -> dict[str, str]:
    """Of each node a digest of all that its outputs come from. order: sources first."""
    found: dict[str, str] = {}
    for key in order:
        node = graph[key]
        inputs = {
            name: [found[value[0]], value[1]] if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
        state = fingerprint(node, node_classes)
        text = json.dumps([node["class_type"], state, sorted(inputs.items())])
        found[key] = sha256(text.encode()).hexdigest()
    return found


def fingerprint(node: dict[str, Any], node_classes: Mapping[str, type[ComfyNode]]) -> Any:
    """What the node's outputs come from besides its inputs, such as the state of a file.

    Raises MajicFluxError when that is not there.
    """
    state = getattr(node_classes.get(node["class_type"]), "fingerprint_inputs", None)
    if state is None:
        return None
    return state(**{n: None if isinstance(v, list) else v for n, v in node["inputs"].items()})


def read_graph(path: Path) -> Graph:
    """Raises GraphError unless the file holds an API graph."""
    graph = read_json(path)
    try:
        require_graph(graph)
    except GraphError:
        twin = path.parent / "api" / path.name  # of a template
        if twin.is_file():
            raise GraphError(
                "This is not an API-format workflow. {file} is the same as one.", file=twin
            ) from None
        raise
    return graph


def read_json(path: Path) -> Any:
    """Raises GraphError."""
    try:
        return json.loads(path.read_bytes())  # in any of the encodings that JSON may have
    except OSError as error:
        raise GraphError("{file} cannot be opened: {reason}.", file=path, reason=error) from error
    except (ValueError, RecursionError) as error:
        if path.suffix.lower() in PICTURES:
            raise GraphError(
                "{file} is a picture. Drop it onto ComfyUI's canvas, and use Workflow > Export "
                "(API).",
                file=path,
            ) from error
        raise GraphError("{file} is not JSON: {error}.", file=path, error=error) from error


def require_graph(graph: Any) -> None:
    """Raise GraphError unless this has the form of an API graph, as a canvas file has not."""
    if not isinstance(graph, dict) or not all(
        isinstance(node, dict)
        and isinstance(node.get("class_type"), str)
        and isinstance(node.get("inputs"), dict)
        for node in graph.values()
    ):
        raise GraphError(
            "This is not an API-format workflow. In ComfyUI, use Workflow > Export (API)."
        )


def schemas_of(graph: Graph, node_classes: Mapping[str, type[ComfyNode]]) -> dict[str, Schema]:
    """Of each node; raises GraphError where one is not known here, or no output node is there."""
    require_graph(graph)
    schemas = {}
    for key, node in graph.items():
        if node["class_type"] not in node_classes:
            raise GraphError(
                "Node {key} is a {kind}, which runs in ComfyUI only. Here are: {kinds}.",
                key=key,
                kind=node["class_type"],
                kinds=", ".join(sorted(node_classes)),
            )
        schemas[key] = node_classes[node["class_type"]].define_schema()
    if not any(schema.is_output_node for schema in schemas.values()):
        raise GraphError("The workflow has no output node; add SaveImage.")
    return schemas


def require_sound(graph: Graph, node_classes: Mapping[str, type[ComfyNode]]) -> dict[str, Schema]:
    """The schema of each node; raises GraphError when the graph could not run.

    Its values take the types that their nodes declare.
    """
    schemas = schemas_of(graph, node_classes)
    # Output nodes last: they try where they write, which is for a graph that is sound.
    for key in sorted(graph, key=lambda key: schemas[key].is_output_node):
        _check_node(key, graph[key], node_classes[graph[key]["class_type"]], schemas)
    return schemas


def _check_node(
    key: str, node: dict[str, Any], node_class: type[ComfyNode], schemas: dict[str, Schema]
) -> None:
    schema = schemas[key]
    name = title(schema.node_id, schema.display_name)
    where = say("Node {key} ({name})", key=key, name=name)
    validate = getattr(node_class, "validate_inputs", None)
    wanted = {} if validate is None else signature(validate).parameters
    inputs = node["inputs"]
    known = {socket.id: socket for socket in schema.inputs}
    if "upload" not in known:  # of LoadImage's button: older canvases export it, ComfyUI ignores it
        inputs.pop("upload", None)
    for name in inputs.keys() - known.keys():
        raise GraphError("{where} has no input {name}.", where=where, name=name)
    for name, socket in known.items():
        if name not in inputs:
            if not socket.optional:
                raise GraphError("{where} lacks the input {name}.", where=where, name=name)
        elif isinstance(inputs[name], list):
            _check_link(f"{where}, {name}", inputs[name], socket, schemas)
        else:
            inputs[name] = _checked_value(f"{where}, {name}", inputs[name], socket)
            options = socket.options.get("options", [inputs[name]])
            if name not in wanted and inputs[name] not in options:  # else the node says more
                choices = ", ".join(map(str, options))
                raise GraphError(
                    "{where} must be one of: {choices}; not {value}.",
                    where=f"{where}, {name}",
                    choices=choices,
                    value=SHOWN.repr(inputs[name]),
                )
    if validate is not None:
        constants = {n: v for n, v in inputs.items() if n in wanted and not isinstance(v, list)}
        verdict = validate(**constants)
        if verdict is not True:
            raise GraphError(f"{where}: {verdict}")


def _check_link(where: str, link: list[Any], socket: Socket, schemas: dict[str, Schema]) -> None:
    is_link = len(link) == 2 and isinstance(link[0], str) and isinstance(link[1], int)
    source = schemas.get(link[0]) if is_link else None
    if source is None or not 0 <= link[1] < len(source.outputs):
        raise GraphError(
            "{where} is linked to {link}, which is not there.", where=where, link=SHOWN.repr(link)
        )
    found = source.outputs[link[1]].io_type
    if found != socket.io_type:
        raise GraphError(
            "{where} takes {wanted}, but is linked to {found}.",
            where=where,
            wanted=socket.io_type,
            found=found,
        )


def _checked_value(where: str, value: Any, socket: Socket) -> Any:
    """The value in the type of the socket, as ComfyUI converts it. Raises GraphError."""
    kind, shown = socket.io_type, SHOWN.repr(value)
    if kind in ("COMBO", "STRING"):
        # A half of a character can stand in JSON, and nowhere else.
        if not isinstance(value, (str, int, float)) or LONE_SURROGATE.search(str(value)):
            raise GraphError("{where} must be text, not {value}.", where=where, value=shown)
        return str(value)
    if kind == "BOOLEAN":
        if value not in (False, True):  # nor 0 and 1, which are equal to them
            raise GraphError(
                "{where} must be true or false, not {value}.", where=where, value=shown
            )
        return bool(value)
    if kind not in NUMBERS:
        raise GraphError("{where} needs a link, not {value}.", where=where, value=shown)
    try:
        value = NUMBERS[kind](value)
        finite = math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        finite = False
    if not finite:
        raise GraphError("{where} must be a number, not {value}.", where=where, value=shown)
    low, high = socket.options.get("min"), socket.options.get("max")
    if (low is not None and value < low) or (high is not None and value > high):
        values = {"low": low, "high": high, "value": SHOWN.repr(value)}
        raise GraphError("{where} must be {low} to {high}, not {value}.", where=where, **values)
    return value


def _order(graph: Graph, outputs: list[str]) -> list[str]:
    """The nodes that `outputs` need, sources first. Raises GraphError on a cycle."""
    ordered: dict[str, None] = {}
    waiting: set[str] = set()
    to_do = outputs[::-1]
    while to_do:
        key = to_do[-1]
        sources = [v[0] for v in graph[key]["inputs"].values() if isinstance(v, list)]
        missing = [source for source in reversed(sources) if source not in ordered]
        if key in ordered or not missing:
            ordered[to_do.pop()] = None
            waiting.discard(key)
            continue
        if key in waiting:
            raise GraphError("Node {key} depends on its own output.", key=key)
        waiting.add(key)
        to_do += missing
    return [*ordered]
