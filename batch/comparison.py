"""The same pictures with one setting after another: painted as a batch, compared with the first."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ..host import standalone
from ..host.graph import (
    Graph,
    GraphError,
    input_named,
    is_linked,
    read_graph,
    require_sound,
    set_input,
    set_inputs,
    settable,
)
from ..host.image_nodes import image_nodes
from ..lab.comparison import Comparison, Painted, Pair, measured
from ..lab.doctor import machine
from ..lab.picture_metrics import MeasuringError, require_packages
from ..messages import say
from ..nodes import NODES
from .driver import Batch
from .jobs import SEED
from .manifest import Record
from .rows import PROMPT, BatchError, Row, read_rows

PICTURES, PAIRS = "pictures", "pairs"  # folders in that of the comparison
LONGEST_NAME = 40  # of a setting, in the names of files
PRECISION = ("MajicFluxDiTLoader", "weight_precision")


@dataclass(frozen=True)
class _Wanted:
    """A picture to be painted. label: of its setting; number: of its prompt."""

    label: str
    number: int
    prompt: str
    seed: int
    row: Row

    @property
    def id(self) -> str:
        assert self.row.id is not None
        return self.row.id

    @property
    def place(self) -> tuple[int, int]:
        """What it shares with its reference."""
        return self.number, self.seed


class ComparedBatch:
    """Pictures of one graph for each setting, prompt and seed, and what tells them apart.

    Iterate over it, once, to paint and measure: it gives the record of each picture, as the
    manifest of the batch has it. What was painted and measured before stays.
    """

    def __init__(
        self,
        graph: Path,
        output: Path,
        settings: Mapping[str, Sequence[str]],
        seeds: Sequence[int],
        prompts: Path | None = None,
        fixed: Sequence[str] = (),
        *,
        models: Path | None = None,
        input_folder: Path = Path("input"),
        gpus: Sequence[int] | None = None,
        workers: int | None = None,
    ):
        """settings: values by the names of inputs, as many of each; the first ones are what the
        others are compared with. prompts: a file of rows, None for the prompt of the graph. fixed:
        assignments for all pictures, as of `run --set`.

        Raises BatchError, GraphError or MeasuringError before anything is painted.
        """
        require_packages()
        if models is not None:
            standalone.models_folder = models
        self._output, self._name = output, graph.stem
        self._classes = {node.define_schema().node_id: node for node in NODES}
        self._classes |= image_nodes(output / PICTURES, input_folder, {})
        self._graph = read_graph(graph)
        set_inputs(self._graph, fixed, self._classes)
        self._settings = settings
        self._labels = _labels(settings)
        rows = [Row(0, None, {})] if prompts is None else read_rows(prompts)
        self._seed_inputs = [n for n in settable(self._graph) if n.rpartition(".")[2] == SEED]
        self._require_settable()
        self._require_once(rows)
        self._seeds = tuple(seeds)
        self._wanted = self._all_wanted(rows)
        self._together: dict[tuple[int, int], list[_Wanted]] = {}  # the reference first
        for wanted in self._wanted:
            self._together.setdefault(wanted.place, []).append(wanted)
        self.batch = Batch(
            [wanted.row for wanted in self._wanted],
            self._graph,
            output / PICTURES,
            input_folder=input_folder,
            gpus=gpus,
            workers=workers,
            retry_failed=True,
            latents=True,
        )
        self._records: dict[str, Record] = {}
        self._pairs: dict[str, list[Pair]] = {}
        self._failures: dict[str, str] = {}
        (output / PAIRS).mkdir(parents=True, exist_ok=True)

    def __iter__(self) -> Iterator[Record]:
        """Raises BatchError when the batch cannot go on."""
        waiting = {job.key for job in self.batch.waiting}
        for job in self.batch.jobs:
            if job.key not in waiting:
                self._records[job.id] = self.batch.record(job.key)
        places = {wanted.id: wanted.place for wanted in self._wanted}
        for record in self.batch:
            self._records[record["id"]] = record
            self._measure(places[record["id"]])  # what it can, while the cards paint
            yield record
        for place in self._together:
            self._measure(place)

    def comparison(self) -> Comparison:
        """What was found, once all is painted."""
        prompts = {wanted.number: wanted.prompt for wanted in self._wanted}
        order = [wanted.id for wanted in self._wanted]
        return Comparison(
            self._name,
            tuple(self._settings),
            self._labels,
            tuple(prompts.values()),
            self._seeds,
            tuple(pair for id in order for pair in self._pairs.get(id, ())),
            {id: self._failures[id] for id in order if id in self._failures},
            machine(),
        )

    def _all_wanted(self, rows: Sequence[Row]) -> list[_Wanted]:
        """By settings first, so that each model is loaded once."""
        names, found = _file_names(self._labels), []
        for index, label in enumerate(self._labels):
            values = {name: given[index] for name, given in self._settings.items()}
            for row in rows:
                for seed in self._seeds:
                    id = f"{names[index]}-p{row.id or row.number}-s{seed}"
                    given = {**row.values, **values, **dict.fromkeys(self._seed_inputs, seed)}
                    one = Row(len(found), id, given)
                    found.append(_Wanted(label, row.number, self._prompt(row), seed, one))
        return found

    def _prompt(self, row: Row) -> str:
        """As a reader should see it."""
        for name, value in row.values.items():
            if name.rpartition(".")[2] == PROMPT:
                return str(value)
        place = input_named(self._graph, PROMPT)
        own = self._graph[place[0]]["inputs"][place[1]] if place else None
        return own if isinstance(own, str) else row.id or ""

    def _require_once(self, rows: Sequence[Row]) -> None:
        """Raise BatchError for an input that is given by two of seeds, settings and rows."""
        if not self._seed_inputs:
            raise BatchError(say("No node of the graph has a seed that could be set."))
        columns = {name for row in rows for name in row.values}
        names = (*self._seed_inputs, *self._settings, *columns)
        counts = Counter(input_named(self._graph, name) for name in names)
        for place, count in counts.items():
            if place is not None and count > 1:
                raise _twice(".".join(place))

    def _require_settable(self) -> None:
        """Raise GraphError for a setting that the graph cannot have."""
        for name in self._settings:
            if input_named(self._graph, name) is None or is_linked(self._graph, name):
                raise GraphError(
                    say(
                        "{name} is no input of the graph that can be set. Give one of {inputs}.",
                        name=name,
                        inputs=", ".join(settable(self._graph)),
                    )
                )
        for index in range(len(self._labels)):
            graph: Graph = json.loads(json.dumps(self._graph))
            for name, values in self._settings.items():
                set_input(graph, name, values[index], self._classes, name)
            require_sound(graph, self._classes)

    def _measure(self, place: tuple[int, int]) -> None:
        """All pairs there whose two pictures are painted."""
        reference, *others = self._together[place]
        for wanted in (reference, *others):
            if wanted.id in self._records and reference.id in self._records:
                self._compare(reference, wanted)

    def _compare(self, reference: _Wanted, wanted: _Wanted) -> None:
        """Each picture of these two, one with one."""
        if wanted.id in self._pairs or wanted.id in self._failures:
            return
        ours, theirs = self._records[reference.id], self._records[wanted.id]
        if problem := theirs["error"] or (ours["error"] and say("Its reference is not there.")):
            self._failures[wanted.id] = problem
        elif wanted is not reference:
            both = zip(self._painted(ours), self._painted(theirs), strict=False)
            try:
                self._pairs[wanted.id] = [self._pair(wanted, *each) for each in both]
            except MeasuringError as error:
                self._failures[wanted.id] = str(error)

    def _painted(self, record: Record) -> list[Painted]:
        folder = self._output / PICTURES
        latents = [folder / name for name in record["latents"]]
        digests = json.dumps(record["latents"])
        return [
            Painted(folder / name, next(iter(latents), None), digest + digests)
            for name, digest in record["pictures"].items()
        ]

    def _pair(self, wanted: _Wanted, reference: Painted, picture: Painted) -> Pair:
        """Measured. Raises MeasuringError."""
        folder, id = self._output / PAIRS, picture.picture.stem
        files = reference.picture, picture.picture, folder / f"{id}.png"
        pair = Pair(id, wanted.label, wanted.prompt, wanted.seed, *files, {}, (), ())
        return measured(pair, reference, picture, folder)


def precision_input(graph: Path) -> str:
    """The name of the input that stores the transformer in another precision.

    Raises GraphError unless the graph has one such loader.
    """
    kind, name = PRECISION
    nodes = [key for key, node in read_graph(graph).items() if node["class_type"] == kind]
    if len(nodes) != 1:
        raise GraphError(
            say(
                "{file} has {count} loaders of a transformer, not one: say which by {example}",
                file=graph,
                count=len(nodes),
                example=f"--vary NODE.{name}=A,B",
            )
        )
    return f"{nodes[0]}.{name}"


def _labels(settings: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Of each setting, from the values of its inputs. Raises BatchError."""
    counts = {len(values) for values in settings.values()}
    if counts <= {0, 1} or len(counts) > 1:
        raise BatchError(
            say(
                "At least two settings are compared: give each input that varies as many values, "
                "two or more, such as {example}",
                example="--precision bfloat16,float8_e4m3fn",
            )
        )
    labels = tuple(", ".join(values) for values in zip(*settings.values(), strict=True))
    if len({*labels}) < len(labels):
        raise BatchError(say("Two settings are the same: {settings}", settings="; ".join(labels)))
    return labels


