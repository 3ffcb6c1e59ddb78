"""Runs API-format graphs of this pack's nodes without ComfyUI.

For a first try, for scripts and for tests; ComfyUI stays the place for everything else.
"""

from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

from ..messages import say
from . import standalone
from .place import Graph
from .schema import ComfyNode, Schema, Socket

NUMBERS = {"INT": int, "FLOAT": float}
SWITCH = {"true": True, "false": False}


class GraphError(ValueError):
    """The graph cannot be run. The message is for the user."""


def set_inputs(graph: Graph, assignments: Iterable[str]) -> None:
    """Apply assignments like `5.seed=42` or, where one node only has that input, `seed=42`.

    A value takes the type of the one it replaces. Raises GraphError for what does not fit.
    """
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        node_id, _, name = target.rpartition(".")
        holders = [key for key, node in graph.items() if name in node["inputs"]]
        if node_id:
            holders = [key for key in holders if key == node_id]
        if not equals or len(holders) != 1:
            raise GraphError(
                say(
                    "--set {assignment}: give NODE.INPUT=VALUE with one of {inputs}",
                    assignment=assignment,
                    inputs=", ".join(_settable(graph)),
                )
            )
        inputs = graph[holders[0]]["inputs"]
        kind = type(inputs[name])
        if kind is list:
            raise GraphError(
                say(
                    "--set {assignment}: that input is linked to another node.",
                    assignment=assignment,
                )
            )
        try:
            inputs[name] = SWITCH[text.lower()] if kind is bool else kind(text)
        except KeyError:
            raise GraphError(
                say("--set {assignment}: give true or false.", assignment=assignment)
            ) from None
        except ValueError:
            raise GraphError(
                say(
                    "--set {assignment}: {value!r} is not a number.",
                    assignment=assignment,
                    value=text,
                )
            ) from None


def _settable(graph: Graph) -> list[str]:
    return [
        f"{key}.{name}"
        for key, node in graph.items()
        for name, value in node["inputs"].items()
        if not isinstance(value, list)
    ]


def run_graph(graph: Graph, node_classes: Mapping[str, type[ComfyNode]]) -> list[Any]:
    """Check the whole graph, then run its output nodes and what they need, each once.

    Returns what the output nodes show (`NodeOutput.ui`). Raises GraphError before anything runs
    when the graph is not sound; what a node raises passes through.
    """
    schemas = _check(graph, node_classes)
    standalone.set_up_torch()  # not before: PyTorch takes seconds to import
    done: dict[str, tuple[Any, ...]] = {}
    shown = []
    try:
        for key in _order(graph, [k for k, s in schemas.items() if s.is_output_node]):
            inputs = {
                name: done[value[0]][value[1]] if isinstance(value, list) else value
                for name, value in graph[key]["inputs"].items()
            }
            ComfyNode.hidden.unique_id, ComfyNode.hidden.prompt = key, graph
            output = node_classes[graph[key]["class_type"]].execute(**inputs)
            done[key] = output.args
            if output.ui is not None:
                shown.append(output.ui)
    finally:
        ComfyNode.hidden.unique_id = ComfyNode.hidden.prompt = None
    return shown


def require_graph(graph: Any) -> None:
    """Raise GraphError unless this has the form of an API graph, as a canvas file has not."""
    if not isinstance(graph, dict) or not all(
        isinstance(node, dict) and "class_type" in node and isinstance(node.get("inputs"), dict)
        for node in graph.values()
    ):
        raise GraphError(
            say("This is not an API-format workflow. In ComfyUI, use Workflow > Export (API).")
        )


