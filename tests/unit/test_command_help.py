"""`--help` of every command: argparse's own page in English, and readable in other languages."""

import argparse
import re
from pathlib import Path
from unicodedata import category, east_asian_width

import pytest

from majicflux import cli
from majicflux.host import standalone

LOCALES = ("ja_JP.UTF-8", "zh_CN.UTF-8", "zh_TW.UTF-8")
# Of English sentences; what is typed as it stands has none of them, nor has argparse's own page.
ENGLISH = re.compile(
    r"\b(the|this|that|which|with|of|in|or|and|is|are|show|usage|options?|arguments?|default)\b",
    re.IGNORECASE,
)


def parsers() -> dict[str, argparse.ArgumentParser]:
    """By what is typed before `--help`."""
    parser = cli._parser()
    commands = next(action.choices for action in parser._actions if action.metavar == "COMMAND")
    return {"majicflux": parser, **commands}


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("PYTHON_COLORS", "0")
    monkeypatch.setattr(standalone, "models_folder", Path("models"))  # a page names it


def pages(monkeypatch: pytest.MonkeyPatch, locale: str) -> dict[str, str]:
    monkeypatch.setenv("LC_ALL", locale)
    return {name: parser.format_help() for name, parser in parsers().items()}


def cells(line: str) -> int:
    """Ambiguous characters count as two, which they are in some terminals."""
    return sum(2 if east_asian_width(letter) in "WFA" else 1 for letter in line)


@pytest.mark.parametrize("columns", ["40", "80", "130"])
def test_in_english_it_is_argparses_own(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for parser in parsers().values():
        ours = parser.format_help()
        assert ours.startswith("usage: majicflux")
        parser.formatter_class = argparse.HelpFormatter
        assert ours == parser.format_help()


@pytest.mark.parametrize("locale", LOCALES)
def test_every_page_is_translated_and_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, locale: str
) -> None:
    english = pages(monkeypatch, "C")
    for name, page in pages(monkeypatch, locale).items():
        values = {line.strip() for line in english[name].splitlines()}  # such as all choices
        for line in page.splitlines():
            assert cells(line) <= 80 or line.strip() in values, line
            assert not ENGLISH.search(line), line
        assert page.count("  --") == english[name].count("  --"), "an argument is a line"


@pytest.mark.parametrize("locale", LOCALES)
def test_lines_begin_and_end_as_lines_do(monkeypatch: pytest.MonkeyPatch, locale: str) -> None:
    for columns in range(60, 100, 5):
        monkeypatch.setenv("COLUMNS", str(columns))
        for page in pages(monkeypatch, locale).values():
            for line in filter(None, map(str.strip, page.splitlines())):
                assert category(line[0]) not in ("Pe", "Pf"), line
                assert line[0] not in "、。，；：！？ァィゥェォッャュョー", line
                assert category(line[-1]) not in ("Ps", "Pi"), line


@pytest.mark.parametrize("locale", LOCALES)
def test_columns_are_cells(monkeypatch: pytest.MonkeyPatch, locale: str) -> None:
    """The usage goes on below its program's arguments, and texts begin below each other."""
    for name, page in pages(monkeypatch, locale).items():
        usage, *rest = page.splitlines()
        further = rest[: rest.index("")]
        column = cells(usage[: usage.index("[-h]")])
        assert {len(line) - len(line.lstrip()) for line in further} <= {column}, name


def test_words_and_fields_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    page = pages(monkeypatch, "zh_CN")["run"]
    assert "（不写名字时：opus-mt-zh-en）" in page
    assert "\n                        text_encoders 和 vae（默认：models）\n" in page


def test_a_long_path_is_broken_by_its_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """In English too, which argparse would print in lines of twice the width."""
    folder = "/home/" + "便携版" * 30 + "/" + "m" * 70
    for locale in ("C", *LOCALES):
        monkeypatch.setenv("LC_ALL", locale)
        run = parsers()["run"]
        run.set_defaults(models=folder)
        page = run.format_help()
        assert max(map(cells, page.splitlines())) <= 80
        assert folder in re.sub(r"\s+", "", page)
