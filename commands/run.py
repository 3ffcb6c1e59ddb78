"""`majicflux run`: one API-format workflow."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from ..host import standalone
from ..host.graph import Graph, read_graph
from ..nodes.prompts import translate_prompts
from ..nodes.translate import translator_of
from .arguments import Commands, add_models, add_translate
from .painting import paint


def add_to(commands: Commands, common: ArgumentParser) -> None:
    run = commands.add_parser("run", parents=[common], help="run an API-format workflow")
    run.add_argument(
        "workflow",
        type=Path,
        help="one of workflows/api, or exported by ComfyUI's Workflow > Export (API)",
    )
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="such as seed=42 or 5.prompt='a cat'; may be repeated",
    )
    add_models(run)
    run.add_argument("--output", type=Path, default=Path("output"), help="where pictures go")
    run.add_argument("--input", type=Path, default=Path("input"), help="where LoadImage looks")
    add_translate(run)
    run.set_defaults(command=_run)


def _run(options: Namespace) -> None:
    graph = read_graph(options.workflow)
    folders = (options.output, options.input)
    translate = None
    if options.translate is not None:
        translate = _translator(options.translate, options.models)
    for path in paint(options.workflow, graph, options.models, *folders, options.set, translate):
        print(path)


def _translator(model: str, models: Path) -> Callable[[Graph], None]:
    """A function that puts the prompts of a graph into English, and prints each that was not.

    Raises ModelFileError when there is no such translator, or it is damaged.
    """
    standalone.models_folder = models
    translate = translator_of(model)

    def on_graph(graph: Graph) -> None:
        for english in translate_prompts(graph, translate):
            print(english, flush=True)

    return on_graph
