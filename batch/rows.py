"""Rows of values for a graph, from CSV, JSONL or a text file of prompts."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ..messages import MajicFluxError, say

ID = "id"
PROMPT = "prompt"  # what the lines of a text file are


class BatchError(MajicFluxError):
    """The batch cannot be run, or cannot go on."""


@dataclass(frozen=True)
class Row:
    """number: from 0 on, in the order of the file; values: by the names of inputs."""

    number: int
    id: str | None
    values: dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Raises BatchError. An empty cell, or null, is no value: the input stays as in the graph."""
    readers = {".csv": _of_csv, ".jsonl": _of_jsonl, ".txt": _of_text}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise BatchError(
            say("{file}: rows are read from {kinds} files.", file=path, kinds=", ".join(readers))
        )
    rows = []
    for given in reader(path, _text_of(path)):
        values = {name: value for name, value in given.items() if value not in (None, "")}
        name = values.pop(ID, None)
        rows.append(Row(len(rows), None if name is None else str(name), values))
    if not rows:
        raise BatchError(say("{file} has no rows.", file=path))
    return rows


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BatchError(
            say("{file} cannot be opened: {reason}.", file=path, reason=error)
        ) from error
    except UnicodeDecodeError as error:
        raise BatchError(
            say("{file} is not in UTF-8, as rows must be: save it so.", file=path)
        ) from error


def _of_text(path: Path, text: str) -> Iterator[dict[str, Any]]:
    return ({PROMPT: line.strip()} for line in text.splitlines() if line.strip())


def _of_csv(path: Path, text: str) -> Iterator[dict[str, Any]]:
    lines = csv.DictReader(StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        names = [*filter(None, lines.fieldnames or ())]
        if twice := [name for name in names if names.count(name) > 1]:
            problem = say("two columns are called {name}", name=twice[0])
            raise _bad_line(path, lines.line_num, problem)
        for row in lines:
            if None in row:
                raise _bad_line(path, lines.line_num, say("it has more values than the header"))
            if any(row.values()):
                yield row
    except csv.Error as error:
        raise _bad_line(path, lines.line_num, error) from error


def _of_jsonl(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _bad_line(path, number, error) from error
        if not isinstance(row, dict):
            raise _bad_line(path, number, say("it is no object in braces"))
        yield row


def _bad_line(path: Path, number: int, problem: object) -> BatchError:
    return BatchError(
        say(
            "{file}, line {number}, cannot be read: {problem}.",
            file=path,
            number=number,
            problem=problem,
        )
    )
