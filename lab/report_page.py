"""A comparison as one HTML file that asks for nothing else."""

import math
from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from ..host import current as host
from ..messages import say
from .comparison import Comparison, Crop, Pair, Spread, metrics_of
from .picture_metrics import METRICS
from .report_text import (
    best,
    changed_of,
    explanations,
    facts,
    lead,
    machine_lines,
    metric_name,
    shown_values,
    spread_note,
    title,
)

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATE = Path(__file__).parent / "report.html"
MOST_SHOWN = 12  # pairs, with their pictures
LONGEST_SIDE = 896  # pixels, that a picture is shown with; crops are cut from the whole one
LONGEST_SIDE_OF_MAP = 448
HUES = 5  # colours of settings in the template
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 220, 52, 26  # of the chart
MOST_LABELS = 10  # of steps, below it


def page(comparison: Comparison) -> str:
    """Takes memory for the pictures of MOST_SHOWN pairs, however many there are."""
    sections = [
        _heading(say("In short"), spread_note()),
        _summary(comparison),
        *_failures(comparison),
        *_course(comparison),
        *_worst(comparison),
        _all_pairs(comparison),
        _heading(say("What the numbers mean")),
        _how(comparison),
        _heading(say("The machine")),
        f'<div class="sheet"><pre>{escape(chr(10).join(machine_lines(comparison)))}</pre></div>',
    ]
    values = {
        "language": host.language(),
        "title": escape(title(comparison)),
        "eyebrow": escape(say("MajicFlux: what a setting costs")),
        "lead": escape(lead(comparison)),
        "facts": _terms(facts(comparison)),
        "sections": "\n".join(sections),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values)


def _heading(text: str, note: str = "") -> str:
    return f"<h2>{escape(text)}</h2>" + (f'<p class="note">{escape(note)}</p>' if note else "")


def _terms(terms: dict[str, str]) -> str:
    pairs = (f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for n, v in terms.items())
    return "".join(pairs)


def _summary(comparison: Comparison) -> str:
    metrics = metrics_of(comparison.pairs)
    heads = [
        f'{escape(metric_name(m))}<span class="best">{escape(best(m))}</span>' for m in metrics
    ]
    rows = []
    for label in comparison.compared:
        key = f'<i class="key" style="{_hue(comparison, label)}"></i>{escape(label)}'
        cells = [_spread(comparison.spread(label, metric), metric) for metric in metrics]
        alarm = ' class="alarm"' if comparison.changed(label) else ""
        changed = f"<td{alarm}>{escape(changed_of(comparison, label))}</td>"
        rows.append(f'<tr><th class="keyed">{key}</th>{"".join(cells)}{changed}</tr>')
    return _sheet([escape(say("Setting")), *heads, escape(say("other composition"))], rows)


def _sheet(heads: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{each}</th>" for each in heads)
    return (
        f'<div class="sheet"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _spread(found: Spread | None, metric: str) -> str:
    if found is None:
        return "<td>–</td>"
    mean, deviation, worst = map(METRICS[metric].shown, (found.mean, found.deviation, found.worst))
    told = escape(say("worst {worst}", worst=worst))
    return (
        f"<td>{mean}<small>± {deviation}</small>"
        f'<small title="{escape(found.worst_id)}">{told}</small></td>'
    )


def _hue(comparison: Comparison, label: str) -> str:
    return f"--hue: var(--hue-{comparison.compared.index(label) % HUES})"


def _failures(comparison: Comparison) -> list[str]:
    if not comparison.failures:
        return []
    rows = (
        f'<tr><th>{escape(id)}</th><td class="words">{escape(problem)}</td></tr>'
        for id, problem in comparison.failures.items()
    )
    sheet = _sheet(map(escape, (say("Picture"), say("Problem"))), rows)
    return [_heading(say("Failures")), sheet]


def _course(comparison: Comparison) -> list[str]:
    """The chart of the latents' errors; none where passes could not be told."""
    courses = {label: comparison.steps(label) for label in comparison.compared}
    courses = {label: errors for label, errors in courses.items() if errors}
    if not courses:
        return []
    note = say(
        "How far the latents are from the reference's after each pass of the transformer, mean "
        "over prompts and seeds: the L2 norm of the difference by that of the reference."
    )
    legend = "".join(
        f'<span><i class="key" style="{_hue(comparison, label)}"></i>{escape(label)}</span>'
        for label in courses
    )
    drawn = "".join(
        _line(errors, _top(courses.values()), _hue(comparison, label))
        for label, errors in courses.items()
    )
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(note)}">'
        f"{_axes(courses.values())}{drawn}</svg>"
    )
    chart = f'<div class="chart"><div class="legend">{legend}</div>{svg}</div>'
    return [_heading(say("Along the steps"), note), chart]