def _check(graph: Graph, node_classes: Mapping[str, type[ComfyNode]]) -> dict[str, Schema]:
    require_graph(graph)
    schemas = {}
    for key, node in graph.items():
        if node["class_type"] not in node_classes:
            raise GraphError(
                say(
                    "Node {key} is a {kind}, which runs in ComfyUI only. Here are: {kinds}.",
                    key=key,
                    kind=node["class_type"],
                    kinds=", ".join(sorted(node_classes)),
                )
            )
        schemas[key] = node_classes[node["class_type"]].define_schema()
    for key, node in graph.items():
        _check_node(key, node, node_classes[node["class_type"]], schemas)
    if not any(schema.is_output_node for schema in schemas.values()):
        raise GraphError(say("The workflow has no output node; add SaveImage."))
    return schemas


def _check_node(
    key: str, node: dict[str, Any], node_class: type[ComfyNode], schemas: dict[str, Schema]
) -> None:
    schema = schemas[key]
    where = say("Node {key} ({name})", key=key, name=schema.display_name)
    validate = getattr(node_class, "validate_inputs", None)
    wanted = {} if validate is None else signature(validate).parameters
    inputs = node["inputs"]
    known = {socket.id: socket for socket in schema.inputs}
    for name in inputs.keys() - known.keys():
        raise GraphError(say("{where} has no input {name}.", where=where, name=name))
    for name, socket in known.items():
        if name not in inputs:
            if not socket.optional:
                raise GraphError(say("{where} lacks the input {name}.", where=where, name=name))
        elif isinstance(inputs[name], list):
            _check_link(f"{where}, {name}", inputs[name], socket, schemas)
        else:
            inputs[name] = _checked_value(f"{where}, {name}", inputs[name], socket)
            options = socket.options.get("options", [inputs[name]])
            if name not in wanted and inputs[name] not in options:  # else the node says more
                choices = ", ".join(map(str, options))
                raise GraphError(
                    say(
                        "{where} must be one of: {choices}; not {value}.",
                        where=f"{where}, {name}",
                        choices=choices,
                        value=inputs[name],
                    )
                )
    if validate is not None:
        constants = {n: v for n, v in inputs.items() if n in wanted and not isinstance(v, list)}
        verdict = validate(**constants)
        if verdict is not True:
            raise GraphError(f"{where}: {verdict}")


def _check_link(where: str, link: list[Any], socket: Socket, schemas: dict[str, Schema]) -> None:
    source = schemas.get(str(link[0])) if len(link) == 2 else None
    if source is None or not 0 <= link[1] < len(source.outputs):
        raise GraphError(
            say("{where} is linked to {link}, which is not there.", where=where, link=link)
        )
    found = source.outputs[link[1]].io_type
    if found != socket.io_type:
        raise GraphError(
            say(
                "{where} takes {wanted}, but is linked to {found}.",
                where=where,
                wanted=socket.io_type,
                found=found,
            )
        )


def _checked_value(where: str, value: Any, socket: Socket) -> Any:
    if socket.io_type not in ("BOOLEAN", "COMBO", "STRING", *NUMBERS):
        raise GraphError(say("{where} needs a link, not {value!r}.", where=where, value=value))
    if socket.io_type not in NUMBERS:
        return value
    try:
        value = NUMBERS[socket.io_type](value)
    except (TypeError, ValueError):
        raise GraphError(
            say("{where} must be a number, not {value!r}.", where=where, value=value)
        ) from None
    low, high = socket.options.get("min"), socket.options.get("max")
    if (low is not None and value < low) or (high is not None and value > high):
        values = {"low": low, "high": high, "value": value}
        raise GraphError(
            say("{where} must be {low} to {high}, not {value}.", where=where, **values)
        )
    return value


def _order(graph: Graph, outputs: list[str]) -> list[str]:
    """The nodes that `outputs` need, sources first. Raises GraphError on a cycle."""
    ordered: list[str] = []
    visiting: set[str] = set()

    def visit(key: str) -> None:
        if key in ordered:
            return
        if key in visiting:
            raise GraphError(say("Node {key} depends on its own output.", key=key))
        visiting.add(key)
        for value in graph[key]["inputs"].values():
            if isinstance(value, list):
                visit(str(value[0]))
        ordered.append(key)

    for key in outputs:
        visit(key)
    return ordered
