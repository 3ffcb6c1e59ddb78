"""`majicflux inspect`: what each precision costs a transformer, or what is in a LoRA."""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from .arguments import Commands, positive


def add_to(commands: Commands, common: ArgumentParser) -> None:
    inspect = commands.add_parser(
        "inspect",
        parents=[common],
        help="measure what each precision costs a Flux.1 transformer, or say what is in a LoRA",
    )
    inspect.add_argument("file", type=Path, help="a .safetensors, or the folder of its parts")
    inspect.add_argument(
        "--chart",
        type=Path,
        metavar="PNG",
        help="where the chart goes, by default FILE-precision.png",
    )
    inspect.add_argument(
        "--rows",
        type=positive,
        metavar="N",
        help="how many rows of each matrix are measured; more are slower and a little more exact",
    )
    inspect.set_defaults(command=_inspect)


def _inspect(options: Namespace) -> None:
    from tqdm import tqdm

    from ..lab.precision import ROWS, measure
    from ..lab.precision_chart import require_place, write_chart
    from ..lab.precision_table import table
    from ..loaders.flux_dit import inspect_flux_dit
    from ..loaders.lora import describe_lora

    path = Path(os.path.abspath(options.file))  # not resolved: a link may have the better name
    lora = describe_lora(path)
    if lora is not None:
        print(lora)
        return
    stem = path.name if path.is_dir() else path.stem
    chart = options.chart or Path(f"{stem}-precision.png")
    require_place(chart)
    geometry, sources = inspect_flux_dit(path)
    with tqdm(desc="reading", unit="B", unit_scale=True, leave=False, delay=1) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = measure(geometry, sources, options.rows or ROWS, progress)
    print(table(path.name, report))
    write_chart(chart, path.name, report)
    print(chart)
