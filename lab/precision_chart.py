"""A precision report as a picture: bars for the error of each kind of layer in each storage."""

import math
import secrets
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from ..engine.quant.formats import STORAGES
from ..messages import MajicFluxError, say
from .precision import Cost, PrecisionReport
from .precision_table import basis, description, gigabytes, percent, suggestion

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

SIZE = (1200, 970)  # pixels
MARGIN = 40
INK, GREY, RULE, PAPER = "#1a1a1a", "#666666", "#dddddd", "#ffffff"
COLOURS = dict(zip(STORAGES, ("#0072b2", "#e69f00", "#009e73", "#cc79a7"), strict=True))
TITLE, TEXT, SMALL = 30, 18, 15  # font sizes
TITLE_TOP, DESCRIPTION_TOP, LEGEND_TOP, AXIS_TOP = 30, 74, 118, 158
LEFT, RIGHT = 280, 970  # of the bars; their figures stand behind the longest
TOP, BOTTOM = 190, 860
BAR, STEP = 22, 26  # height of a bar, and from one to the next
MOST_TICKS = 6
LABELS = {
    "attention": ("Attention", "of the double blocks"),
    "mlp": ("MLP", "and the joint matrices", "of the single blocks"),
    "modulation": ("Modulation",),
    "rest": ("Rest", "embedders, last layer"),
}
WHOLE = ("Whole file", "as the loader stores it with", "this weight_precision")


class ChartError(MajicFluxError):
    """The chart cannot be written there."""


def require_place(path: Path) -> None:
    """Raise ChartError unless a chart can get this path, which never is a model's."""
    if path.suffix.lower() != ".png":
        raise ChartError(say("The chart {path} needs a name that ends in .png.", path=path))
    if not path.parent.is_dir():
        raise ChartError(
            say(
                "There is no folder {folder} for the chart {name}.",
                folder=path.parent,
                name=path.name,
            )
        )


def write_chart(path: Path, name: str, report: PrecisionReport) -> None:
    """Draw the report on the file of this name into a PNG of SIZE.

    There is a file under `path` only once it is whole. Raises ChartError when that fails.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        with partial.open("xb") as file:
            _drawn(name, report).save(file, "PNG")
        partial.replace(path)
    except OSError as error:
        raise ChartError(
            say("The chart {path} cannot be written: {reason}.", path=path, reason=error)
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _drawn(name: str, report: PrecisionReport) -> "Image":
    from PIL import Image, ImageDraw

    image = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(image)
    # The built-in font has no Chinese; the name of the chart tells the file then.
    title = name if name.isascii() else "Flux.1 transformer"
    draw.text((MARGIN, TITLE_TOP), _fitting(draw, title), INK, _font(TITLE))
    draw.text((MARGIN, DESCRIPTION_TOP), description(report), GREY, _font(TEXT))
    _legend(draw)
    groups = {LABELS[kind]: costs for kind, costs in report.kinds.items()}
    groups[WHOLE] = report.choices
    errors = [cost.error for costs in groups.values() for cost in costs.values()]
    largest = max(filter(math.isfinite, errors), default=0.0) or 0.01
    _axis(draw, largest, basis(report))
    gap = (BOTTOM - TOP) / len(groups)
    for index, (label, costs) in enumerate(groups.items()):
        _bars(draw, round(TOP + index * gap + (gap - len(costs) * STEP) / 2), label, costs, largest)
    # A tilde for a moment, so that no line begins with the sign.
    for row, line in enumerate(wrap(suggestion(report).replace(" %", "~%"), 130)):
        y = BOTTOM + 42 + row * 24
        draw.text((MARGIN, y), line.replace("~%", " %"), INK, _font(TEXT))
    return image


def _legend(draw: "ImageDraw") -> None:
    left = LEFT
    for label, colour in COLOURS.items():
        draw.rectangle((left, LEGEND_TOP + 2, left + 16, LEGEND_TOP + 18), colour)
        draw.text((left + 24, LEGEND_TOP), label, INK, _font(TEXT))
        left += 24 + round(draw.textlength(label, _font(TEXT))) + 36


def _axis(draw: "ImageDraw", largest: float, what: str) -> None:
    caption = f"Error of the stored weights ({what}), and the memory that they take"
    draw.text((LEFT, AXIS_TOP), caption, GREY, _font(SMALL))
    for tick in _ticks(largest):
        x = _x(tick, largest)
        draw.line((x, TOP, x, BOTTOM), RULE)
        draw.text((x, BOTTOM + 6), f"{100 * tick:.4g} %", GREY, _font(SMALL), anchor="ma")


def _bars(
    draw: "ImageDraw", top: int, label: tuple[str, ...], costs: dict[str, Cost], largest: float
) -> None:
    middle = top + len(costs) * STEP / 2
    for row, line in enumerate(label):
        y = middle + (row - len(label) / 2) * 22
        size, colour = (SMALL, GREY) if row else (TEXT, INK)
        draw.text((LEFT - 16, y), line, colour, _font(size), anchor="ra")
    for row, (storage, cost) in enumerate(costs.items()):
        y = top + row * STEP
        x = _x(min(cost.error, largest), largest)
        draw.rectangle((LEFT, y, max(x, LEFT + 2), y + BAR), COLOURS[storage])
        place, figures = (
            (x + 12, y + BAR / 2),
            f"{percent(cost.error)}   {gigabytes(cost.bytes)} GB",
        )
        box = draw.textbbox(place, figures, _font(SMALL), anchor="lm")
        draw.rectangle(box, PAPER)  # over the rules
        draw.text(place, figures, INK, _font(SMALL), anchor="lm")


def _ticks(largest: float) -> Iterator[float]:
    """Round numbers from 0 to `largest`."""
    power = 10.0 ** math.floor(math.log10(largest / MOST_TICKS))
    step = next(s * power for s in (1, 2, 5, 10, 20) if largest / (s * power) < MOST_TICKS)
    return (index * step for index in range(int(largest / step * (1 + 1e-9)) + 1))


def _x(error: float, largest: float) -> int:
    return round(LEFT + (RIGHT - LEFT) * error / largest)


def _fitting(draw: "ImageDraw", title: str) -> str:
    while draw.textlength(title, _font(TITLE)) > SIZE[0] - 2 * MARGIN:
        title = title.removesuffix("...")[:-1] + "..."
    return title


@cache
def _font(size: int) -> "FreeTypeFont | ImageFont":
    from PIL import ImageFont

    return ImageFont.load_default(size=size)
