"""What all of the country has: its colours and lights, the sky, and hills or mountains.

What stands in the country is drawn in a milder light than the land, so that its colours can be told
apart at night. Places are parts of the picture's width or height, and sizes are in units, of which
a picture of 256 x 256 has 256 across.
"""

import math
import random
from dataclasses import dataclass, replace

from .canvas import BLACK, Canvas, Colour, Figure, lit, mix, unit_of
from .scenes import Scene

PAINT: dict[str, Colour] = {  # of houses, cars and sails
    "red": (214, 36, 42),
    "orange": (242, 122, 28),
    "yellow": (252, 214, 56),
    "green": (44, 162, 80),
    "blue": (40, 92, 224),
    "purple": (128, 66, 190),
    "pink": (246, 116, 180),
    "white": (250, 248, 242),
}
LAND: dict[str, Colour] = {
    "summer": (112, 182, 78),
    "autumn": (208, 152, 70),
    "winter": (200, 216, 236),
}
SNOW, ROCK = (244, 248, 255), (112, 118, 146)
WOOD, DARK = (104, 64, 40), (64, 48, 52)  # dark: outlines
SKY = {  # top and horizon, of each time: in the clear, and where it rains or snows
    "day": (((62, 138, 226), (176, 216, 246)), ((116, 136, 164), (202, 212, 224))),
    "sunset": (((92, 66, 150), (255, 178, 98)), ((96, 80, 128), (224, 162, 128))),
    "night": (((9, 13, 44), (46, 62, 124)), ((16, 20, 42), (50, 58, 94))),
}
LIGHT = {"day": (255, 236, 120), "sunset": (255, 124, 66), "night": (250, 244, 214)}
CLOUD = {"day": (250, 250, 252), "sunset": (236, 190, 190), "night": (92, 100, 140)}
LAND_LIGHT = {"day": (1, 1, 1), "sunset": (0.9, 0.78, 0.82), "night": (0.44, 0.48, 0.72)}
THING_LIGHT = {"day": (1, 1, 1), "sunset": (1, 0.91, 0.87), "night": (0.84, 0.82, 0.94)}
HORIZON = 0.52  # of the height


@dataclass
class Country:
    """A piece of it on its canvas, and what everything in it needs to know."""

    canvas: Canvas
    scene: Scene
    r: random.Random
    unit: float  # pixels of a length that is 1 in a picture of 256

    @property
    def low(self) -> Colour:
        """The colour of the sky at the horizon, which far things take on."""
        return _sky_of(self.scene)[1]

    @property
    def ground(self) -> Colour:
        return self.land(LAND[self.scene.season])

    def land(self, colour: Colour) -> Colour:
        return lit(colour, LAND_LIGHT[self.scene.time])

    def thing(self, colour: Colour) -> Colour:
        return lit(colour, THING_LIGHT[self.scene.time])

    def lamp(self, glow: Colour) -> Colour | None:
        """The light of a lamp, which is on but by day."""
        return None if self.scene.time == "day" else glow

    def about(self, least: float, most: float) -> float:
        """A length between so many units, in pixels."""
        return self.r.uniform(least, most) * self.unit

    def figure(self, x: float, y: float, unit: float = 0, way: int = 1) -> Figure:
        return Figure(self.canvas, x, y, unit or self.unit, way)

    def hill(self, foot: float, swell: float, colour: Colour) -> None:
        """Everything below a gentle line around `foot` pixels."""
        width, height = self.canvas.width, self.canvas.height
        begin, waves = self.r.random() * 7, self.r.uniform(4.5, 7.5) / width
        line = [(x, foot - swell * math.sin(x * waves + begin)) for x in range(0, width + 8, 8)]
        self.canvas.polygon([*line, (width + 8, height), (0, height)], colour)


def begin_country(
    scene: Scene, r: random.Random, width: int, height: int, kind: type[Canvas]
) -> Country:
    """Sky and backdrop, on a canvas of this kind."""
    canvas = kind(width, height, *_sky_of(scene), round(HORIZON * height))
    country = Country(canvas, scene, r, unit_of(width, height))
    _sky(replace(country, r=random.Random(r.random())))  # the same land lies under any sky
    _backdrop(country)
    return country


def _sky_of(scene: Scene) -> tuple[Colour, Colour]:
    return SKY[scene.time][scene.weather in ("rain", "snow")]


def _sky(country: Country) -> None:
    """Stars, sun or moon, and clouds that leave it free."""
    canvas, scene, r = country.canvas, country.scene, country.r
    width, height = canvas.width, canvas.height
    slots = [0.14, 0.38, 0.62, 0.86]
    if scene.lighthouse:
        slots.remove(0.14 if scene.place == "left" else 0.86)
    r.shuffle(slots)
    if scene.light == "moon":
        for _ in range(24):
            size = country.about(0.7, 1.2)
            place = r.random() * width, r.random() * height * 0.4
            canvas.oval(*place, size, size, (226, 230, 250))
    if scene.light:
        y = height * (0.27 if scene.time == "sunset" else 0.15)
        colour = LIGHT[scene.time]
        disc = country.figure(slots.pop() * width, y)
        disc.oval(0, 0, 18, 18, colour, mix(colour, BLACK, 0.5))
    if scene.weather != "clear":
        colour = mix(CLOUD[scene.time], (120, 126, 140), 0 if scene.light else 0.25)
        for slot in slots[:3]:
            x, y = slot * width + country.about(-6, 6), height * r.uniform(0.1, 0.2)
            for dx, dy, size in ((-17, 3, 10), (-5, -3, 14), (10, -1, 12), (21, 4, 8)):
                country.figure(x, y).oval(dx, dy, size * 1.15, size * 0.85, colour)


def _backdrop(country: Country) -> None:
    """Mountains or hills behind, and a nearer hill in the colour of the season."""
    unit, ground, foot = country.unit, country.ground, HORIZON * country.canvas.height
    if country.scene.mountains:
        for part, tall in ((0.16, 62), (0.84, 66), (0.5, 76)):
            x = part * country.canvas.width + country.about(-8, 8)
            _mountain(country, country.figure(x, foot + (10 - tall) * unit), tall)
    else:
        country.hill(foot - 14 * unit, 13 * unit, mix(ground, country.low, 0.35))
    country.hill(foot - 2 * unit, 4 * unit, mix(ground, country.low, 0.12))


def _mountain(country: Country, top: Figure, tall: float) -> None:
    rock, wide, cap = mix(country.land(ROCK), country.low, 0.25), tall * 1.1, tall * 0.3
    top.polygon([(0, 0), (wide, tall), (-wide, tall)], rock)
    top.polygon([(0, 0), (wide, tall), (wide * 0.2, tall)], mix(rock, BLACK, 0.14))
    snow = [(0, 0), (1.1, 1), (0.45, 0.72), (0, 1.05), (-0.5, 0.75), (-1.1, 1)]
    top.polygon([(x * cap, y * cap) for x, y in snow], country.land(SNOW))
