"""`majicflux demo` and `demo-models`: the toy models that come with the pack."""

import shutil
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..host.graph import read_graph
from ..messages import command_line, say
from .arguments import Commands, picture_size
from .painting import paint

DEMO_WORKFLOW = Path(__file__).parents[1] / "workflows" / "api" / "text_to_image.json"
DEMO_FOLDER = Path("majicflux-demo")
DEMO_SIZE = (256, 256)  # that the demo models know best


def add_to(commands: Commands, common: ArgumentParser) -> None:
    demo = commands.add_parser(
        "demo", parents=[common], help="paint with the toy models that come with the pack"
    )
    demo.add_argument(
        "--prompt",
        metavar="TEXT",
        help="what to paint, in English or Chinese, such as 'a red house by day, falling snow'",
    )
    demo.add_argument("--seed", type=int, metavar="N", help="another one, another picture")
    demo.add_argument("--size", type=picture_size, default=DEMO_SIZE, metavar="WIDTHxHEIGHT")
    demo.add_argument(
        "--workflow", type=Path, default=DEMO_WORKFLOW, help="another one, in API format"
    )
    demo.set_defaults(command=_demo)

    models = commands.add_parser(
        "demo-models", parents=[common], help="write these toy models as files for ComfyUI"
    )
    models.add_argument("folder", type=Path)
    models.set_defaults(command=_demo_models)


def _demo(options: Namespace) -> None:
    graph = read_graph(options.workflow)
    width, height = options.size
    chosen = {"prompt": options.prompt, "seed": options.seed, "width": width, "height": height}
    for node in graph.values():
        for name, value in chosen.items():
            given = node["inputs"].get(name)
            if value is not None and given is not None and not isinstance(given, list):
                node["inputs"][name] = value
    models = _models_of_the_demo()
    folders = (DEMO_FOLDER / "output", DEMO_FOLDER / "input")
    for path in paint(options.workflow, graph, models, *folders):
        print(say("The picture: {path}", path=path))
    print(
        "",
        say(
            "A toy model painted it, which knows a little world only: neon cities, houses, trees, "
            "hills, snow, the sea with boats, sun and moon. Tell it what to paint, in English or "
            "Chinese:"
        ),
        f"  {_command('demo --prompt TEXT')}",
        "",
        say(
            "For pictures of everything else, download the real models, which take 34 GB of disk, "
            "and run the same workflow with them:"
        ),
        f"  {_command('download all --models FOLDER')}",
        f"  {_command(f'run {options.workflow} --models FOLDER')}",
        sep="\n",
    )


def _command(arguments: str) -> str:
    """To be copied: by the program that was installed with this Python, if there is one."""
    program = shutil.which("majicflux", path=str(Path(sys.executable).parent))
    return f"{program} {arguments}" if program else command_line(arguments)


def _models_of_the_demo() -> Path:
    """A folder with the toy models, written where this is the first demo with these weights."""
    from ..loaders.demo_models import edition, write_demo_models

    models = DEMO_FOLDER / f"models-{edition()}"
    if not models.is_dir():
        print(say("Writing the toy models to {folder} ...", folder=models), flush=True)
        partial = models.with_suffix(".part")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was stopped
        write_demo_models(partial)
        partial.rename(models)
    return models


def _demo_models(options: Namespace) -> None:
    from ..loaders.demo_models import write_demo_models

    for path in write_demo_models(options.folder):
        print(path)
    print(
        "",
        say(
            "These are toy models of a little world, not the real ones whose names they have. If "
            "{folder} is not the models folder of ComfyUI, copy what is in it there. Then open a "
            "template of MajicFlux, set the size to {width} x {height}, and press Run.",
            folder=options.folder,
            width=DEMO_SIZE[0],
            height=DEMO_SIZE[1],
        ),
        say("Delete these files before you download the real ones, which have the same names."),
        sep="\n",
    )
