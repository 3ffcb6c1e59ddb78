"""`majicflux compare`: what a setting changes in the pictures, measured."""

import json
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from ..host.graph import GraphError
from ..messages import say
from .arguments import Commands, add_models, numbers, positive
from .batch import follow
from .demo import DEMO_WORKFLOW

if TYPE_CHECKING:
    from ..lab.comparison import Comparison

SEEDS = 4  # by default, from 0 on
MOST_SEEDS = 1000
# The comparison of precisions that was published with the recipe: one prompt, 20 steps, a fixed
# seed and ten random ones, which have to be the same ones in each run to be compared.
PUBLISHED = "published"
PUBLISHED_PRECISIONS = "bfloat16,float8_e4m3fn unscaled,float8_e4m3fn,int8 rotated"
PUBLISHED_STEPS = 20
PUBLISHED_SEEDS = [
    0, 3626764237, 1654615998, 3255389356, 3823568514, 1806341205, 173879092, 1112038970,
    4146640122, 2195908194, 2087043557,
]  # fmt: skip


def add_to(commands: Commands, common: ArgumentParser) -> None:
    compare = commands.add_parser(
        "compare",
        parents=[common],
        help="measure what a precision or another setting changes in the pictures",
    )
    compare.add_argument(
        "--graph", type=Path, metavar="JSON", help="a workflow in API format, as in workflows/api"
    )
    compare.add_argument(
        "--preset",
        choices=[PUBLISHED],
        help="the comparison that was published with the recipe: its prompt, 20 steps, a fixed "
        "seed and ten random ones, and the four precisions",
    )
    compare.add_argument(
        "--precision", metavar="A,B", help="weight precisions, the first one being the reference"
    )
    compare.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="NODE.INPUT=A,B",
        help="any input instead; given twice, both change at once",
    )
    compare.add_argument("--prompts", type=Path, help=".txt with one a line, .csv or .jsonl")
    compare.add_argument("--seeds", type=seeds, metavar="0..7", help="or 3,5,8; by default 0..3")
    compare.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="for all pictures"
    )
    compare.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where the report goes"
    )
    compare.add_argument("--input", type=Path, default=Path("input"), help="where LoadImage looks")
    where = compare.add_mutually_exclusive_group()
    where.add_argument("--gpus", type=numbers, metavar="N,N", help="which cards, by default all")
    where.add_argument(
        "--workers", type=positive, metavar="N", help="so many processes on the CPU instead"
    )
    add_models(compare)
    compare.set_defaults(command=_compare)


def seeds(text: str) -> list[int]:
    """`0..7`, `3,5,8` or both; each once."""
    if not re.fullmatch(r"\d{1,20}(\.\.\d{1,20})?(,\d{1,20}(\.\.\d{1,20})?)*", text, re.ASCII):
        raise ArgumentTypeError(say("give seeds such as 0..7 or 3,5,8"))
    found: dict[int, None] = {}
    for part in text.split(","):
        first, _, last = part.partition("..")
        low, high = int(first), int(last or first)
        if not low <= high < low + MOST_SEEDS:
            raise ArgumentTypeError(
                say(
                    "{part}: at most {most} seeds, the smaller one first",
                    part=part,
                    most=MOST_SEEDS,
                )
            )
        found.update(dict.fromkeys(range(low, high + 1)))
    return [*found]


def _compare(options: Namespace) -> None:
    from ..batch.comparison import ComparedBatch, as_settings, precision_input

    if options.preset == PUBLISHED:
        _fill_in(options)
    if options.graph is None:
        raise GraphError(say("Give the workflow by --graph, or --preset {name}.", name=PUBLISHED))
    varied = options.vary
    if options.precision is not None:
        varied = [*varied, f"{precision_input(options.graph)}={options.precision}"]
    compared = ComparedBatch(
        options.graph,
        options.out,
        as_settings(varied),
        options.seeds or range(SEEDS),
        options.prompts,
        options.set,
        models=options.models,
        input_folder=options.input,
        gpus=options.gpus,
        workers=options.workers,
    )
    follow(compared.batch, compared)
    _report(compared.comparison(), options.out)


def _fill_in(options: Namespace) -> None:
    """What the published comparison had, where nothing else is asked for."""
    options.graph = options.graph or DEMO_WORKFLOW
    options.set = [f"steps={PUBLISHED_STEPS}", *options.set]
    options.seeds = options.seeds or PUBLISHED_SEEDS
    if not options.vary:
        options.precision = options.precision or PUBLISHED_PRECISIONS


def _report(comparison: "Comparison", folder: Path) -> None:
    """Write its three files, and print where they are."""
    from ..lab.comparison import as_dict, write_whole
    from ..lab.report_page import page
    from ..lab.report_text import markdown

    if not comparison.pairs:
        problems = next(iter(comparison.failures.values()), "")
        raise GraphError(say("No pictures could be compared. {problem}", problem=problems))
    text = json.dumps(as_dict(comparison), indent=1, ensure_ascii=False)
    contents = {"report.json": text, "report.md": markdown(comparison)}
    contents["report.html"] = page(comparison)
    for name, content in contents.items():
        write_whole(folder / name, content.encode(errors="replace"))
        print(folder / name)
