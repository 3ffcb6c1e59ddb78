"""The result of a benchmark: rows, ratios against a peer of the same run, and bars."""

import argparse
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measurement. `peer` is what was measured beside it, `bar` what must not be exceeded."""

    name: str
    value: float
    unit: str
    peer: float | None = None
    peer_name: str = ""
    bar: float | None = None

    @property
    def missed(self) -> bool:
        return self.bar is not None and self.value > self.bar


def options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a small version, for any CPU")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    return parser.parse_args()


def report(rows: list[Row], check: bool) -> None:
    """Print the rows as a Markdown table; with `check`, end the process when a bar is missed."""
    print("| what | ours | peer | peer / ours | bar |\n|---|---|---|---|---|")
    for row in rows:
        peer = "" if row.peer is None else f"{row.peer:.4g} {row.unit} ({row.peer_name})"
        ratio = "" if row.peer is None or not row.value else f"{row.peer / row.value:.2f}"
        bar = "" if row.bar is None else f"{row.bar:g} {row.unit}{' MISSED' * row.missed}"
        print(f"| {row.name} | {row.value:.4g} {row.unit} | {peer} | {ratio} | {bar} |")
    if check and any(row.missed for row in rows):
        sys.exit(1)
