"""`majicflux batch`: many pictures with one workflow."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..messages import say
from .arguments import Commands, add_models, add_translate, numbers, positive

if TYPE_CHECKING:
    from ..batch import Batch


def add_to(commands: Commands, common: ArgumentParser) -> None:
    batch = commands.add_parser(
        "batch",
        parents=[common],
        help="paint many pictures with one workflow, on all cards; the same command goes on later",
    )
    batch.add_argument("rows", type=Path, help=".csv, .jsonl, or .txt with a prompt in each line")
    batch.add_argument(
        "--graph",
        type=Path,
        required=True,
        metavar="JSON",
        help="a workflow in API format, as in workflows/api",
    )
    batch.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where pictures and manifest go"
    )
    batch.add_argument("--input", type=Path, default=Path("input"), help="where LoadImage looks")
    batch.add_argument(
        "--repeat", type=positive, default=1, metavar="N", help="seeds for each row, by default 1"
    )
    batch.add_argument(
        "--retry-failed", action="store_true", help="try rows again that could not be painted"
    )
    where = batch.add_mutually_exclusive_group()
    where.add_argument("--gpus", type=numbers, metavar="N,N", help="which cards, by default all")
    where.add_argument(
        "--workers", type=positive, metavar="N", help="so many processes on the CPU instead"
    )
    batch.add_argument(
        "--ray",
        metavar="HOST:PORT",
        help="on all machines of the Ray cluster there; local: of one that is started here",
    )
    add_translate(batch)
    add_models(batch)
    batch.set_defaults(command=_batch)


def _batch(options: Namespace) -> None:
    from ..batch import Batch, BatchError

    batch = Batch(
        options.rows,
        options.graph,
        options.out,
        models=options.models,
        input_folder=options.input,
        gpus=options.gpus,
        workers=options.workers,
        ray=options.ray,
        repeat=options.repeat,
        translate=options.translate,
        retry_failed=options.retry_failed,
    )
    follow(batch, batch)
    if batch.failed:
        raise BatchError(
            say(
                "{failed} of {total} could not be painted; {file} says why. --retry-failed tries "
                "them again.",
                failed=batch.failed,
                total=len(batch.jobs),
                file=batch.manifest,
            )
        )


def follow(batch: "Batch", records: Iterable[dict[str, Any]]) -> None:
    """Show how a batch goes on, as it gives its records."""
    from tqdm import tqdm

    total, known = len(batch.jobs), len(batch.jobs) - len(batch.waiting)
    if known:
        print(say("{known} of {total} were done before.", known=known, total=total), flush=True)
    # disable=None: no bar where there is no terminal.
    with tqdm(total=total, initial=known, unit="", disable=None, smoothing=0.1) as bar:
        for done, record in enumerate(records, start=known + 1):
            if bar.disable:
                print(f"{done}/{total} {_outcome(record)}", flush=True)
            elif record["error"] is not None:
                bar.write(_outcome(record))
            bar.update()


def _outcome(record: dict[str, Any]) -> str:
    """Of a row of a batch, as a line."""
    if record["error"] is not None:
        return f"{record['id']}: {record['error']}"
    pictures = " ".join(record["pictures"])
    return say("{pictures}: {seconds:.1f} s", pictures=pictures, seconds=record["seconds"])
