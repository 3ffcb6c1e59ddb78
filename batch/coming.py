"""Prompts of jobs that follow, which can be encoded while the text encoders are on the card."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

from ..host.graph import Graph, origin_of
from ..messages import MajicFluxError
from ..nodes.prompts import prompts_of
from .jobs import NodeClasses

PIPELINE = "pipeline"  # the input that brings the encoders


def prompts_to_come(
    graph: Graph, coming: Sequence[Graph], classes: NodeClasses
) -> dict[str | None, list[str]]:
    """By node, where graphs that follow have it encode texts with the same models."""
    return {
        key: [*_coming(key, node["inputs"][PIPELINE], graph, coming, classes)]
        for key, node in graph.items()
        if coming and prompts_of(node) and isinstance(node["inputs"].get(PIPELINE), list)
    }


def _coming(
    key: str, source: list, graph: Graph, coming: Sequence[Graph], classes: NodeClasses
) -> Iterator[str]:
    with suppress(MajicFluxError):  # of a graph that cannot be painted, which is told then
        origin = origin_of(graph, source[0], classes)
        for other in coming:
            same = key in other and other[key]["inputs"].get(PIPELINE) == source
            if same and origin_of(other, source[0], classes) == origin:
                yield from prompts_of(other[key]).values()
