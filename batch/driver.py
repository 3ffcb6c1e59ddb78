"""A batch: what is to be painted, by whom, and what became of it."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..host import standalone
from ..host.graph import Graph, read_graph
from ..host.image_nodes import image_nodes
from ..messages import say
from ..nodes import NODES
from ..nodes.translate import Translate, translator_of
from .cluster import LOCAL, Cluster
from .crew import Crew, Staff
from .english import English
from .jobs import Job, make_jobs
from .manifest import Manifest, Record
from .process import LocalStaff, Message
from .rows import BatchError, Row, read_rows

PARTS = ".unfinished"  # folder in that of the pictures, on the same disk
NOBODY = {"host": None, "card": None, "tries": 0}  # has painted it


class Batch:
    """Rows that are painted with a graph, into a folder; what is there already stays.

    jobs: all of them; waiting: those that will be painted. Iterate over it, once, to paint: it
    gives the record of each, as the manifest has it, in the order in which they are done.
    """

    def __init__(
        self,
        rows: Path | str | Sequence[Row],
        graph: Path | str | Graph,
        output: Path | str,
        *,
        models: Path | str | None = None,
        input_folder: Path | str = "input",
        gpus: Sequence[int] | None = None,
        workers: int | None = None,
        ray: str | None = None,
        repeat: int = 1,
        translate: str | None = None,
        retry_failed: bool = False,
        latents: bool = False,
    ):
        """rows, graph: as they are, or the files that they are read from. latents: keep those of
        each step, as a file beside the pictures.

        gpus: numbers of cards, by default all; workers: so many on the CPU instead; ray: where a
        cluster is whose machines paint, as HOST:PORT, or LOCAL; translate: folder in
        models/translation of what puts Chinese prompts into English.

        Raises BatchError or GraphError for what is wrong with all of it, before anything is
        painted.
        """
        if ray is not None and gpus is not None:
            raise BatchError(say("Cards are chosen with --gpus, machines with --ray: give one."))
        if models is not None:
            standalone.models_folder = Path(models)
        self._ray, self._workers = ray, workers
        self._cards = [] if ray is not None and ray != LOCAL else _cards(gpus, workers)
        self._output, self._input = Path(output), Path(input_folder)
        self._latents = latents
        self._graph: Graph = graph if isinstance(graph, dict) else read_graph(Path(graph))
        self._base = json.dumps(self._graph)
        self._classes = {node.define_schema().node_id: node for node in NODES}
        self._classes |= image_nodes(self._output, self._input, {})
        translator = None
        self._english = None
        if translate is not None:
            translator = translate, Translate.fingerprint_inputs(model=translate)
            self._english = English(translator_of(translate))
        rows = read_rows(Path(rows)) if isinstance(rows, (str, Path)) else rows
        self.jobs = make_jobs(rows, self._graph, self._classes, repeat, translator)
        self._manifest = Manifest(self._output)
        known = {job.key: self._manifest.record(job.key) for job in self.jobs}
        self.waiting = [job for job in self.jobs if _is_open(known[job.key], retry_failed)]

    @property
    def manifest(self) -> Path:
        return self._manifest.path

    def record(self, key: str) -> Record:
        """Of the job with this key, which was painted or failed. Raises KeyError otherwise."""
        if (record := self._manifest.record(key)) is None:
            raise KeyError(key)
        return record

    @property
    def failed(self) -> int:
        """How many jobs could not be painted, in this run or an earlier one."""
        records = (self._manifest.record(job.key) for job in self.jobs)
        return sum(record is not None and record["error"] is not None for record in records)

    def __iter__(self) -> Iterator[Record]:
        """Raises BatchError when the batch cannot go on. What was painted until then stays."""
        parts = self._output / PARTS
        shutil.rmtree(parts, ignore_errors=True)  # of a run that was killed
        try:
            for job in self.waiting:
                if job.problem is not None:
                    yield self._written(job, {"problem": job.problem, **NOBODY})
            if jobs := [job for job in self.waiting if job.problem is None]:
                yield from self._painted(jobs, parts)
        finally:
            shutil.rmtree(parts, ignore_errors=True)
            self._manifest.close()

    def _painted(self, jobs: Sequence[Job], parts: Path) -> Iterator[Record]:
        parts.mkdir(exist_ok=True)
        staff = self._staff(parts)
        crew = Crew(jobs, self._graph_of, staff)
        if self._english is not None:
            self._english.go_ahead(job.graph(self._base, self._classes) for job in jobs)
        try:
            for job, answer in crew.outcomes():
                yield self._written(job, answer)
                if answer.get("fatal"):
                    raise BatchError(answer["problem"])
        finally:
            if self._english is not None:
                self._english.stop()
            crew.stop()
            staff.close()

    def _graph_of(self, job: Job) -> Graph:
        graph = job.graph(self._base, self._classes)
        return graph if self._english is None else self._english.put_into(graph)

    def _staff(self, parts: Path) -> Staff:
        """Raises BatchError when the cluster does not answer."""
        setup = {
            "models": str(standalone.models_folder.absolute()),
            "input": str(self._input),
            "output": str(self._output),
            "parts": str(parts),
            "shared": len(self._cards),
            "latents": self._latents,
        }
        if self._ray is None:
            return LocalStaff(setup, self._cards)
        return Cluster(self._ray, setup, self._classes, self._workers, self._cards)

    def _written(self, job: Job, answer: Message) -> Record:
        record: Record = {
            "key": job.key,
            "id": job.id,
            "row": job.row,
            "seed": job.seed,
            "pictures": answer.get("pictures", {}),
            **({"latents": answer.get("latents", {})} if self._latents else {}),
            "seconds": answer.get("seconds"),
            "host": answer["host"],
            "card": answer["card"],
            "tries": answer["tries"],
            "error": answer.get("problem"),
            "report": answer.get("report"),
        }
        self._manifest.add(record)
        return record


def _is_open(record: Record | None, retry_failed: bool) -> bool:
    return record is None or (record["error"] is not None and retry_failed)


def _cards(gpus: Sequence[int] | None, workers: int | None) -> list[int | None]:
    """One for each worker, None for the CPU. Raises BatchError for a card that is not there."""
    if workers is not None:
        return [None] * workers
    import torch

    count = torch.cuda.device_count()
    if gpus is None:
        return [*range(count)] or [None]
    for card in gpus:
        if not 0 <= card < count:
            raise BatchError(
                say(
                    "There is no card {card}: this machine has {count}, counted from 0.",
                    card=card,
                    count=count,
                )
            )
    return [*gpus]
