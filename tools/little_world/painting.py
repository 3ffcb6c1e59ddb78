"""Scene -> picture."""

import random

from PIL import Image, ImageDraw

from .city import paint_city
from .meadow import paint_meadow
from .scenes import Scene
from .sea import paint_sea

RAIN, SNOW = (186, 202, 232), (255, 255, 255)
PAINTERS = {"city": paint_city, "meadow": paint_meadow, "sea": paint_sea}
FINE = 2  # streaks and flakes are drawn so many times larger


def paint(scene: Scene, r: random.Random, width: int = 256, height: int = 256) -> Image.Image:
    """The same scene and the same state of `r` give the same picture."""
    image = PAINTERS[scene.kind](scene, r, width, height)
    if scene.weather in ("rain", "snow"):
        _fall(image, r, scene.weather)
    return image


def _fall(image: Image.Image, r: random.Random, weather: str) -> None:
    """Draw rain or snow over the whole picture, in place: a streak or a flake in each cell.

    Spread evenly, for what could be anywhere a model leaves out.
    """
    width, height = image.size
    layer = Image.new("L", (width * FINE, height * FINE))
    pen = ImageDraw.Draw(layer)
    rain = weather == "rain"
    across, down = (30 * FINE, 36 * FINE) if rain else (27 * FINE, 27 * FINE)
    for row in range(layer.height // down + 1):
        for column in range(layer.width // across + 2):
            x = (column - row % 2 / 2 + r.uniform(0.15, 0.85)) * across
            y = (row + r.uniform(0, 0.8)) * down
            if rain:
                long = r.uniform(28, 46)
                pen.line((x, y, x - long * 0.22, y + long), fill=190, width=4)
            else:
                size = r.uniform(2.8, 4.6)
                pen.ellipse((x - size, y - size, x + size, y + size), fill=225)
    image.paste(RAIN if rain else SNOW, mask=layer.reduce(FINE))