def _file_names(labels: Sequence[str]) -> list[str]:
    """What the files of each setting are named by: letters, digits, underscores; where two would
    have the same name, such as 1 and -1, its digest as well."""
    names = [re.sub(r"\W+", "_", label).strip("_")[:LONGEST_NAME] or "_" for label in labels]
    counts = Counter(map(str.casefold, names))
    digests = [sha256(label.encode(errors="replace")).hexdigest()[:8] for label in labels]
    return [
        name if counts[name.casefold()] == 1 else f"{name}_{digest}"
        for name, digest in zip(names, digests, strict=True)
    ]


def as_settings(assignments: Sequence[str]) -> dict[str, list[str]]:
    """`NODE.INPUT=a,b,c` -> values by name.

    Raises BatchError for what has another form, and for a name that is given twice.
    """
    found: dict[str, list[str]] = {}
    for assignment in assignments:
        name, equals, values = assignment.partition("=")
        if not (name and equals and values):
            raise BatchError(
                say(
                    "--vary {assignment}: give NODE.INPUT=A,B with the values to be compared.",
                    assignment=assignment,
                )
            )
        if name in found:
            raise _twice(name)
        found[name] = [value.strip() for value in values.split(",")]
    return found


def _twice(name: str) -> BatchError:
    return BatchError(
        say(
            "{name} is given twice. Seeds are given by --seeds, any other input once: by --vary or "
            "by a column.",
            name=name,
        )
    )
