"""The command `majicflux`, of which each of `commands` is a part."""

import argparse
import logging
import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Any

from .commands import batch, bench, cache, compare, demo, doctor, download, inspect, plan, run
from .commands.arguments import Parser
from .messages import MajicFluxError, say

# As `--help` lists them.
COMMANDS = (demo, cache, inspect, doctor, bench, plan, run, batch, compare, download)


class _Unheard:
    """A stream that may have no reader any more: what is said is then lost, and nothing else."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def main(arguments: list[str] | None = None) -> int:
    _open_streams()
    # Threads of PyTorch that spin while they wait take the processor from those they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("majicflux").setLevel(logging.INFO)  # others would log every request
    try:
        options.command(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(say("stopped"), file=sys.stderr)
        return 130
    except Exception as error:
        if "debug" in options:
            raise
        print(say("error: {error}", error=_sentence(error)), file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # which would be raised once more at the end
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 1
    return 0


def _open_streams() -> None:
    """Let Python have all three streams, stdout print what it can of a text, and stderr take what
    is said whoever listens."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # or a file of ours would get its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):  # a console may lack characters that are printed
        sys.stdout.reconfigure(errors="replace")
    sys.stderr = _Unheard(sys.stderr)


def _sentence(error: Exception) -> str:
    """What a user can read of an error; MajicFluxError has been written for that."""
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename else ""
        return f"{named}{say(error.strerror)}"
    if isinstance(error, (MajicFluxError, OSError)):
        return str(error)
    return say(
        "{kind}: {error}. With --debug, this says where.",
        kind=type(error).__name__,
        error=str(error).rstrip("."),
    )


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show where an error was"
    )
    parser = Parser(
        prog="majicflux",
        description="`majicflux`: the same nodes and workflows without a ComfyUI server.",
        parents=[common],
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands, common)
    return parser


if __name__ == "__main__":
    sys.exit(main())
