"""A canvas of soft-edged shapes and their glow, and arithmetic on colours.

Colours are (red, green, blue) from 0 to 255; places and lengths are pixels of the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Colour = tuple[float, ...]
Point = tuple[float, float]

FINE = 3  # shapes are drawn so many times larger, which softens their edges
GLOW = 2  # and light so many times smaller, as it is blurred anyway
BLACK, WHITE = (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)


def unit_of(width: int, height: int) -> float:
    """Pixels of a length that is 1 in a picture of 256 x 256."""
    return min(width, height * 1.15) / 256


def mix(a: Colour, b: Colour, part: float) -> Colour:
    """`a` with this part of `b` in it."""
    return tuple(x + (y - x) * part for x, y in zip(a, b, strict=True))


def lit(colour: Colour, light: Colour) -> Colour:
    """How a surface looks in this light; white light is (1, 1, 1)."""
    return tuple(x * y for x, y in zip(colour, light, strict=True))


def brightened(image: Image.Image, times: float) -> Image.Image:
    return image.point([min(255, int(v * times)) for v in range(256)] * 3)


def gradient(size: tuple[int, int], top: Colour, bottom: Colour) -> Image.Image:
    part = np.linspace(0, 1, size[1])[:, None, None]
    column = np.asarray(top) * (1 - part) + np.asarray(bottom) * part
    return Image.fromarray(column.astype(np.uint8)).resize(size)


def _whole(colour: Colour) -> tuple[int, ...]:
    return tuple(map(int, colour))


class Canvas:
    """What is drawn later hides what is there; light is added to all of it in the end.

    It begins as a sky of two colours, `low` from the horizon (a row of the picture) down.
    """

    def __init__(self, width: int, height: int, top: Colour, low: Colour, horizon: int):
        self.width, self.height = width, height
        self.shapes = Image.new("RGB", (width * FINE, height * FINE), _whole(low))
        self.paste(gradient((width, horizon), top, low), 0)
        self.light = Image.new("RGB", (width // GLOW, height // GLOW))
        self._pen = ImageDraw.Draw(self.shapes)
        self._lamp = ImageDraw.Draw(self.light)

    def polygon(self, points: Sequence[Point], colour: Colour, glow: Colour | None = None) -> None:
        self._pen.polygon([(x * FINE, y * FINE) for x, y in points], _whole(colour))
        if glow is not None:
            self._lamp.polygon([(x / GLOW, y / GLOW) for x, y in points], _whole(glow))

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        colour: Colour,
        glow: Colour | None = None,
        round_by: float = 0,
    ) -> None:
        """A rectangle from its upper left corner; one without an area is left out."""
        if width <= 0 or height <= 0:
            return
        corners = (x, y, x + width, y + height)
        fine = [v * FINE for v in corners]
        if round_by:
            self._pen.rounded_rectangle(fine, round_by * FINE, _whole(colour))
        else:
            self._pen.rectangle(fine, _whole(colour))
        if glow is not None:
            self._lamp.rectangle([v / GLOW for v in corners], _whole(glow))

    def oval(
        self, x: float, y: float, rx: float, ry: float, colour: Colour, glow: Colour | None = None
    ) -> None:
        """An ellipse around (x, y)."""
        corners = (x - rx, y - ry, x + rx, y + ry)
        self._pen.ellipse([v * FINE for v in corners], _whole(colour))
        if glow is not None:
            self.shine(x, y, rx, ry, glow)

    def standing(self, y: float) -> "Canvas":
        """What is used to draw a thing that stands at this row of the picture."""
        return self

    def paste(self, image: Image.Image, top: int) -> None:
        """A picture of the canvas's width over everything from the row `top` on."""
        fine = image.resize((image.width * FINE, image.height * FINE), Image.Resampling.BILINEAR)
        self.shapes.paste(fine, (0, top * FINE))

    def shine(self, x: float, y: float, rx: float, ry: float, glow: Colour) -> None:
        """Light around (x, y) that comes from no shape."""
        corners = (x - rx, y - ry, x + rx, y + ry)
        self._lamp.ellipse([v / GLOW for v in corners], _whole(glow))

    def finished(self, strength: float, radius: float) -> Image.Image:
        """The picture with its light, near (`radius` pixels) and far, so many times as strong."""
        image = self.shapes.reduce(FINE)
        for reach in (radius, radius * 2.8):
            soft = self.light.filter(ImageFilter.GaussianBlur(reach / GLOW))
            soft = brightened(soft, strength)
            image = ImageChops.screen(image, soft.resize(image.size, Image.Resampling.BILINEAR))
        return image


@dataclass(frozen=True)
class Figure:
    """One thing on a canvas: its shapes are told in units from (x, y), where it stands."""

    canvas: Canvas
    x: float
    y: float
    unit: float
    way: int = 1  # -1: seen in a mirror

    def polygon(self, points: Sequence[Point], colour: Colour, glow: Colour | None = None) -> None:
        self.canvas.standing(self.y).polygon([self._at(*point) for point in points], colour, glow)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        colour: Colour,
        glow: Colour | None = None,
        round_by: float = 0,
    ) -> None:
        corner = self._at(x if self.way > 0 else x + width, y)
        size = width * self.unit, height * self.unit
        self.canvas.standing(self.y).box(*corner, *size, colour, glow, round_by * self.unit)

    def oval(
        self, x: float, y: float, rx: float, ry: float, colour: Colour, glow: Colour | None = None
    ) -> None:
        radii = rx * self.unit, ry * self.unit
        self.canvas.standing(self.y).oval(*self._at(x, y), *radii, colour, glow)

    def _at(self, x: float, y: float) -> Point:
        return self.x + self.way * x * self.unit, self.y + y * self.unit
