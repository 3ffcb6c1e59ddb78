"""The country: a meadow with a house, trees and a car, or the sea with boats and a lighthouse.

Places are parts of the picture's width or height; sizes are in units, of which a picture of
256 x 256 has 256 across. What stands in the country is drawn in a milder light than the land, so
that its colours can be told apart at night.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image

from .canvas import BLACK, WHITE, Canvas, Colour, gradient, lit, mix, unit_of
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
CROWN: dict[str, Colour] = {  # of trees
    "summer": (28, 100, 58),
    "autumn": (164, 68, 26),
    "winter": (52, 98, 96),
}
SNOW, WOOD, ROOF, ASPHALT = (244, 248, 255), (104, 64, 40), (82, 66, 74), (108, 110, 122)
DARK = (64, 48, 52)  # outlines
SAND, TRODDEN = (226, 206, 160), (176, 190, 212)  # the path, without snow and in it
WATER_NEAR, WATER_FAR = (24, 112, 156), (92, 172, 200)
SKY = {  # top and horizon, of each time: in the clear, and where it rains or snows
    "day": (((62, 138, 226), (176, 216, 246)), ((116, 136, 164), (202, 212, 224))),
    "sunset": (((92, 66, 150), (255, 178, 98)), ((96, 80, 128), (224, 162, 128))),
    "night": (((9, 13, 44), (46, 62, 124)), ((16, 20, 42), (50, 58, 94))),
}
LAND_LIGHT = {"day": (1, 1, 1), "sunset": (0.9, 0.78, 0.82), "night": (0.44, 0.48, 0.72)}
THING_LIGHT = {"day": (1, 1, 1), "sunset": (1, 0.91, 0.87), "night": (0.74, 0.74, 0.9)}

HORIZON = 0.52  # of the height, as are the next ones
HOUSE_FOOT, TREE_FOOT, WHEELS = 0.78, 0.77, 0.925
SHORE = 0.57
BOAT_SLOTS = ((0.17, 0.69), (0.5, 0.69), (0.83, 0.69), (0.33, 0.92), (0.67, 0.92))
HALF_HOUSE, TREE_PITCH = 46, 38  # units that a house and a tree keep to themselves


@dataclass
class Land:
    """A piece of country on its canvas, and what everything in it needs to know."""

    canvas: Canvas
    scene: Scene
    r: random.Random
    unit: float  # pixels of a length that is 1 in a picture of 256

    @property
    def low(self) -> Colour:
        """The colour of the sky at the horizon, which far things take on."""
        return self.sky[1]

    @property
    def sky(self) -> tuple[Colour, Colour]:
        return SKY[self.scene.time][self.scene.weather in ("rain", "snow")]

    @property
    def dark(self) -> bool:
        return self.scene.time == "night"

    def land(self, colour: Colour) -> Colour:
        return lit(colour, LAND_LIGHT[self.scene.time])

    def thing(self, colour: Colour) -> Colour:
        return lit(colour, THING_LIGHT[self.scene.time])

    def about(self, least: float, most: float) -> float:
        return self.r.uniform(least, most) * self.unit


def paint_country(scene: Scene, r: random.Random, width: int, height: int) -> Image.Image:
    """Without the rain or snow itself."""
    unit = unit_of(width, height)
    sky = SKY[scene.time][scene.weather in ("rain", "snow")]
    land = Land(Canvas(width, height, *sky, round(HORIZON * height)), scene, r, unit)
    _sky(land)
    _backdrop(land)
    (_meadow if scene.kind == "meadow" else _sea)(land)
    return land.canvas.finished(0.8, 7 * unit)


def _sky(land: Land) -> None:
    """Stars, sun or moon, and clouds that leave it free."""
    canvas, scene, r, unit = land.canvas, land.scene, land.r, land.unit
    width, height = canvas.width, canvas.height
    if scene.light == "moon":
        for _ in range(24):
            size = land.about(0.7, 1.2)
            place = r.random() * width, r.random() * height * 0.4
            canvas.oval(*place, size, size, (226, 230, 250))
    slots = [0.14, 0.38, 0.62, 0.86]
    r.shuffle(slots)
    if scene.light:
        low = scene.time == "sunset"
        x, y = slots.pop() * width, height * (0.27 if low else 0.15)
        colours = {"day": (255, 236, 120), "sunset": (255, 124, 66), "night": (250, 244, 214)}
        colour = colours[scene.time]
        canvas.oval(x, y, 18 * unit, 18 * unit, colour, mix(colour, BLACK, 0.5))
    if scene.weather != "clear":
        pale = {"day": (250, 250, 252), "sunset": (236, 190, 190), "night": (92, 100, 140)}
        colour = mix(pale[scene.time], (120, 126, 140), 0.25 if not scene.light else 0)
        for slot in slots[:3]:
            x, y = slot * width + land.about(-6, 6), height * r.uniform(0.1, 0.2)
            _cloud(canvas, x, y, unit, colour)


def _cloud(canvas: Canvas, x: float, y: float, unit: float, colour: Colour) -> None:
    for dx, dy, size in ((-17, 3, 10), (-5, -3, 14), (10, -1, 12), (21, 4, 8)):
        canvas.oval(x + dx * unit, y + dy * unit, size * 1.15 * unit, size * 0.85 * unit, colour)


def _hill(land: Land, foot: float, swell: float, colour: Colour) -> None:
    """Everything below a gentle line around `foot` pixels."""
    width, height = land.canvas.width, land.canvas.height
    begin, waves = land.r.random() * 7, land.r.uniform(4.5, 7.5)
    line = [(x, foot - swell * math.sin(x / width * waves + begin)) for x in range(0, width + 8, 8)]
    land.canvas.polygon([*line, (width + 8, height), (0, height)], colour)


def _backdrop(land: Land) -> None:
    """Mountains or hills behind, and a nearer hill in the colour of the season."""
    canvas, unit = land.canvas, land.unit
    foot = HORIZON * canvas.height
    ground = land.land(LAND[land.scene.season])
    if land.scene.mountains:
        for n, part in enumerate((0.16, 0.84, 0.5)):
            x = part * canvas.width + land.about(-8, 8)
            _mountain(land, x, foot, (62, 66, 76)[n] * unit)
    else:
        _hill(land, foot - 14 * unit, 13 * unit, mix(ground, land.low, 0.35))
    _hill(land, foot - 2 * unit, 4 * unit, mix(ground, land.low, 0.12))


def _mountain(land: Land, x: float, foot: float, tall: float) -> None:
    rock = mix(land.land((112, 118, 146)), land.low, 0.25)
    wide, top = tall * 1.1, foot + 10 * land.unit - tall
    cap = tall * 0.3
    land.canvas.polygon([(x, top), (x + wide, top + tall), (x - wide, top + tall)], rock)
    shade = mix(rock, BLACK, 0.14)
    land.canvas.polygon([(x, top), (x + wide, top + tall), (x + wide * 0.2, top + tall)], shade)
    points = [(0, 0), (1.1, 1), (0.45, 0.72), (0, 1.05), (-0.5, 0.75), (-1.1, 1)]
    snow = [(x + dx * cap, top + dy * cap) for dx, dy in points]
    land.canvas.polygon(snow, land.land(SNOW))


def _meadow(land: Land) -> None:
    canvas, scene, unit = land.canvas, land.scene, land.unit
    width, height = canvas.width, canvas.height
    ground = land.land(LAND[scene.season])
    _hill(land, 0.66 * height, 3 * unit, ground)
    at = {"left": HALF_HOUSE * unit, "middle": width / 2, "right": width - HALF_HOUSE * unit}
    shift = {"left": (2, 6), "middle": (-3, 3), "right": (-6, -2)}[scene.place]
    house = at[scene.place] + land.about(*shift)
    door = HOUSE_FOOT * height - 2 * unit
    path = [(-6, door), (6, door), (22, height), (-22, height)]
    sand = land.land(TRODDEN if scene.season == "winter" else SAND)
    canvas.polygon([(house + dx * unit, y) for dx, y in path], sand)
    slots = tree_slots(house, width, unit)
    for x in sorted(land.r.sample(slots, scene.trees)):
        _tree(land, x + land.about(-1, 1), TREE_FOOT * height + land.about(-2, 2))
    _house(land, house, HOUSE_FOOT * height)
    if scene.car:
        wheels = WHEELS * height
        canvas.box(0, wheels - 14 * unit, width, 26 * unit, land.land(ASPHALT))
        for n in range(6):
            dash = (n + 0.25) * width / 6, wheels + 6 * unit
            canvas.box(*dash, width / 12, 2 * unit, land.land((236, 232, 210)))
        _car(land, width * land.r.uniform(0.16, 0.84), wheels)


def tree_slots(house: float, width: int, unit: float) -> list[float]:
    """Where trees can stand, left and right of a house at `house`, without touching anything."""
    slots = []
    edge, half = 3 * unit, HALF_HOUSE * unit
    for start, end in ((edge, house - half), (house + half, width - edge)):
        count = max(0, int((end - start) / (TREE_PITCH * unit) + 0.05))
        slots += [start + (end - start) * (n + 0.5) / count for n in range(count)]
    return slots


def _tree(land: Land, x: float, foot: float) -> None:
    """34 units wide and about 60 high."""
    canvas, unit, winter = land.canvas, land.unit, land.scene.season == "winter"
    crown, snow = land.thing(CROWN[land.scene.season]), land.thing(SNOW)
    canvas.box(x - 3 * unit, foot - 14 * unit, 6 * unit, 14 * unit, land.thing(WOOD))
    if land.scene.tree == "pine":
        for n in range(3):
            half, low = (17 - 3 * n) * unit, foot - (10 + 14 * n) * unit
            top = (x, low - 24 * unit)
            canvas.polygon(
                [(x - half, low), (x + half, low), top], mix(crown, BLACK, 0.1 - 0.05 * n)
            )
        if winter:
            low = foot - 50 * unit
            canvas.polygon([(x - 5.5 * unit, low), (x + 5.5 * unit, low), top], snow)
        return
    for dx, up, size in ((-7, 22, 10), (7, 22, 10), (0, 34, 15)):
        canvas.oval(x + dx * unit, foot - up * unit, size * unit, size * unit, crown)
    if winter:
        canvas.oval(x, foot - 45 * unit, 9 * unit, 4 * unit, snow)


def _house(land: Land, x: float, foot: float) -> None:
    """76 units wide and 70 high: two windows, a door, a roof with a chimney."""
    canvas, scene = land.canvas, land.scene
    unit = land.about(0.93, 1.02)
    wall, dark = land.thing(PAINT[scene.house]), land.thing(DARK)
    roof = land.thing(ROOF)

    def box(left: float, top: float, wide: float, tall: float, colour: Colour, glow=None) -> None:
        canvas.box(x + left * unit, foot + top * unit, wide * unit, tall * unit, colour, glow)

    box(18, -70, 10, 26, dark)
    box(-38, -44, 76, 44, dark)  # the outline of the wall
    box(-36.5, -44, 73, 42.5, wall)
    eaves, ridge = foot - 42 * unit, foot - 68 * unit
    outer = [(-43, eaves), (43, eaves), (27, ridge), (-27, ridge)]
    canvas.polygon([(x + dx * unit, y) for dx, y in outer], roof)
    if scene.season == "winter":
        inner = [(-38, eaves - 6 * unit), (38, eaves - 6 * unit), (27, ridge), (-27, ridge)]
        canvas.polygon([(x + dx * unit, y) for dx, y in inner], land.thing(SNOW))
        box(17, -72, 12, 4, land.thing(SNOW))
    bright = scene.time != "day"
    pane, glow = ((255, 216, 112), (110, 84, 30)) if bright else ((168, 214, 240), None)
    for left in (-30, 12):
        box(left, -34, 18, 18, dark)
        box(left + 1.5, -32.5, 15, 15, pane, glow)
        box(left + 8.25, -34, 1.5, 18, dark)
    box(-7, -27, 14, 27, dark)
    box(-5.5, -25.5, 11, 25.5, land.thing(WOOD))


def _car(land: Land, x: float, foot: float) -> None:
    """52 units wide and 26 high, looking left or right."""
    canvas, unit, way = land.canvas, land.unit, land.r.choice((-1, 1))
    paint, glass = land.thing(PAINT[land.scene.car]), land.thing((196, 228, 244))

    def shape(points: list[tuple[float, float]], colour: Colour) -> None:
        canvas.polygon([(x + way * dx * unit, foot + dy * unit) for dx, dy in points], colour)

    shape([(-19, -12), (-13, -25), (7, -25), (15, -12)], paint)
    shape([(-15, -13), (-11, -22.5), (-4, -22.5), (-4, -13)], glass)
    shape([(-1, -13), (-1, -22.5), (5.5, -22.5), (11, -13)], glass)
    canvas.box(x - 26 * unit, foot - 15 * unit, 52 * unit, 13 * unit, paint, round_by=4 * unit)
    glow = None if land.scene.time == "day" else (190, 170, 90)
    lamp = x + way * 24 * unit, foot - 10 * unit
    canvas.oval(*lamp, 2.4 * unit, 2.4 * unit, (255, 246, 190), glow)
    for dx in (-14, 14):
        canvas.oval(x + dx * unit, foot - 2 * unit, 6 * unit, 6 * unit, (28, 28, 34))
        canvas.oval(x + dx * unit, foot - 2 * unit, 2.4 * unit, 2.4 * unit, (170, 172, 180))


def _sea(land: Land) -> None:
    """Water with slow waves, and boats in slots of two rows, where a lighthouse takes one."""
    canvas, scene, r, unit = land.canvas, land.scene, land.r, land.unit
    width, height = canvas.width, canvas.height
    shore = round(SHORE * height)
    far, near = mix(land.land(WATER_FAR), land.low, 0.3), land.land(WATER_NEAR)
    canvas.paste(gradient((width, height - shore), far, near), shore)
    for row in range(1, 7):
        for column in range(3):
            part = row / 7
            x = (column + 0.5 + (row % 2) * 0.5 + r.uniform(-0.1, 0.1)) * width / 3
            wide = (8 + 18 * part) * unit
            y = shore + part * (height - shore)
            canvas.box(
                x - wide / 2, y, wide, (1 + part) * unit, mix(mix(far, near, part), WHITE, 0.2)
            )
    slots = list(BOAT_SLOTS)
    if scene.lighthouse:
        slots.pop(2 if scene.place == "right" else 0)
        x = 0.87 if scene.place == "right" else 0.13
        _lighthouse(land, x * width, shore + 3 * unit)
    for column, row in r.sample(slots, scene.boats):
        x, y = column * width + land.about(-5, 5), row * height + land.about(-2, 2)
        _boat(land, x, y)


def _lighthouse(land: Land, x: float, foot: float) -> None:
    """A striped tower on a rock, 88 units high."""
    canvas, unit = land.canvas, land.unit
    canvas.oval(x, foot, 28 * unit, 6 * unit, land.thing((90, 96, 110)))
    for n in range(5):
        low, high = foot - 13 * n * unit, foot - 13 * (n + 1) * unit
        half, less = (12 - n) * unit, (11 - n) * unit
        stripe = land.thing((206, 48, 50) if n % 2 else (246, 246, 240))
        canvas.polygon(
            [(x - half, low), (x + half, low), (x + less, high), (x - less, high)], stripe
        )
    glow = None if land.scene.time == "day" else (255, 220, 120)
    canvas.box(x - 5 * unit, foot - 75 * unit, 10 * unit, 10 * unit, (255, 240, 160), glow)
    roof = [
        (x - 8 * unit, foot - 75 * unit),
        (x + 8 * unit, foot - 75 * unit),
        (x, foot - 86 * unit),
    ]
    canvas.polygon(roof, land.thing((64, 56, 66)))


def _boat(land: Land, x: float, foot: float) -> None:
    """50 units wide and 54 high, of which 8 are hull."""
    canvas, unit = land.canvas, land.unit
    paint, dark = land.thing(PAINT[land.scene.sails]), land.thing(DARK)

    def shape(points: list[tuple[float, float]], colour: Colour) -> None:
        canvas.polygon([(x + dx * unit, foot + dy * unit) for dx, dy in points], colour)

    shape([(1, -54), (1, -9), (25, -9)], dark)  # the sails' outlines, and the mast between them
    shape([(-1, -50), (-1, -9), (-22, -9)], dark)
    shape([(2.5, -49), (2.5, -10.5), (22.5, -10.5)], paint)
    shape([(-2.5, -44.5), (-2.5, -10.5), (-19, -10.5)], paint)
    canvas.box(x - 1 * unit, foot - 54 * unit, 2 * unit, 48 * unit, dark)
    shape([(-25, -8), (25, -8), (18, 3), (-18, 3)], land.thing(WOOD))
