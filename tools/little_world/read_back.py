"""What a picture shows, read from its pixels: made for drawn ones, good for painted ones too.

A pixel belongs to whatever has the nearest of all colours that can be there, in the light of the
time. Pictures are uint8 [height, width, 3] in any of the usual sizes, kinds those of `Scene`.
"""

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageFilter

from . import city, country, meadow, sea
from .canvas import Colour, lit, unit_of
from .scenes import PLACES

Pixels = np.ndarray  # uint8 [height, width, 3]
Mask = np.ndarray  # bool [rows, columns]

SKIES = {time: [top for top, _ in skies] for time, skies in country.SKY.items()}
CITY_SKIES = {time: [top] for time, (top, _) in city.SKY.items()}
# Of the pixels of the upper half, how many are brighter than what is around them where something
# falls; stars at night are fewer.
FALLING = {"day": 0.006, "sunset": 0.01, "night": 0.024}
HUES = {name: colorsys.rgb_to_hsv(*(v / 255 for v in rgb))[0] for name, rgb in city.NEON.items()}


def read_back(picture: Pixels, kind: str) -> dict[str, str | int | frozenset[str]]:
    """Attributes of `Scene` by name, as far as they can be read from a picture of this kind.

    `neon` is a set, and a colour is empty where the thing is not there. Snow lies on the ground in
    winter.
    """
    if kind == "city":
        time = _time(picture, CITY_SKIES)
        return {
            "time": time,
            "weather": _weather_of_the_city(picture, time),
            "neon": _neon(picture),
            "flying_cars": _flying_cars(picture),
        }
    seen = CountryPicture(picture, kind)
    found: dict[str, str | int | frozenset[str]] = {"time": seen.time, "season": seen.season}
    found["weather"] = seen.weather()
    if kind == "sea":
        return {**found, "boats": seen.boats(), "sails": seen.sails()}
    house, place = seen.house()
    trees = seen.trees(place)
    return {**found, "house": house, "place": place, "car": seen.car(), "trees": trees}


def _time(picture: Pixels, skies: Mapping[str, Sequence[Colour]]) -> str:
    top = _top(picture)
    return min(skies, key=lambda time: min(np.linalg.norm(top - sky) for sky in skies[time]))


