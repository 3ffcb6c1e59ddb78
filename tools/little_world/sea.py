"""The sea: sailing boats in two rows, and perhaps a lighthouse at the shore."""

import random

from PIL import Image

from .canvas import WHITE, Canvas, gradient, mix
from .country import DARK, PAINT, WOOD, Country, begin_country
from .scenes import Scene

NEAR, FAR = (24, 112, 156), (92, 172, 200)  # the water
SHORE = 0.57  # of the height
# Parts of width and height, of the first to the last boat. A lighthouse on the left takes the
# place of the last one, which then is on the right.
BOAT_PLACES = ((0.33, 0.93), (0.67, 0.92), (0.5, 0.7), (0.17, 0.71))


def paint_sea(
    scene: Scene, r: random.Random, width: int, height: int, kind: type[Canvas] = Canvas
) -> Image.Image:
    """Without rain or snow in the air."""
    country = begin_country(scene, r, width, height, kind)
    _water(country)
    if scene.lighthouse:
        _lighthouse(country, width * (0.87 if scene.place == "right" else 0.13))
    for column, row in reversed(BOAT_PLACES[: scene.boats]):  # the near ones before the far ones
        if scene.place == "left" and column < 0.2:
            column = 1 - column
        x, y = column * width + country.about(-6, 6), row * height + country.about(-2, 2)
        _boat(country, x, y)
    return country.canvas.finished(0.8, 7 * country.unit)


def _water(country: Country) -> None:
    """With rows of short waves, longer where they are nearer."""
    canvas, unit = country.canvas, country.unit
    shore = round(SHORE * canvas.height)
    far, near = mix(country.land(FAR), country.low, 0.3), country.land(NEAR)
    canvas.paste(gradient((canvas.width, canvas.height - shore), far, near), shore)
    for row in range(1, 7):
        part = row / 7
        wave, y = mix(mix(far, near, part), WHITE, 0.2), shore + part * (canvas.height - shore)
        for column in range(3):
            shift = (row % 2) * 0.5 + country.r.uniform(-0.1, 0.1)
            middle, wide = (column + 0.5 + shift) * canvas.width / 3, (8 + 18 * part) * unit
            canvas.box(middle - wide / 2, y, wide, (1 + part) * unit, wave)


def _lighthouse(country: Country, x: float) -> None:
    """A striped tower on a rock, 86 units high."""
    tower = country.figure(x, round(SHORE * country.canvas.height) + 3 * country.unit)
    tower.oval(0, 0, 28, 6, country.thing((90, 96, 110)))
    for n in range(5):
        low, high, half = -13 * n, -13 * (n + 1), 12 - n
        stripe = country.thing((206, 48, 50) if n % 2 else (246, 246, 240))
        tower.polygon([(-half, low), (half, low), (half - 1, high), (1 - half, high)], stripe)
    tower.box(-5, -75, 10, 10, (255, 240, 160), country.lamp((255, 220, 120)))
    tower.polygon([(-8, -75), (8, -75), (0, -86)], country.thing((64, 56, 66)))


def _boat(country: Country, x: float, foot: float) -> None:
    """50 units wide and 57 high, of which 11 are hull."""
    boat, dark = country.figure(x, foot), country.thing(DARK)
    paint = country.thing(PAINT[country.scene.sails])
    boat.polygon([(1, -54), (1, -9), (25, -9)], dark)  # the sails' outlines
    boat.polygon([(-1, -50), (-1, -9), (-22, -9)], dark)
    boat.polygon([(2.5, -49), (2.5, -10.5), (22.5, -10.5)], paint)
    boat.polygon([(-2.5, -44.5), (-2.5, -10.5), (-19, -10.5)], paint)
    boat.box(-1, -54, 2, 48, dark)  # the mast
    boat.polygon([(-25, -8), (25, -8), (18, 3), (-18, 3)], country.thing(WOOD))
