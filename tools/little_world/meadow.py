"""The meadow: a house with a path to its door, trees beside it, and a car on the road before it."""

import random

from PIL import Image

from .canvas import BLACK, Canvas, Colour, mix
from .country import DARK, PAINT, SNOW, WOOD, Country, begin_country
from .scenes import Scene

CROWN: dict[str, Colour] = {  # of trees
    "summer": (28, 100, 58),
    "autumn": (164, 68, 26),
    "winter": (52, 98, 96),
}
ROOF, ASPHALT, DASHES = (82, 66, 74), (108, 110, 122), (236, 232, 210)
SAND, TRODDEN = (226, 206, 160), (176, 190, 212)  # the path, without snow and in it
DAY_PANE, LIT_PANE = (168, 214, 240), (255, 216, 112)
HOUSE_FOOT, TREE_FOOT, WHEELS = 0.78, 0.77, 0.925  # parts of the height
HALF_HOUSE, TREE_PITCH = 46, 38  # units that a house and a tree keep to themselves


def paint_meadow(
    scene: Scene, r: random.Random, width: int, height: int, kind: type[Canvas] = Canvas
) -> Image.Image:
    """Without rain or snow in the air."""
    country = begin_country(scene, r, width, height, kind)
    unit = country.unit
    country.hill(0.66 * height, 3 * unit, country.ground)
    house = _house_place(country)
    _path(country, house)
    for x in tree_places(house, width, unit)[: scene.trees]:
        _tree(country, x + country.about(-1, 1), TREE_FOOT * height + country.about(-2, 2))
    _house(country, house)
    if scene.car:
        _road(country)
        _car(country, width * r.uniform(0.16, 0.84))
    return country.canvas.finished(0.8, 7 * unit)


def tree_places(house: float, width: int, unit: float) -> list[float]:
    """Where trees stand beside a house at `house`, from the nearest to the farthest.

    Without touching anything; so many trees have always the first so many places, see `city`.
    """
    edge, half = 3 * unit, HALF_HOUSE * unit
    places = []
    for start, end in ((house - half, edge), (house + half, width - edge)):
        count = max(0, int(abs(end - start) / (TREE_PITCH * unit) + 0.05))
        places += [(n, start + (end - start) * (n + 0.5) / count) for n in range(count)]
    return [x for _, x in sorted(places)]


def _house_place(country: Country) -> float:
    width, half = country.canvas.width, HALF_HOUSE * country.unit
    if country.scene.place == "middle":
        return width / 2 + country.about(-3, 3)
    inwards = half + country.about(2, 6)
    return inwards if country.scene.place == "left" else width - inwards


def _path(country: Country, x: float) -> None:
    height = country.canvas.height
    door = country.figure(x, HOUSE_FOOT * height)
    below = (1 - HOUSE_FOOT) * height / country.unit
    sand = country.land(TRODDEN if country.scene.season == "winter" else SAND)
    door.polygon([(-6, -2), (6, -2), (22, below), (-22, below)], sand)


def _tree(country: Country, x: float, foot: float) -> None:
    """30 units wide and about 54 high."""
    tree, winter = country.figure(x, foot, 0.88 * country.unit), country.scene.season == "winter"
    crown, snow = country.thing(CROWN[country.scene.season]), country.thing(SNOW)
    tree.box(-3, -14, 6, 14, country.thing(WOOD))
    if country.scene.tree == "pine":
        for half, low, shade in ((17, -10, 0.1), (14, -24, 0.05), (11, -38, 0)):
            tree.polygon([(-half, low), (half, low), (0, low - 24)], mix(crown, BLACK, shade))
        if winter:
            tree.polygon([(-5.5, -50), (5.5, -50), (0, -62)], snow)
    else:
        for dx, dy, size in ((-7, -22, 10), (7, -22, 10), (0, -34, 15)):
            tree.oval(dx, dy, size, size, crown)
        if winter:
            tree.oval(0, -45, 9, 4, snow)


def _house(country: Country, x: float) -> None:
    """76 units wide and 70 high: two windows, a door, a roof with a chimney."""
    size = country.about(0.93, 1.02)
    house = country.figure(x, HOUSE_FOOT * country.canvas.height, size)
    dark, snow = country.thing(DARK), country.thing(SNOW)
    house.box(18, -70, 10, 26, dark)
    house.box(-38, -44, 76, 44, dark)  # the outline of the wall
    house.box(-36.5, -44, 73, 42.5, country.thing(PAINT[country.scene.house]))
    house.polygon([(-43, -42), (43, -42), (27, -68), (-27, -68)], country.thing(ROOF))
    if country.scene.season == "winter":
        house.polygon([(-38, -48), (38, -48), (27, -68), (-27, -68)], snow)
        house.box(17, -72, 12, 4, snow)
    glow = country.lamp((110, 84, 30))
    for left in (-30, 12):
        house.box(left, -34, 18, 18, dark)
        house.box(left + 1.5, -32.5, 15, 15, LIT_PANE if glow else DAY_PANE, glow)
        house.box(left + 8.25, -34, 1.5, 18, dark)
    house.box(-7, -27, 14, 27, dark)
    house.box(-5.5, -25.5, 11, 25.5, country.thing(WOOD))


def _road(country: Country) -> None:
    width = country.canvas.width
    road = country.figure(0, WHEELS * country.canvas.height)
    across = width / country.unit
    road.box(0, -14, across, 26, country.land(ASPHALT))
    for n in range(6):
        road.box((n + 0.25) * across / 6, 6, across / 12, 2, country.land(DASHES))


def _car(country: Country, x: float) -> None:
    """52 units wide and 26 high, looking left or right."""
    foot = WHEELS * country.canvas.height
    car = country.figure(x, foot, way=country.r.choice((-1, 1)))
    paint, glass = country.thing(PAINT[country.scene.car]), country.thing((196, 228, 244))
    car.polygon([(-19, -12), (-13, -25), (7, -25), (15, -12)], paint)
    car.polygon([(-15, -13), (-11, -22.5), (-4, -22.5), (-4, -13)], glass)
    car.polygon([(-1, -13), (-1, -22.5), (5.5, -22.5), (11, -13)], glass)
    car.box(-26, -15, 52, 13, paint, round_by=4)
    car.oval(24, -10, 2.4, 2.4, (255, 246, 190), country.lamp((190, 170, 90)))
    for wheel in (-14, 14):
        car.oval(wheel, -2, 6, 6, (28, 28, 34))
        car.oval(wheel, -2, 2.4, 2.4, (170, 172, 180))
