"""Where the run of a graph is, in ComfyUI or without it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Graph = dict[str, dict[str, Any]]  # node id -> {"class_type", "inputs"}


@dataclass(frozen=True)
class Place:
    """Where the run of a graph is: at `node`, with the inputs of number `index` in their lists.

    inside: the nodes that a node was replaced by while the graph ran; regroups: whether nodes of
    a class take or give whole lists, so that numbers mean nothing beyond them.
    """

    graph: Graph
    node: str
    index: int = 0
    inside: Mapping[str, Sequence[str]] = field(default_factory=dict)
    regroups: Callable[[str], bool] = lambda _: False