def _top(picture: Pixels) -> np.ndarray:
    """The colour of the sky at the top of the middle."""
    height, width, _ = picture.shape
    return np.median(picture[: height // 25, width * 3 // 8 : width * 5 // 8], (0, 1))


def _weather_of_the_city(picture: Pixels, time: str) -> str:
    """By the road, which shines where it is wet."""
    height, width, _ = picture.shape
    road = picture[height * 4 // 5 :, width * 3 // 10 : width * 7 // 10]
    return "rain" if road.max(2).mean() > 1.3 * max(city.ROAD[time]) else "clear"


def _neon(picture: Pixels) -> frozenset[str]:
    """The two hues that most of the vivid pixels above the street have."""
    above = picture[: int(city.HORIZON * len(picture))].reshape(-1, 3)
    vivid = (above.max(1) > 220) & (np.ptp(above, axis=1) > 165)
    if not vivid.any():
        return frozenset()
    hues = np.asarray(Image.fromarray(above[vivid][None]).convert("HSV"))[0, :, :1] / 255
    away = np.abs(hues - np.array(list(HUES.values())))
    nearest = np.minimum(away, 1 - away).argmin(1)
    order = np.bincount(nearest, minlength=len(HUES)).argsort()[::-1]
    return frozenset(list(HUES)[n] for n in order[:2])


def _flying_cars(picture: Pixels) -> int:
    """The pale things in the sky."""
    sky = _calm(picture, 3)[: int(0.45 * len(picture))]
    pale = (sky.min(2) > 165) & (np.ptp(sky, axis=2) < 60)
    return _count(pale, least=90 * unit_of(picture.shape[1], len(picture)) ** 2)


class CountryPicture:
    """A picture of the country; its rows are told as parts of the height."""

    def __init__(self, picture: Pixels, kind: str):
        self.picture, self.pixels = picture, _calm(picture, 5)
        self.height, self.width, _ = picture.shape
        self.unit = unit_of(self.width, self.height)
        self.time = _time(picture, SKIES)
        ground = {"sea": (sea.SHORE - 0.03, sea.SHORE - 0.01)}
        above, below = ground.get(kind, (meadow.HOUSE_FOOT + 0.02, meadow.HOUSE_FOOT + 0.06))
        self.season = self._season(above, below)

    def _rows(self, above: float, below: float) -> Pixels:
        return self.pixels[round(above * self.height) : round(below * self.height)]

    def _light(self, lights: Mapping[str, Colour], colours: Mapping[str, Colour]) -> dict:
        return {name: lit(colour, lights[self.time]) for name, colour in colours.items()}

    def _season(self, above: float, below: float) -> str:
        seen = np.median(self._rows(above, below), (0, 1))
        lands = self._light(country.LAND_LIGHT, country.LAND)
        return min(lands, key=lambda name: np.linalg.norm(seen - lands[name]))

    def _named(self, pixels: Pixels) -> dict[str, Mask]:
        """Where what can be seen: paints by their names, and other things."""
        things = {
            **country.PAINT,
            "wood": country.WOOD,
            "dark": country.DARK,
            "roof": meadow.ROOF,
            "crown": meadow.CROWN[self.season],
        }
        land = {
            "land": country.LAND[self.season],
            "asphalt": meadow.ASPHALT,
            "sand": meadow.SAND,
            "trodden snow": meadow.TRODDEN,
            "near water": sea.NEAR,
            "far water": sea.FAR,
        }
        colours = {
            **self._light(country.THING_LIGHT, things),
            **self._light(country.LAND_LIGHT, land),
            "dark pane": meadow.DAY_PANE,
            "lit pane": meadow.LIT_PANE,
        }
        away = pixels[:, :, None].astype(np.float32) - np.array(list(colours.values()), np.float32)
        nearest = np.square(away).sum(3).argmin(2)
        return {name: nearest == n for n, name in enumerate(colours)}

    def _most(self, pixels: Pixels, least: float = 150) -> tuple[int, str]:
        """How many pixels the most frequent paint has, and its name if these are enough.

        least: square units of it.
        """
        named = self._named(pixels)
        most, paint = max((int(named[name].sum()), name) for name in country.PAINT)
        return most, paint if most > least * self.unit**2 else ""

    def _house_columns(self, place: str) -> slice:
        half = meadow.HALF_HOUSE * self.unit
        middle = {"left": half, "middle": self.width / 2, "right": self.width - half}[place]
        return slice(max(0, round(middle - half)), round(middle + half))

    def weather(self) -> str:
        """By the colour of the sky and what falls from it, or else by its clouds."""
        clear, dull = (np.array(top) for top, _ in country.SKY[self.time])
        top = _top(self.picture)
        if np.linalg.norm(top - dull) < np.linalg.norm(top - clear) and self._falls():
            return "snow" if self.season == "winter" else "rain"
        sky = self._rows(0.02, 0.24).astype(np.float32)
        away = np.linalg.norm(sky - np.array(country.CLOUD[self.time], np.float32), axis=2)
        return "cloudy" if (away < 40).mean() > 0.05 else "clear"

    def _falls(self) -> bool:
        """Whether there are small bright things."""
        upper = self.picture[: self.height // 2].mean(2)
        around = Image.fromarray(upper.round().astype(np.uint8)).filter(ImageFilter.MedianFilter(7))
        return bool((upper - np.asarray(around) > 12).mean() > FALLING[self.time])

    def house(self) -> tuple[str, str]:
        """Its colour, and its place, which is where the most of any paint is."""
        foot = meadow.HOUSE_FOOT
        walls = self._rows(foot - 36 * self.unit / self.height, foot)
        found = {place: self._most(walls[:, self._house_columns(place)]) for place in PLACES}
        place = max(PLACES, key=lambda place: found[place])
        return found[place][1], place

    def car(self) -> str:
        wheels, up = meadow.WHEELS, self.unit / self.height
        return self._most(self._rows(wheels - 15 * up, wheels - 3 * up))[1]

    def trees(self, house: str) -> int:
        """How many stretches of columns have crowns in them, beside the house."""
        foot, up = meadow.TREE_FOOT, self.unit / self.height
        crowns = self._named(self._rows(foot - 46 * up, foot - 10 * up))["crown"]
        crowns[:, self._house_columns(house)] = False
        here = np.pad(crowns.sum(0) > 9 * self.unit, 1).astype(int)
        begin, end = (np.flatnonzero(np.diff(here) == step) for step in (1, -1))
        return int((end - begin > 10 * self.unit).sum())

    def boats(self) -> int:
        """By their hulls."""
        hulls = self._named(self._rows(sea.SHORE, 1))["wood"]
        closed = Image.fromarray(hulls).convert("L").filter(ImageFilter.MaxFilter(5))
        thick = closed.filter(ImageFilter.MinFilter(9))  # no outlines
        whole = np.asarray(thick.filter(ImageFilter.MaxFilter(11))) > 0
        return _count(whole, least=600 * self.unit**2)

    def sails(self) -> str:
        below_the_lighthouse = sea.SHORE + 10 * self.unit / self.height
        return self._most(self._rows(below_the_lighthouse, 0.95), least=50)[1]


def _calm(picture: Pixels, size: int) -> Pixels:
    """Without noise, flakes and streaks that are less than half as wide as `size` pixels."""
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.MedianFilter(size)))


def _count(mask: Mask, least: float) -> int:
    """How many connected things of at least so many pixels there are."""
    left = set(zip(*(axis.tolist() for axis in mask.nonzero()), strict=True))
    things = 0
    while left:
        edge, pixels = [left.pop()], 0
        while edge:
            y, x = edge.pop()
            pixels += 1
            near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            left -= near
            edge.extend(near)
        things += pixels >= least
    return things
