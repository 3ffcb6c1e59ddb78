"""`majicflux doctor`: what this machine has."""

from argparse import ArgumentParser, Namespace

from ..host import standalone
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
