"""Arguments that several commands take."""

import re
from argparse import ArgumentParser, ArgumentTypeError, _SubParsersAction
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from ..downloads.catalogue import TRANSLATOR
from ..host import standalone

MOST = 1_000_000  # that any number of an option may be

Commands: TypeAlias = "_SubParsersAction[ArgumentParser]"


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
        f"(without one: {TRANSLATOR})",
    )


def positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 7 or not 1 <= int(text) <= MOST:
        raise ArgumentTypeError(f"give a whole number, 1 to {MOST}")
    return int(text)


def numbers(text: str) -> list[int]:
    if not re.fullmatch(r"\d{1,3}(,\d{1,3})*", text, re.ASCII):
        raise ArgumentTypeError("give numbers of cards such as 0,1")
    return [*dict.fromkeys(map(int, text.split(",")))]


def above_zero(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) <= MOST:
            return float(text)
    raise ArgumentTypeError(f"give a number above 0, {MOST} at most")


def picture_size(text: str) -> tuple[int, int]:
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise ArgumentTypeError("give a size such as 1024x768")
    return int(width), int(height)
