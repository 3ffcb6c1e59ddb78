"""`majicflux doctor`: what this machine has."""

import sys
from argparse import ArgumentParser, Namespace

from ..host import standalone
from ..messages import say
from .arguments import Commands, add_models


def add_to(commands: Commands, common: ArgumentParser) -> None:
    doctor = commands.add_parser(
        "doctor", parents=[common], help="say what this machine has, for a bug report"
    )
    add_models(doctor)
    doctor.set_defaults(command=_doctor)


def _doctor(options: Namespace) -> None:
    from ..lab.doctor import diagnosis

    standalone.models_folder = options.models
    print(diagnosis())
    if not options.models.is_dir():
        text = say(
            "There is no folder {folder}. Give the models folder of ComfyUI by --models.",
            folder=options.models.absolute(),
        )
        print(text, file=sys.stderr)
