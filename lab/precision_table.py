"""A precision report in words and figures."""

import math
from collections.abc import Callable, Iterator

from ..engine.quant.formats import BFLOAT16, STORAGES
from .precision import KINDS, Cost, PrecisionReport

HEADS = {"attention": "attention", "mlp": "MLP", "modulation": "modulation", "rest": "rest"}
SMALLEST_SHARE = 0.0005  # of a format that is worth telling
NAME_WIDTH, COLUMN_WIDTH = 24, 12


def table(name: str, report: PrecisionReport) -> str:
    """What `majicflux inspect` prints about the file of this name."""
    lines = [
        f"{name}: {description(report)}",
        "",
        f"Error of the stored weights ({basis(report)}):",
        *_by_kind(report, lambda cost: percent(cost.error)),
        "",
        "Memory that they would take, in GB:",
        *_by_kind(report, lambda cost: gigabytes(cost.bytes)),
        "",
        "MLP counts the joint matrices of the single blocks; rest is embedders and last layer.",
        "",
        "The whole file, as each weight_precision of the loader would store it:",
        _line("", "error", "GB"),
        *(
            _line(label, percent(cost.error), gigabytes(cost.bytes))
            for label, cost in report.choices.items()
        ),
    ]
    if any(label.startswith("int8") for label in report.contents):
        lines += ["", "Matrices that the file holds in int8 stay int8 under float8_e4m3fn too."]
    return "\n".join([*lines, "", suggestion(report)])


def description(report: PrecisionReport) -> str:
    """What the file is, without its name."""
    g = report.geometry
    shares = {label: share for label, share in report.contents.items() if share >= SMALLEST_SHARE}
    formats = ", ".join(f"{label} {share:.1%}" for label, share in shares.items())
    if len(shares) == 1:
        (formats,) = shares
    return (
        f"Flux.1 transformer, {g.double_blocks} + {g.single_blocks} blocks of width {g.hidden}, "
        f"{report.parameters / 1e9:.2f} B parameters, {formats}"
    )


def basis(report: PrecisionReport) -> str:
    return f"relative L2 error, up to {report.rows} rows of each matrix"


def suggestion(report: PrecisionReport) -> str:
    best, plain = report.choices[report.suggested], report.choices[str(BFLOAT16)]
    return (
        f"Suggested weight_precision: {report.suggested}, the 8-bit choice with the "
        f"smallest error: {percent(best.error)} in {gigabytes(best.bytes)} GB, where bfloat16 has "
        f"{percent(plain.error)} in {gigabytes(plain.bytes)} GB."
    )


def percent(error: float) -> str:
    if math.isinf(error):
        return "too large"
    if error == 0:
        return "0 %"
    return "< 0.01 %" if error < 0.00005 else f"{100 * error:.2f} %"


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.{2 if size >= 1e9 else 3}f}"


def _by_kind(report: PrecisionReport, shown: Callable[[Cost], str]) -> Iterator[str]:
    yield _line("", *(HEADS[kind] for kind in KINDS))
    for label in STORAGES:
        yield _line(label, *(shown(report.kinds[kind][label]) for kind in KINDS))


def _line(name: str, *columns: str) -> str:
    return f"{name:{NAME_WIDTH}}" + "".join(f"{column:>{COLUMN_WIDTH}}" for column in columns)
