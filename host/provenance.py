"""Which runs made a picture, and so whose reports it carries.

ComfyUI writes one dict, `extra_pnginfo`, into every picture of a prompt, each value as JSON. What
the pack puts there is another JSON for each node that writes it: the runs above that node.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial, wraps
from hashlib import sha256
from typing import Any, ParamSpec, TypeAlias, TypeVar

from ..messages import log
from . import current as host
from .place import Graph, Place

KEY = "majicflux"
REMEMBERED_RUNS = 1000  # of some kB each; ComfyUI's cache holds fewer pictures

Record: TypeAlias = dict[str, Any]  # Report.as_dict(), and the seed of a run that sampled
Records: TypeAlias = Mapping[int, Record]  # of one node, by their place in its list of inputs
T = TypeVar("T")
P = ParamSpec("P")

_remembered: dict[str, Records] = {}  # by what made them, for pictures from ComfyUI's cache


class Runs(dict[str, Any]):
    """As JSON the runs above the node that executes; where none does, those of the prompt so far.

    The JSON encoder asks a subclass of dict for its items, unless it is empty.
    """

    def __init__(self) -> None:
        super().__init__(combined([]))
        self.by_node: dict[str, Records] = {}

    def add(self, node: str, records: Records) -> None:
        self.by_node[node] = records
        everything = [(key, run) for key, runs in self.by_node.items() for run in runs.values()]
        self.clear()
        self.update(combined(everything))

    def items(self) -> Any:
        place = host.executing()
        return super().items() if place is None else combined(above(place, self.by_node)).items()


def never_stops_a_picture(write: Callable[P, None]) -> Callable[P, None]:
    """Metadata has the form that some client has given it."""

    @wraps(write)
    def attempt(*given: P.args, **named: P.kwargs) -> None:
        try:
            write(*given, **named)
        except Exception as error:  # anything: whatever it is, the picture is worth more
            log.warning("The picture's metadata lack something: %r", error)

    return attempt


@never_stops_a_picture
def note_seed(hidden: Any, asked: int, seed: int) -> None:
    """Write the seed that was drawn into the graphs that are saved with the picture."""
    key = hidden.unique_id
    if key in (hidden.prompt or {}):
        hidden.prompt[key]["inputs"]["seed"] = seed
    extra = hidden.extra_pnginfo
    canvas = extra.get("workflow") if isinstance(extra, dict) else None
    for values, index in _seed_widgets(canvas, str(key).split(":")):
        if values[index] == asked:
            values[index] = seed


def _seed_widgets(canvas: Any, path: list[str]) -> Iterator[tuple[list[Any], int]]:
    """Where a saved canvas may have the seed of the node at `path`: a list and a place in it.

    path: the ids of the nodes that stand for the subgraphs around it, then its own. The former may
    show the widget as one of theirs.
    """
    level = canvas
    for depth, step in enumerate(path, start=1):
        node = next((n for n in _listed(level, "nodes") if str(n.get("id")) == step), {})
        values = node.get("widgets_values")
        values = values if isinstance(values, list) else []
        places: Iterable[int] = range(len(values))
        if depth < len(path):
            shown = (node.get("properties") or {}).get("proxyWidgets") or []
            places = [n for n in places if n < len(shown) and "seed" in str(shown[n][1])]
            defined = _listed((canvas or {}).get("definitions"), "subgraphs")
            level = next((graph for graph in defined if graph.get("id") == node.get("type")), None)
        yield from ((values, n) for n in places)  # in the node itself no other widget can be -1


def _listed(holder: Any, name: str) -> list[dict[str, Any]]:
    values = holder.get(name) if isinstance(holder, dict) else None
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []


@never_stops_a_picture
def keep(hidden: Any, record: Record) -> None:
    """Keep the record of the run that the node with these hidden inputs has just made."""
    extra, place = hidden.extra_pnginfo, host.executing()
    runs = Runs()
    if isinstance(extra, dict):  # a client may send none
        runs = extra[KEY] = extra[KEY] if isinstance(extra.get(KEY), Runs) else runs
    if place is None:
        runs.add(hidden.unique_id, {0: record})
        return
    known: dict[str, str] = {}
    for node in _sources_first(place.node, partial(_sources, graph=place.graph)):
        known[node] = _signature(node, place.graph, known)
    before = _remembered.pop(known[place.node], {})
    before = {**before, **runs.by_node.get(place.node, {})} if place.index else {}
    _remembered[known[place.node]] = records = {**before, place.index: record}
    runs.add(place.node, records)
    if len(_remembered) > REMEMBERED_RUNS:
        del _remembered[next(iter(_remembered))]


def carry(queued: dict[str, Any], kinds: Collection[str]) -> dict[str, Any]:
    """The body of POST /prompt, whose pictures will carry their runs if it has nodes of `kinds`.

    A node does the same when it runs, which one whose picture is in ComfyUI's cache does not.
    """
    # Nothing has been checked yet: whatever is not as it should be is refused later, in words.
    graph, extra = queued.get("prompt"), queued.get("extra_data")
    extra = extra.get("extra_pnginfo") if isinstance(extra, dict) else None
    nodes = graph.values() if isinstance(graph, dict) else ()
    ours = any(isinstance(node, dict) and node.get("class_type") in kinds for node in nodes)
    if isinstance(extra, dict) and ours:
        extra[KEY] = Runs()
    return queued


def above(place: Place, ran: Mapping[str, Records]) -> list[tuple[str, Record]]:
    """The runs that the node at `place` has its pictures from, sources first, with their nodes.

    ran: the runs of this prompt by node; for other nodes those are taken that were remembered.
    """
    found: dict[tuple[str, int], Record] = {}
    known: dict[str, str] = {}

    def sources(at: tuple[str, int | None]) -> list[tuple[str, int | None]]:
        key, index = at
        if place.regroups(place.graph[key]["class_type"]):
            index = None
        return [(key, index) for key in (*_sources(key, place.graph), *place.inside.get(key, ()))]

    for key, index in _sources_first((place.node, place.index), sources):
        known[key] = _signature(key, place.graph, known)
        runs = ran.get(key) or _remembered.get(known[key], {})
        if runs and index is not None:  # ComfyUI repeats the last of a list that is too short
            index = index if index in runs else max(runs)
            runs = {index: runs[index]}
        found.update({(key, each): record for each, record in runs.items()})
    return [(key, record) for (key, _), record in found.items()]


def combined(runs: list[tuple[str, Record]]) -> dict[str, Any]:
    """One record where at most one of the runs sampled, with the phases of all; else a list."""
    records = [record for _, record in runs]
    sampled = [record for record in records if "seed" in record]
    if not runs or len(sampled) > 1:
        return {"runs": [{"node": key, **record} for key, record in runs]}
    peaks = [record["peak_bytes"] for record in records if record["peak_bytes"] is not None]
    return {
        **[*records, *sampled][-1],
        "phases": [phase for record in records for phase in record["phases"]],
        "peak_bytes": max(peaks, default=None),
    }


def _sources(key: str, graph: Graph) -> list[str]:
    return [value[0] for value in graph[key]["inputs"].values() if _is_link(value, graph)]


def _is_link(value: Any, graph: Graph) -> bool:
    pair = isinstance(value, list) and len(value) == 2
    return pair and isinstance(value[0], str) and value[0] in graph


def _sources_first(start: T, sources: Callable[[T], Iterable[T]]) -> Iterator[T]:
    """`start` and all that `sources` lead to, each once, after its own sources.

    Without recursion: a loop in a graph makes a long chain.
    """
    opened, path = {start}, [(start, iter(sources(start)))]
    while path:
        for source in path[-1][1]:
            if source not in opened:
                opened.add(source)
                path.append((source, iter(sources(source))))
                break
        else:
            yield path.pop()[0]


def _signature(key: str, graph: Graph, known: Mapping[str, str]) -> str:
    """Equal for nodes that ComfyUI's cache takes for one: its class and inputs, and so all above.

    known: the signatures of its sources.
    """
    inputs = [
        [name, [known.get(value[0]), value[1]] if _is_link(value, graph) else value]
        for name, value in sorted(graph[key]["inputs"].items())
    ]
    # Nodes that other nodes make may hold objects; those are never found in the cache.
    text = json.dumps([graph[key]["class_type"], inputs], default=id, skipkeys=True)
    return sha256(text.encode()).hexdigest()
