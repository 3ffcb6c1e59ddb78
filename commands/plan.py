"""`majicflux plan`: what a VRAM budget allows, without a card."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..engine.quant.formats import PRECISIONS
from ..messages import MajicFluxError, say
from .arguments import Commands, above_zero, gigabytes, picture_size, positive


def add_to(commands: Commands, common: ArgumentParser) -> None:
    plan = commands.add_parser(
        "plan", parents=[common], help="say what a VRAM budget allows, without a card"
    )
    plan.add_argument("--vram", type=gigabytes, metavar="GB", help="the budget; none: no limit")
    plan.add_argument("--size", type=picture_size, default=(1024, 1024), metavar="WIDTHxHEIGHT")
    plan.add_argument("--batch", type=positive, default=1, metavar="N", help="pictures at once")
    plan.add_argument("--steps", type=positive, default=20, metavar="N")
    plan.add_argument(
        "--references", type=picture_size, nargs="+", default=(), metavar="WIDTHxHEIGHT",
        help="pictures that a Kontext model is shown",
    )  # fmt: skip
    plan.add_argument(
        "--control-nets", type=Path, nargs="+", default=(), metavar="FILE",
        help="ControlNets that run beside the transformer, in its precision",
    )  # fmt: skip
    plan.add_argument(
        "--file", type=Path, help="a transformer, by default one of FLUX.1-dev's sizes"
    )
    plan.add_argument(
        "--precision", choices=PRECISIONS, default="float8_e4m3fn", help="of its weights"
    )
    plan.add_argument(
        "--compute",
        choices=["8-bit", "bfloat16"],
        default="8-bit",
        help="products of 8-bit weights",
    )
    plan.add_argument(
        "--copy-rate", type=above_zero, metavar="GB/S", help="of the card, from pinned memory"
    )
    plan.add_argument(
        "--matrix-rate", type=above_zero, metavar="TFLOP/S", help="of the card, in 8 bits"
    )
    plan.add_argument("--json", action="store_true", help="everything, for programs")
    plan.set_defaults(command=_plan)


def _plan(options: Namespace) -> None:
    from ..engine.errors import BudgetTooSmallError
    from ..engine.plan.estimate import estimate_plan
    from ..engine.sizes import require_size
    from ..loaders.controlnet import inspect_control_net
    from ..loaders.flux_dit import inspect_flux_dit

    for size in (options.size, *options.references):
        for name, side in zip(("Width", "Height"), size, strict=True):
            require_size(name, side)
    if (options.copy_rate is None) != (options.matrix_rate is None):
        raise MajicFluxError(say("The time is told from --copy-rate and --matrix-rate together."))
    geometry = None if options.file is None else inspect_flux_dit(options.file)[0]
    plan = estimate_plan(
        geometry,
        PRECISIONS[options.precision],
        (*options.size, options.batch, options.steps),
        options.vram,
        options.compute == "8-bit",
        options.copy_rate,
        options.matrix_rate,
        options.references,
        [inspect_control_net(path)[0] for path in options.control_nets],
    )
    print(json.dumps(plan.as_dict(), indent=2) if options.json else plan)
    try:
        plan.require_budget()
    except BudgetTooSmallError as error:
        advice = say("Give --vram {enough} or more, or choose {smaller}.", **error.values)
        error.advise(advice)
        raise
