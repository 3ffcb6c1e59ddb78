"""Pairs of pictures that differ in one setting: measured, kept as files, summed up."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from .picture_metrics import (
    METRICS,
    compare_pictures,
    composition_changed,
    in_colour,
    package_versions,
)

if TYPE_CHECKING:
    import numpy as np

EDITION = 1  # of what is measured: others are measured anew
CROPS = 2  # of a pair, where its difference is largest
SIDES_IN_A_CROP = 5  # so often its side goes into the shorter one of the picture
SMALLEST_CROP = 32  # pixels

Crop = tuple[int, int, int]  # left, top, side; in pixels


@dataclass(frozen=True)
class Painted:
    """A picture as its files: `digest` changes when one of them does. latents: float16 of each
    pass, None where they were not kept."""

    picture: Path
    latents: Path | None
    digest: str


@dataclass(frozen=True)
class Pair:
    """A picture and the one that it is compared with, which has another `label` only.

    values: by the keys of METRICS; steps: relative L2 errors of the latents after each pass, only
    the last where the numbers of passes differ; crops: where the difference is largest.
    """

    id: str
    label: str
    prompt: str
    seed: int
    reference: Path
    picture: Path
    error_map: Path
    values: dict[str, float]
    steps: tuple[float, ...]
    crops: tuple[Crop, ...]

    @property
    def changed(self) -> bool:
        """Whether the composition is another one."""
        return composition_changed(self.values)


@dataclass(frozen=True)
class Spread:
    """Of a metric over pairs. deviation: standard, of a sample; worst: the value of `worst_id`."""

    mean: float
    deviation: float
    worst: float
    worst_id: str


@dataclass(frozen=True)
class Comparison:
    """name: of the graph; inputs: which are set otherwise; labels: of the settings, the first being
    what the others are compared with; failures: why a picture could not be painted or compared, by
    its id; machine: in several lines."""

    name: str
    inputs: tuple[str, ...]
    labels: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    pairs: tuple[Pair, ...]
    failures: dict[str, str]
    machine: str

    @property
    def compared(self) -> tuple[str, ...]:
        return self.labels[1:]

    def of(self, label: str) -> list[Pair]:
        return [pair for pair in self.pairs if pair.label == label]

    def changed(self, label: str) -> int:
        return sum(pair.changed for pair in self.of(label))

    def spread(self, label: str, metric: str) -> Spread | None:
        return spread(self.of(label), metric)

    def worst(self) -> list[Pair]:
        """Those whose composition changed first, then by FLIP."""
        return sorted(self.pairs, key=lambda p: (not p.changed, -p.values["flip"], p.id))

    def steps(self, label: str) -> list[float]:
        """The mean error of the latents after each pass; empty where passes cannot be told."""
        found = [pair.steps for pair in self.of(label) if len(pair.steps) > 1]
        return [fmean(errors) for errors in zip(*found, strict=False)]


def spread(pairs: Sequence[Pair], metric: str) -> Spread | None:
    """None where none was measured by it."""
    found = {pair.id: pair.values[metric] for pair in pairs if metric in pair.values}
    if not found:
        return None
    values = [*found.values()]
    worst = max(found, key=lambda id: METRICS[metric].badness(found[id]))
    return Spread(fmean(values), stdev(values) if len(values) > 1 else 0.0, found[worst], worst)


def measured(pair: Pair, reference: Painted, picture: Painted, folder: Path) -> Pair:
    """The pair with all that is measured of it, which is kept in `folder` and not done twice.

    Raises MeasuringError.
    """
    given = [EDITION, reference.digest, picture.digest, package_versions()]
    key = sha256(json.dumps(given).encode()).hexdigest()[:24]
    file = folder / f"{pair.id}.json"
    record = _kept(file, key, pair.error_map)
    if record is None:
        record = {"key": key, **_measure(pair, reference, picture)}
        write_whole(file, json.dumps(record).encode())
    return replace(
        pair,
        values=record["values"],
        steps=tuple(record["steps"]),
        crops=tuple((left, top, side) for left, top, side in record["crops"]),
    )


def write_whole(path: Path, content: bytes) -> None:
    """Under its name only once it is whole. Raises OSError."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def read_picture(path: Path) -> "np.ndarray":
    """uint8 RGB [height, width, 3]."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def latent_errors(reference: Path, other: Path) -> list[float]:
    """The L2 norm of the difference by that of the reference, in float64, after each pass.

    Only the last where one has more passes than the other; empty where the sizes differ.
    """
    import torch
    from safetensors.torch import load_file

    steps, others = load_file(reference), load_file(other)
    names = sorted(steps, key=int) if steps.keys() == others.keys() else []
    both = [(steps[name], others[name]) for name in names]
    both = both or [(steps[max(steps, key=int)], others[max(others, key=int)])]
    if any(ours.shape != theirs.shape for ours, theirs in both):
        return []
    norm = torch.linalg.vector_norm
    # Of float16 the largest where a broken setting leaves its range, so that sums stay numbers.
    wide = ((ours.nan_to_num().double(), theirs.nan_to_num().double()) for ours, theirs in both)
    return [(norm(theirs - ours) / norm(ours)).item() for ours, theirs in wide]


def worst_places(error_map: "np.ndarray", count: int = CROPS) -> list[Crop]:
    """Squares with the largest mean squared error, apart from each other, the worst first.

    error_map: [height, width].
    """
    import numpy as np

    height, width = error_map.shape
    side = min(height, width, max(SMALLEST_CROP, min(height, width) // SIDES_IN_A_CROP))
    squares = error_map.astype(np.float64) ** 2
    sums = np.pad(squares.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    means = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    places: list[Crop] = []
    for _ in range(count):
        top, left = map(int, np.unravel_index(means.argmax(), means.shape))
        if means[top, left] <= 0:
            break
        places.append((left, top, side))
        means[max(0, top - side + 1) : top + side, max(0, left - side + 1) : left + side] = 0
    return places


def _kept(file: Path, key: str, error_map: Path) -> dict[str, Any] | None:
    """What was measured before of the same files, by the same packages."""
    try:
        record = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return record if record["key"] == key and error_map.is_file() else None


def _measure(pair: Pair, reference: Painted, picture: Painted) -> dict[str, Any]:
    from PIL import Image

    difference = compare_pictures(read_picture(reference.picture), read_picture(picture.picture))
    steps = []
    if reference.latents is not None and picture.latents is not None:
        steps = latent_errors(reference.latents, picture.latents)
    part = pair.error_map.with_name(pair.error_map.name + ".part")
    Image.fromarray(in_colour(difference.error_map)).save(part, "PNG")
    os.replace(part, pair.error_map)
    values = {**difference.values, **({"latents": steps[-1]} if steps else {})}
    return {"values": values, "steps": steps, "crops": worst_places(difference.error_map)}


def metrics_of(pairs: Iterable[Pair]) -> list[str]:
    """Those that at least one pair was measured by, in the order of METRICS."""
    found: set[str] = {metric for pair in pairs for metric in pair.values}
    return [metric for metric in METRICS if metric in found]


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Everything but the pictures, for programs; files by their names."""
    return {
        "name": comparison.name,
        "inputs": comparison.inputs,
        "reference": comparison.labels[0],
        "prompts": comparison.prompts,
        "seeds": comparison.seeds,
        "machine": comparison.machine.splitlines(),
        "packages": package_versions(),
        "failures": comparison.failures,
        "settings": {label: _summary(comparison, label) for label in comparison.compared},
        "pairs": [_pair_as_dict(pair) for pair in comparison.pairs],
        "worst": [pair.id for pair in comparison.worst()],
    }


def _summary(comparison: Comparison, label: str) -> Mapping[str, Any]:
    pairs = comparison.of(label)
    spreads = {metric: comparison.spread(label, metric) for metric in metrics_of(pairs)}
    return {
        "pairs": len(pairs),
        "composition_changed": comparison.changed(label),
        "latents_by_step": comparison.steps(label),
        **{name: vars(found) for name, found in spreads.items() if found is not None},
    }


def _pair_as_dict(pair: Pair) -> dict[str, Any]:
    return {
        "id": pair.id,
        "setting": pair.label,
        "prompt": pair.prompt,
        "seed": pair.seed,
        "reference": pair.reference.name,
        "picture": pair.picture.name,
        "composition_changed": pair.changed,
        "values": pair.values,
        "latents_by_step": pair.steps,
        "worst_places": pair.crops,
    }
