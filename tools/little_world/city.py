"""The city: a street that runs away from us between towers, neon signs, and cars in the air.

A side of the street is a wall seen in perspective. `out` is how far a point of it stands from the
vanishing point, across, and everything else about it grows with that: `up` is a height above the
horizon in units of `out`, negative below it. Lengths are in units, of which a square picture has
256 across.
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from .canvas import BLACK, FINE, WHITE, Canvas, Colour, Figure, brightened, mix, unit_of
from .scenes import Scene

NEON: dict[str, Colour] = {
    "red": (255, 36, 44),
    "orange": (255, 100, 8),
    "yellow": (255, 234, 40),
    "green": (40, 255, 110),
    "blue": (30, 120, 255),
    "purple": (156, 56, 255),
    "pink": (255, 56, 164),
}
SKY = {
    "night": ((8, 8, 32), (92, 50, 136)),
    "sunset": ((76, 48, 118), (255, 146, 92)),
}
WALL = {"night": (22, 22, 52), "sunset": (58, 38, 82)}
ROAD = {"night": (30, 28, 56), "sunset": (78, 58, 92)}
WARM, COLD = (255, 206, 120), (120, 190, 255)  # the light of windows
HULL, GLASS, JET = (226, 230, 238), (60, 96, 140), (90, 220, 255)  # of flying cars

HORIZON = 0.63  # of the height
CURB = -0.26  # `up` of the walls' feet
FAR = 256  # an `out` beside the picture
# Of the towers on a side, far to near: where they begin and end (`out`), and their `up`.
TOWERS = ((23, 44, 2.7), (44, 75, 2.3), (75, 200, 1.55))
# Of the signs, far to near: `out`, width, height, and the `up` of the upper end.
SIGNS = ((55, 9, 29, 1.0), (85, 14, 46, 1.32), (110, 15, 44, 0.62))
# Of the flying cars: how far beside the middle, and the row as a part of the height. So many cars
# have always the first so many places: where they could be anywhere, they are hard to count.
CAR_PLACES = ((-34, 0.19), (34, 0.105), (34, 0.275), (-34, 0.35))


@dataclass
class Street:
    """A city on its canvas, and what everything in it needs to know."""

    canvas: Canvas
    scene: Scene
    r: random.Random
    unit: float  # pixels of a length that is 1 in a picture of 256
    across: float  # of the vanishing point
    horizon: int

    @property
    def lights(self) -> tuple[Colour, Colour]:
        one, other = self.scene.neon
        return NEON[one], NEON[other]

    @property
    def tall(self) -> float:
        """How much higher than in a square picture the towers are."""
        return self.canvas.height / 256 / self.unit

    def point(self, side: int, out: float, up: float) -> tuple[float, float]:
        out *= self.unit
        return self.across + side * out, self.horizon - out * up

    def wall(
        self, side: int, outs: tuple[float, float], ups: tuple[float, float]
    ) -> list[tuple[float, float]]:
        """The four corners of a piece of wall."""
        (near, far), (low, high) = outs, ups
        corners = ((near, low), (near, high), (far, high), (far, low))
        return [self.point(side, out, up) for out, up in corners]


def paint_city(scene: Scene, r: random.Random, width: int, height: int) -> Image.Image:
    """Without the rain itself."""
    unit = unit_of(width, height)
    horizon = round(height * HORIZON)
    canvas = Canvas(width, height, *SKY[scene.time], horizon)
    street = Street(canvas, scene, r, unit, width * r.uniform(0.48, 0.52), horizon)
    _skyline(street)
    for depth, tower in enumerate(TOWERS):
        for side in (-1, 1):
            _tower(street, side, depth, tower)
    _ground(street)
    first = r.randrange(2)  # which light hangs first on the left; the other one does on the right
    for depth, sign in enumerate(SIGNS):
        for side in (-1, 1):
            _sign(street, side, street.lights[(first + depth + (side > 0)) % 2], sign)
    for aside, row in CAR_PLACES[: scene.flying_cars]:
        x = street.across + (aside + r.uniform(-4, 4)) * unit
        y = row * height + r.uniform(-3, 3) * unit
        _flying_car(Figure(canvas, x, y, unit))
    image = canvas.finished(0.9 if scene.time == "night" else 0.55, 5 * unit)
    return _mirrored(image, street) if scene.wet else image


def _skyline(street: Street) -> None:
    """Towers far away, haze in the colours of the lights, and the evening sun."""
    canvas, unit, scene = street.canvas, street.unit, street.scene
    low = SKY[scene.time][1]
    if scene.time == "sunset":
        y = street.horizon - 52 * unit
        canvas.oval(street.across, y, 25 * unit, 25 * unit, (255, 224, 140), (120, 80, 40))
    wide = 15 * unit
    for n, tall in enumerate((40, 58, 46, 30, 34, 52, 64, 42)):
        tall *= unit * street.r.uniform(0.9, 1.1)
        shade = mix(WALL[scene.time], low, 0.45 + n % 2 * 0.15)
        canvas.box(street.across + (n - 4) * wide, street.horizon - tall, wide + 1, tall, shade)
    _landmark(street)
    haze = mix(mix(*street.lights, 0.5), BLACK, 0.4)
    canvas.shine(street.across, street.horizon - 4 * unit, 46 * unit, 12 * unit, haze)


def _landmark(street: Street) -> None:
    """A slim tower at the end of the street, with a board and stripes in the two lights."""
    wall, low = WALL[street.scene.time], SKY[street.scene.time][1]
    shade, (board, stripe) = mix(wall, low, 0.25), street.lights
    tall = 100 * street.tall
    top = Figure(street.canvas, street.across, street.horizon - tall * street.unit, street.unit)
    top.polygon([(0, -26), (2, 0), (-2, 0)], shade)
    top.box(-11, 0, 22, tall, shade)
    top.box(-7, 5, 14, 20, mix(board, shade, 0.2), mix(board, BLACK, 0.3))
    for n in range(4):
        top.box(-7, 31 + 9 * n, 14, 3, mix(stripe, shade, 0.35), mix(stripe, BLACK, 0.6))


def _tower(street: Street, side: int, depth: int, tower: tuple[float, float, float]) -> None:
    """Its side along the street, with windows and a lit edge, and above it what faces us."""
    canvas, r = street.canvas, street.r
    near, far, up = tower[0], tower[1], tower[2] * street.tall * r.uniform(0.93, 1.07)
    haze = SKY[street.scene.time][1]
    shade = mix(WALL[street.scene.time], haze, (0.42, 0.22, 0.06)[depth])
    corner, edge = street.point(side, far, up), street.point(side, FAR, CURB)
    front = [corner, (edge[0], corner[1]), (edge[0], street.horizon), (corner[0], street.horizon)]
    canvas.polygon(front, mix(shade, BLACK, 0.25))
    canvas.polygon(street.wall(side, (near, far), (CURB, up)), shade)
    light = r.choice((WARM, COLD))
    columns, rows = (3, 4, 7)[depth], round(6 * street.tall)
    for column in range(columns):
        # Windows that are as far from each other in the street crowd towards the vanishing point.
        outs = [near * (far / near) ** ((column + part) / columns) for part in (0.25, 0.8)]
        for row in range(rows):
            low = 0.1 + (up - 0.2) * row / rows
            high = low + 0.5 * (up - 0.2) / rows
            if r.random() < 0.6:
                glass = mix(shade, light, r.choice((0.35, 0.6, 0.85)))
                canvas.polygon(street.wall(side, (outs[0], outs[1]), (low, high)), glass)
    glass = mix(shade, mix(WARM, WHITE, 0.2), 0.75)
    canvas.polygon(street.wall(side, (near, far), (CURB + 0.04, -0.1)), glass)
    for column in range(columns):
        out = near * (far / near) ** (column / columns)
        canvas.polygon(street.wall(side, (out, out * 1.03), (CURB, -0.1)), shade)
    roof, shops = street.r.sample(street.lights, 2)
    canvas.polygon(street.wall(side, (near, far), (up - 0.025, up + 0.015)), roof, roof)
    canvas.polygon(street.wall(side, (near, far), (-0.07, -0.02)), shops, shops)


def _ground(street: Street) -> None:
    """Road and pavements, with lit curbs and a broken line."""
    canvas, unit = street.canvas, street.unit
    road = ROAD[street.scene.time]
    canvas.polygon(_ground_of(street), mix(road, WALL[street.scene.time], 0.5))
    bottom = canvas.height - street.horizon
    feet = [street.across + aside * unit for aside in (-150, 150)]
    apex = (street.across, street.horizon)
    canvas.polygon([apex, (feet[0], canvas.height), (feet[1], canvas.height)], road)
    for foot, light in zip(feet, street.lights, strict=True):
        line = [apex, (foot - 3 * unit, canvas.height), (foot + 3 * unit, canvas.height)]
        canvas.polygon(line, mix(light, road, 0.35), mix(light, BLACK, 0.4))
    for n in range(4):
        start, end = ((n + part) ** 1.6 / 4**1.6 for part in (0.25, 0.75))
        tops = [(street.across + s * 4 * start * unit, apex[1] + start * bottom) for s in (-1, 1)]
        ends = [(street.across + s * 4 * end * unit, apex[1] + end * bottom) for s in (1, -1)]
        canvas.polygon([*tops, *ends], (196, 192, 184))


def _ground_of(street: Street) -> list[tuple[float, float]]:
    width, height = street.canvas.width, street.canvas.height
    left, right = (street.point(side, FAR, CURB) for side in (-1, 1))
    return [(street.across, street.horizon), right, (width, height), (0, height), left]


def _sign(street: Street, side: int, light: Colour, sign: tuple[float, ...]) -> None:
    """A lit board that sticks out of the wall, with dark bars for its letters."""
    out, wide, tall, up = sign
    board = Figure(street.canvas, *street.point(side, out, up * street.tall), street.unit, -side)
    board.box(0, 0, wide, tall, light, light, round_by=wide * 0.2)
    for n in range(3):
        bar = (wide * 0.26, tall * (0.12 + 0.28 * n), wide * 0.48, tall * 0.17)
        board.box(*bar, mix(light, (10, 0, 30), 0.75))


def _flying_car(car: Figure) -> None:
    """42 by 18 units, looking right: a car whose wheels are jets."""
    car.polygon([(-14, -1), (-9, -9), (7, -9), (14, -1)], HULL)
    car.polygon([(-10.5, -2), (-7.5, -7), (-1.5, -7), (-1.5, -2)], GLASS)
    car.polygon([(0.5, -2), (0.5, -7), (6, -7), (10.5, -2)], GLASS)
    car.box(-21, -2.5, 42, 8, HULL, round_by=3)
    for left in (-15, 5):
        car.box(left, 5.5, 10, 3, JET, (50, 150, 190))
    car.oval(19.5, 0.5, 2, 2, (255, 236, 150), (180, 160, 90))
    car.oval(-19.5, 0.5, 2, 2, (255, 60, 50), (160, 20, 20))


def _mirrored(image: Image.Image, street: Street) -> Image.Image:
    """The same street when it is wet: its ground shows what stands above it, upside down."""
    width, height = image.size
    horizon = street.horizon
    depth = height - horizon
    above = image.crop((0, max(0, horizon - 2 * depth), width, horizon))
    above = above.transpose(Image.Transpose.FLIP_TOP_BOTTOM).resize((width, depth))
    above = above.filter(ImageFilter.BoxBlur((1.5, 5)))
    dull = image.crop((0, horizon, width, height))
    wet = image.copy()
    wet.paste(ImageChops.add(brightened(dull, 0.7), brightened(above, 0.72)), (0, horizon))
    mask = Image.new("L", (width * FINE, height * FINE))
    ground = [(x * FINE, y * FINE) for x, y in _ground_of(street)]
    ImageDraw.Draw(mask).polygon(ground, 255)
    return Image.composite(wet, image, mask.reduce(FINE))
