"""What Python shows, in the user's language.

A message is looked up by its English text in `locales/LANGUAGE/messages.json`; where the language
or the message is not there, the English is what is shown.
"""

import json
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

log = logging.getLogger("majicflux")  # of all files

# Not a package in that folder: ComfyUI would serve its __pycache__ as a language.
FOLDER = Path(__file__).parent / "locales"


class MajicFluxError(ValueError):
    """What a user can set right, told in their language."""

    __module__ = "majicflux"  # ComfyUI shows it, and would show the path of the pack

    def __init__(self, english: str = "", /, **values: object):
        """The same as of `say`."""
        super().__init__(say(english, **values))

    def __init_subclass__(cls) -> None:
        cls.__module__ = "majicflux"


def _english() -> str:
    return "en"


_language: Callable[[], str] = _english


def speak(language: Callable[[], str]) -> None:
    """Ask `language` from now on, at each message, so that a change needs no restart."""
    global _language
    _language = language


def say(english: str, /, **values: object) -> str:
    """The message in the user's language, its fields filled by `values` as `str.format` does.

    Without values it has no fields, so that what has been said already stays as it is. An OSError
    is shown by its reason, without a number and the file again.
    """
    values = {name: _shown(value) for name, value in values.items()}
    try:
        text = _messages(_language())[english]
        return text.format(**values) if values else text
    except Exception:  # anything: a message in English is better than another error in its place
        return english.format(**values) if values else english


def _shown(value: object) -> object:
    reason = getattr(value, "strerror", None)
    return say(reason) if reason else value


def later(english: str) -> str:
    """Marks a text that is given to `say` when it is shown; until then it is an identifier."""
    return english


def command_line(arguments: str) -> str:
    """A command of `majicflux`, to be run in any folder, with the Python that ComfyUI has."""
    return f'python "{Path(__file__).parent}" {arguments}'


# What the system says of files.
REASONS = (
    later("Is a directory"),
    later("No such file or directory"),
    later("No space left on device"),
    later("Permission denied"),
)


def title(node_id: str, english: str) -> str:
    """Of a node, as the canvas shows it in the user's language."""
    try:
        return _titles(_language())[node_id]["display_name"]
    except Exception:  # anything, as in `say`
        return english


@cache
def _titles(language: str) -> dict[str, dict[str, str]]:
    return json.loads((FOLDER / language / "nodeDefs.json").read_text(encoding="utf-8"))


@cache
def _messages(language: str) -> dict[str, str]:
    path = FOLDER / language / "messages.json"
    if not path.is_file():  # English, or a language that nobody has translated to
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read: %s.", path, error)
        return {}