def _top(courses: Iterable[Sequence[float]]) -> float:
    """A round number above all of them."""
    highest = max(max(errors) for errors in courses) or 1.0
    power = 10.0 ** math.floor(math.log10(highest))
    return next(power * n for n in (1, 2, 3, 4, 5, 6, 8, 10) if power * n >= highest)


def _axes(courses: Iterable[Sequence[float]]) -> str:
    courses = [*courses]
    top, last = _top(courses), max(map(len, courses))
    parts = []
    for quarter in range(5):
        y = _y(top * quarter / 4, top)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y}" y2="{y}"/>')
        text = f"{top * quarter / 4:.3g}"
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3}" text-anchor="end">{text}</text>')
    every = 5 * math.ceil(last / MOST_LABELS / 5)
    for step in (1, *range(every, last - every // 2, every), last):
        x = _x(step - 1, last)
        parts.append(f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="middle">{step}</text>')
    return "".join(parts)


def _line(errors: Sequence[float], top: float, hue: str) -> str:
    points = [(_x(n, len(errors)), _y(error, top)) for n, error in enumerate(errors)]
    joined = " ".join(f"{x},{y}" for x, y in points)
    x, y = points[-1]
    return f'<g style="{hue}"><polyline points="{joined}"/><circle cx="{x}" cy="{y}" r="2.5"/></g>'


def _x(step: int, count: int) -> float:
    return round(LEFT + 8 + (WIDTH - LEFT - 16) * step / max(1, count - 1), 1)


def _y(error: float, top: float) -> float:
    return round(8 + (HEIGHT - BOTTOM - 8) * (1 - error / top), 1)


def _worst(comparison: Comparison) -> list[str]:
    shown = comparison.worst()[:MOST_SHOWN]
    note = say(
        "The {shown} of {pairs} pairs that differ most: those whose composition changed first, "
        "then by FLIP. Move the line over a picture; the squares are where it differs most.",
        shown=len(shown),
        pairs=len(comparison.pairs),
    )
    articles = [_article(comparison, pair, rank) for rank, pair in enumerate(shown, start=1)]
    return [_heading(say("The worst cases"), note), *articles] if shown else []


def _article(comparison: Comparison, pair: Pair, rank: int) -> str:
    from PIL import Image

    with Image.open(pair.reference) as first, Image.open(pair.picture) as second:
        both = first.convert("RGB"), second.convert("RGB")
    with Image.open(pair.error_map) as found:
        error_map = found.convert("RGB")
    names = comparison.labels[0], pair.label
    badge = f'<span class="badge">{escape(say("other composition"))}</span>' * pair.changed
    key = f'<i class="key" style="{_hue(comparison, pair.label)}"></i>'
    seed = escape(say("seed {seed}", seed=pair.seed))
    crops = [_crop(both, names, crop, n) for n, crop in enumerate(pair.crops, start=1)]
    return (
        f'<article id="{escape(pair.id)}"><header><h3>{key}{rank}. {escape(pair.label)}</h3>'
        f'<span class="rank">{seed}</span>{badge}<span class="rank">{escape(pair.id)}</span>'
        f"</header>"
        f'<p class="prompt">{escape(pair.prompt)}</p><div class="views">'
        f'{_slider(both, names, pair.crops)}<div class="aside">{_map(error_map)}'
        f'<dl class="numbers">{_terms(shown_values(pair))}</dl></div></div>'
        f'<div class="places">{"".join(crops)}</div></article>'
    )


def _slider(both: "Sequence[Image]", names: Sequence[str], crops: Sequence[Crop]) -> str:
    first, second = (
        f'<img src="{_jpeg(picture, LONGEST_SIDE)}" alt="{escape(name)}">'
        for picture, name in zip(both, names, strict=True)
    )
    width, height = both[0].size
    places = "".join(
        f'<span class="place" style="left:{left / width:.2%};top:{top / height:.2%};'
        f'width:{side / width:.2%};height:{side / height:.2%}"><b>{n}</b></span>'
        for n, (left, top, side) in enumerate(crops, start=1)
    )
    label = escape(say("How much of each picture is shown"))
    return (
        f'<div class="slider">{first}{second}{places}'
        f'<input type="range" min="0" max="100" step="0.5" value="50" aria-label="{label}">'
        f'<span class="edge"></span><span class="name left">{escape(names[0])}</span>'
        f'<span class="name right">{escape(names[1])}</span></div>'
    )


def _map(error_map: "Image") -> str:
    told = escape(say("FLIP: where the difference is seen"))
    image = f'<img src="{_jpeg(error_map, LONGEST_SIDE_OF_MAP)}" alt="{told}">'
    caption = f'<figcaption>{told} 0<span class="ramp"></span>1</figcaption>'
    return f'<figure class="map">{image}{caption}</figure>'


def _crop(both: "Sequence[Image]", names: Sequence[str], crop: Crop, number: int) -> str:
    """The same square of both, pixel for pixel."""
    left, top, side = crop
    images = "".join(
        f'<img src="{_png(picture.crop((left, top, left + side, top + side)))}" '
        f'alt="{escape(name)}">'
        for picture, name in zip(both, names, strict=True)
    )
    told = say("{first} left, {second} right, {side} pixels", first=names[0], second=names[1],
               side=side)  # fmt: skip
    return (
        f'<figure><div class="crops">{images}<b>{number}</b></div>'
        f"<figcaption>{escape(told)}</figcaption></figure>"
    )


def _all_pairs(comparison: Comparison) -> str:
    metrics = metrics_of(comparison.pairs)
    rows = []
    for pair in comparison.pairs:
        cells = "".join(
            f"<td>{METRICS[m].shown(pair.values[m]) if m in pair.values else '–'}</td>"
            for m in metrics
        )
        changed = escape(say("yes")) if pair.changed else ""
        rows.append(f'<tr><th>{escape(pair.id)}</th>{cells}<td class="alarm">{changed}</td></tr>')
    heads = [say("Picture"), *map(metric_name, metrics), say("other composition")]
    told = escape(say("All {count} pairs", count=len(comparison.pairs)))
    sheet = _sheet(map(escape, heads), rows)
    return f"<details><summary>{told}</summary>{sheet}</details>"


def _how(comparison: Comparison) -> str:
    items = (
        f"<li><b>{escape(name)}</b><br>{escape(text)}</li>"
        for name, text in explanations(comparison).items()
    )
    return f'<ul class="how">{"".join(items)}</ul>'


def _jpeg(picture: "Image", longest: int) -> str:
    """As a `data:` address, with sides of at most `longest` pixels."""
    scale = min(1.0, longest / max(picture.size))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    data = BytesIO()
    picture.resize((width, height)).save(data, "JPEG", quality=90, subsampling=0)
    return _address(data, "image/jpeg")


def _png(picture: "Image") -> str:
    data = BytesIO()
    picture.save(data, "PNG")
    return _address(data, "image/png")


def _address(data: BytesIO, kind: str) -> str:
    return f"data:{kind};base64,{b64encode(data.getvalue()).decode()}"
