"""Pairs of pictures, before and after something changed, and the words that ask for it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

from .captions import CARS, COLOURS, HOUSES, NEON, SEASON, TIME, WEATHER, Phrase
from .painting import paint
from .scenes import NEONS, SEASONS, TIMES, WEATHERS, Scene, draw_scene
from .supply import CAPTIONS, Shelf
from .vocabulary import Words

PAINTED = {"house": HOUSES, "car": CARS, "sails": [("sails", "帆")]}
COLOURED = [
    ("make the {1} {0}", "把{1}变成{0}"),
    ("{0} {1}", "{0}的{1}"),
    ("change the {1} to {0}", "{1}改成{0}"),
]
ASKED = [("{}", "{}"), ("make it {}", "变成{}"), ("change to {}", "改成{}"), ("now {}", "现在{}")]
FALLING = ("rain", "snow")


@dataclass
class PairShelf(Shelf):
    """Of each scene a picture and, below it, the changed one; the texts ask for the change."""

    at_once: ClassVar[int] = 2

    def draw(self, slot: int, words: Words) -> None:
        r = Random(self.seeds[slot])
        scene = draw_scene(r)
        asked = draw_change(scene, r)
        by_chance = r.random()  # the same for both, as far as they are alike
        both = [paint(one, Random(by_chance), *self.size) for one in (scene, asked[0])]
        texts = [instruction(asked[1], r, chinese=number % 2 == 1) for number in range(CAPTIONS)]
        self.put(slot, words, both, texts)


def draw_change(scene: Scene, r: Random) -> tuple[Scene, list[Phrase]]:
    """The scene with one thing changed, and what can be said to ask for it."""
    return r.choice(list(_changes(scene, r)))


def instruction(phrases: list[Phrase], r: Random, chinese: bool) -> str:
    text = r.choice(phrases)[chinese].replace("|", "")
    return text[0].upper() + text[1:] if r.random() < 0.3 else text


def _changes(scene: Scene, r: Random) -> Iterator[tuple[Scene, list[Phrase]]]:
    """One of each sort that is possible."""
    times = TIMES if scene.kind != "city" else ("sunset", "night")
    time = _another(times, scene.time, r)
    yield replace(scene, time=time), _asked(TIME[time])
    yield from _in_city(scene, r) if scene.kind == "city" else _in_country(scene, r)


def _in_city(scene: Scene, r: Random) -> Iterator[tuple[Scene, list[Phrase]]]:
    weather = _another(("rain", "clear"), scene.weather, r)
    yield replace(scene, weather=weather), _asked(WEATHER[weather])
    neon = tuple(r.sample(NEONS, 2))
    names = [COLOURS[colour] for colour in neon]
    phrases = [(english.format(*neon), chinese.format(*names)) for english, chinese in NEON]
    yield replace(scene, neon=neon), _asked(phrases)


def _in_country(scene: Scene, r: Random) -> Iterator[tuple[Scene, list[Phrase]]]:
    season = _another(SEASONS, scene.season, r)
    falling = "snow" if season == "winter" else "rain"
    weather = falling if scene.weather in FALLING else scene.weather
    yield replace(scene, season=season, weather=weather), _asked(SEASON[season])
    weather = _another(WEATHERS, scene.weather, r)
    season = _season_for(weather, scene)
    phrases = WEATHER[weather]
    if season != scene.season:
        phrases = [_both(a, b) for a in SEASON[season] for b in phrases]
    yield replace(scene, season=season, weather=weather), _asked(phrases)
    for part, nouns in PAINTED.items():
        if getattr(scene, part):
            colour = _another(tuple(COLOURS), getattr(scene, part), r)
            yield replace(scene, **{part: colour}), _coloured(nouns, colour)


def _another(names: tuple[str, ...], than: str, r: Random) -> str:
    return r.choice([name for name in names if name != than])


def _season_for(weather: str, scene: Scene) -> str:
    """Snow falls in winter, and rain in summer or autumn."""
    if weather == "snow":
        return "winter"
    return "summer" if weather == "rain" and scene.season == "winter" else scene.season


def _asked(phrases: list[Phrase]) -> list[Phrase]:
    return [(e.format(p[0]), c.format(p[1])) for p in phrases for e, c in ASKED]


def _both(one: Phrase, other: Phrase) -> Phrase:
    return f"{one[0]}, {other[0]}", f"{one[1]}，{other[1]}"


def _coloured(nouns: list[Phrase], colour: str) -> list[Phrase]:
    return [
        (english.format(colour, noun[0]), chinese.format(COLOURS[colour], noun[1]))
        for noun in nouns
        for english, chinese in COLOURED
    ]
