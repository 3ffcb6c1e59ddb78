"""Arguments that several commands take."""

import re
from argparse import Action, ArgumentError, ArgumentParser, ArgumentTypeError, _SubParsersAction
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from ..downloads.catalogue import TRANSLATOR
from ..host import standalone
from ..messages import later, say
from .help import Help

MOST = 1_000_000  # that any number of an option may be

# The sentences of argparse that beginners meet.
SENTENCES = (
    later("the following arguments are required: {names}"),
    later("unrecognized arguments: {names}"),
    later("expected one argument"),
)

Commands: TypeAlias = "_SubParsersAction[ArgumentParser]"


class Parser(ArgumentParser):
    """Speaks the user's language: `--help`, and what is wrong in a line of it, without all that
    could be right."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=Help, **options)

    def error(self, message: str) -> NoReturn:
        said = say(
            "{program}: error: {error}. See {program} --help.",
            program=self.prog,
            error=_told(message).rstrip("."),
        )
        self.exit(2, f"{said}\n")

    def _check_value(self, action: Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            problem = say("{value} is not one of: {choices}", value=value, choices=choices)
            raise ArgumentError(action, problem)


def _told(message: str) -> str:
    about = re.fullmatch(r"argument (\S+): (.+)", message, re.DOTALL)
    if about:
        return say("argument {name}: {problem}", name=about[1], problem=_told(about[2]))
    for sentence in SENTENCES:
        begin, field, _ = sentence.partition("{names}")
        if message.startswith(begin):
            values = {"names": message.removeprefix(begin)} if field else {}
            return say(sentence, **values)
    return message


def add_models(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        type=Path,
        default=standalone.models_folder,
        help="folder with diffusion_models, loras, text_encoders and vae in it "
        "(default: %(default)s)",
    )


def add_translate(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--translate",
        nargs="?",
        const=TRANSLATOR,
        metavar="MODEL",
        help="translate the Chinese in its prompts, with this folder in models/translation "
        "(without one: %(const)s)",
    )


def positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 7 or not 1 <= int(text) <= MOST:
        raise ArgumentTypeError(say("give a whole number, 1 to {most}", most=MOST))
    return int(text)


def numbers(text: str) -> list[int]:
    if not re.fullmatch(r"\d{1,3}(,\d{1,3})*", text, re.ASCII):
        raise ArgumentTypeError(say("give numbers of cards such as 0,1"))
    return [*dict.fromkeys(map(int, text.split(",")))]


def above_zero(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) <= MOST:
            return float(text)
    raise ArgumentTypeError(say("give a number above 0, {most} at most", most=MOST))


def gigabytes(text: str) -> float:
    """Of a budget. 0 is none on the canvas; here none is given."""
    with suppress(ArgumentTypeError):
        return above_zero(re.sub(r"\s*GB?$", "", text, flags=re.IGNORECASE))
    raise ArgumentTypeError(
        say("give a number of GB above 0 such as 7; without the option there is no limit")
    )


def picture_size(text: str) -> tuple[int, int]:
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise ArgumentTypeError(say("give a size such as 1024x768"))
    return int(width), int(height)
