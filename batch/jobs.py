"""What is to be painted: each row, as often as it is repeated, with its seed and its key."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from ..host.graph import (
    Graph,
    fingerprint,
    input_named,
    is_linked,
    schemas_of,
    set_input,
    settable,
)
from ..host.schema import ComfyNode
from ..messages import MajicFluxError, say
from .rows import BatchError, Row

SEED = "seed"
SEED_STEP = 1000  # between two rows, which leaves seeds for so many repetitions
LONGEST_ID = 100  # characters
MOST_ID_BYTES = 220  # of the 255 that a file may be called by, with what is added
GOOD_ID = re.compile(rf"(?!\s)[\w -]{{1,{LONGEST_ID}}}(?<!\s)")
DEVICE = re.compile("con|prn|aux|nul|(com|lpt)[0-9¹²³]", re.IGNORECASE)  # on Windows

NodeClasses = Mapping[str, type[ComfyNode]]


@dataclass(frozen=True)
class Job:
    """A picture, or several where the graph paints several at once.

    id: how its files are named; row: its number; values: by the names of inputs, seeds included;
    key: of all that its pixels come from; problem: why it cannot be painted, where that is known.
    """

    id: str
    row: int
    values: dict[str, Any]
    key: str
    problem: str | None = None

    @property
    def seed(self) -> int | None:
        """Of the first node that has one."""
        return next((v for name, v in self.values.items() if _is_seed(name)), None)

    def graph(self, base: str, classes: NodeClasses) -> Graph:
        """The graph with the values of this job. base: as JSON. Raises GraphError."""
        return _filled(base, self.values, classes, self.row)


def make_jobs(
    rows: Sequence[Row], graph: Graph, classes: NodeClasses, repeat: int, translator: Any = None
) -> list[Job]:
    """translator: what tells it from others, where prompts will be translated.

    Raises BatchError or GraphError for what is wrong with all rows, or with their names.

    What is wrong with one row becomes its job's problem.
    """
    schemas_of(graph, classes)
    _require_inputs(rows, graph)
    base = json.dumps(graph)
    given = (graph, base, classes, _States(graph, classes, translator))
    jobs = [_job(row, turn, *given) for row in rows for turn in range(repeat)]
    _require_different(jobs)
    return jobs


def _require_inputs(rows: Sequence[Row], graph: Graph) -> None:
    """Raises BatchError for a column that names none, or the one that another names."""
    columns: dict[Any, str] = {}
    for name in dict.fromkeys(name for row in rows for name in row.values):
        place = input_named(graph, name)
        if place is None or is_linked(graph, name):
            raise BatchError(
                say(
                    "The column {name} is no input of the graph that can be set. Give id, or "
                    "NODE.INPUT with one of {inputs}.",
                    name=name,
                    inputs=", ".join(settable(graph)),
                )
            )
        if (first := columns.setdefault(place, name)) != name:
            raise BatchError(
                say(
                    "The columns {first} and {second} are the same input. Leave one of them.",
                    first=first,
                    second=name,
                )
            )


def _require_different(jobs: Sequence[Job]) -> None:
    rows: dict[str, int] = {}
    for job in jobs:
        first = rows.setdefault(job.id.casefold(), job.row)  # some disks take a for A
        if first != job.row:
            raise BatchError(
                say(
                    "Rows {first} and {second} would both be named {id}. Give each an id of its "
                    "own.",
                    first=first + 1,
                    second=job.row + 1,
                    id=job.id,
                )
            )


class _States:
    """What pictures come from besides graphs: the state of files, and who translates.

    Nodes that are as in the graph, as most are in each row, are asked once: with many rows, to look
    for their files took most of the time.
    """

    def __init__(self, graph: Graph, classes: NodeClasses, translator: Any):
        self._graph, self._classes = graph, classes
        self._known: dict[str, Any] = {}
        self._translator = [] if translator is None else [translator]

    def of(self, filled: Graph) -> list[Any]:
        """Raises MajicFluxError for a file that is not there."""
        return [self._of_node(key, node) for key, node in filled.items()] + self._translator

    def _of_node(self, key: str, node: dict[str, Any]) -> Any:
        if node != self._graph[key]:
            return fingerprint(node, self._classes)
        if key not in self._known:
            self._known[key] = fingerprint(node, self._classes)
        return self._known[key]


def _job(
    row: Row, turn: int, graph: Graph, base: str, classes: NodeClasses, states: _States
) -> Job:
    id = _id(row) + (f"-{turn + 1}" if turn else "")
    values = {name: value for name, value in row.values.items() if not _is_seed(name)}
    values |= {name: _seed(row, turn, graph, name) for name in _seeds(graph)}
    problem, found = None, []
    try:
        filled = _filled(base, values, classes, row.number)
        found = states.of(filled)
    except MajicFluxError as error:
        problem = str(error)
    text = json.dumps([id, graph, values, found], sort_keys=True)
    return Job(id, row.number, values, sha256(text.encode()).hexdigest()[:24], problem)


def _id(row: Row) -> str:
    """Raises BatchError when no file can have this name on every system."""
    if row.id is None:
        return f"{row.number:05d}"
    too_wide = len(row.id.encode(errors="replace")) > MOST_ID_BYTES
    if too_wide or not GOOD_ID.fullmatch(row.id) or DEVICE.fullmatch(row.id):
        raise BatchError(
            say(
                "Row {row}: the id {id} cannot name a file. Use at most {most} letters, digits, "
                "hyphens, underscores and spaces.",
                row=row.number + 1,
                id=row.id,
                most=MOST_ID_BYTES // 4 if too_wide else LONGEST_ID,
            )
        )
    return row.id


def _is_seed(name: str) -> bool:
    return name.rpartition(".")[2] == SEED


def _seeds(graph: Graph) -> list[str]:
    """The inputs that take a seed and have it not from another node, as `NODE.INPUT`."""
    return [name for name in settable(graph) if _is_seed(name)]


def _seed(row: Row, turn: int, graph: Graph, name: str) -> Any:
    """The row's own, or 1000 times its number; one more at each repetition.

    A seed below 0, which would be drawn anew in each run, is as good as none.
    """
    found = [v for n, v in row.values.items() if input_named(graph, n) == input_named(graph, name)]
    try:
        given = int(found[0]) if found else -1
    except (TypeError, ValueError, OverflowError):
        return found[0]  # is refused by its node
    return (given if given >= 0 else row.number * SEED_STEP) + turn


def _filled(base: str, values: Mapping[str, Any], classes: NodeClasses, row: int) -> Graph:
    graph = json.loads(base)
    for name, value in values.items():
        where = say("Row {row}, {name}", row=row + 1, name=name)
        set_input(graph, name, value, classes, where)
    return graph
