"""`majicflux bench`: how fast this card is, without model files."""

from argparse import ArgumentParser, Namespace

from ..host import current as host
from ..messages import MajicFluxError, say
from .arguments import Commands, gigabytes


def add_to(commands: Commands, common: ArgumentParser) -> None:
    bench = commands.add_parser(
        "bench", parents=[common], help="measure this card in two minutes, without model files"
    )
    bench.add_argument(
        "--vram", type=gigabytes, metavar="GB", help="the budget of a run; none: what is free"
    )
    bench.set_defaults(command=_bench)


def _bench(options: Namespace) -> None:
    device = host.compute_device()
    if device.type != "cuda":
        raise MajicFluxError(say("There is no card here that PyTorch can use: nothing to measure."))
    from ..lab.bench import bench

    print(bench(device, options.vram))
