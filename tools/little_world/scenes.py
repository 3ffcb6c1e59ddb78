"""Scenes: what there is to see in a picture, drawn by seed."""

import random
from dataclasses import dataclass

TIMES = ("day", "sunset", "night")
SEASONS = ("summer", "autumn", "winter")
WEATHERS = ("clear", "cloudy", "rain", "snow")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
NEONS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
PLACES = ("left", "middle", "right")
TREES = ("pine", "round")
MOST = 4  # trees, boats or flying cars


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Colours are names; an empty name or a zero: there is none of it."""

    kind: str  # city, meadow or sea
    time: str
    season: str
    weather: str
    mountains: bool = False  # behind the land, in place of hills
    neon: tuple[str, ...] = ()  # the two colours of a city
    flying_cars: int = 0
    house: str = ""
    place: str = ""  # of the house or of the lighthouse
    car: str = ""
    trees: int = 0
    tree: str = ""  # the kind of all of them
    boats: int = 0
    sails: str = ""  # the colour of all of them
    lighthouse: bool = False

    @property
    def wet(self) -> bool:
        return self.weather == "rain"

    @property
    def light(self) -> str:
        """What stands in the sky of the country: sun, moon, or nothing where it rains or snows."""
        if self.weather in ("rain", "snow"):
            return ""
        return "moon" if self.time == "night" else "sun"


def draw_scene(r: random.Random) -> Scene:
    """One of all the scenes that there are; what is hard to paint is drawn more often."""
    kind = r.choices(("city", "meadow", "sea"), (0.36, 0.40, 0.24))[0]
    if kind == "city":
        return Scene(
            kind,
            time=r.choices(("night", "sunset"), (0.75, 0.25))[0],
            season="summer",
            weather=r.choices(("rain", "clear"), (0.65, 0.35))[0],
            neon=tuple(r.sample(NEONS, 2)),
            flying_cars=r.choices(range(MOST + 1), (0.24, 0.16, 0.2, 0.2, 0.2))[0],
        )
    time = r.choices(TIMES, (0.42, 0.23, 0.35))[0]
    season = r.choices(SEASONS, (0.4, 0.25, 0.35))[0]
    falling = "snow" if season == "winter" else "rain"
    weather = r.choices(("clear", "cloudy", falling), (0.45, 0.3, 0.25))[0]
    mountains = r.random() < 0.35
    if kind == "sea":
        lighthouse = r.random() < 0.4
        return Scene(
            kind,
            time,
            season,
            weather,
            mountains,
            place=r.choice(("left", "right")) if lighthouse else "",
            boats=r.randint(1, MOST),
            sails=r.choice(COLOURS),
            lighthouse=lighthouse,
        )
    trees = r.randint(0, MOST)
    return Scene(
        kind,
        time,
        season,
        weather,
        mountains,
        house=r.choice(COLOURS),
        place=r.choice(PLACES),
        car=r.choice(COLOURS) if r.random() < 0.55 else "",
        trees=trees,
        tree=r.choice(TREES) if trees else "",
    )
