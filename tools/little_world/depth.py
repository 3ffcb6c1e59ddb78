"""How near things are, as models of depth tell it of pictures: the nearer, the brighter."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from .canvas import BLACK, WHITE, Canvas, Colour, Point, gradient, mix
from .meadow import paint_meadow
from .painting import paint
from .scenes import Scene, draw_scene
from .sea import paint_sea
from .supply import Shelf, captions_of
from .vocabulary import Words

PAINTERS = {
    "meadow": paint_meadow,
    "sea": paint_sea,
}  # of scenes with a ground that things stand on
FARTHEST = mix(BLACK, WHITE, 0.15)  # of the ground; the sky is farther


def depth_map(scene: Scene, r: random.Random, width: int = 256, height: int = 256) -> Image.Image:
    """Of the picture that `paint` makes of the same scene and the same state of `r`."""
    return PAINTERS[scene.kind](scene, r, width, height, DepthCanvas)


@dataclass
class DepthShelf(Shelf):
    """Of each scene a picture and, below it, its depth."""

    at_once: ClassVar[int] = 2

    def draw(self, slot: int, words: Words) -> None:
        r = random.Random(self.seeds[slot])
        scene = draw_scene(r)
        while scene.kind not in PAINTERS:
            scene = draw_scene(r)
        by_chance = r.random()  # the same for both
        both = [make(scene, random.Random(by_chance), *self.size) for make in (paint, depth_map)]
        self.put(slot, words, both, captions_of(scene, r))


class DepthCanvas(Canvas):
    """The ground from the horizon to the lower edge, and things that are as near as their feet."""

    def __init__(self, width: int, height: int, top: Colour, low: Colour, horizon: int):
        super().__init__(width, height, BLACK, BLACK, horizon)
        self.horizon = horizon
        super().paste(gradient((width, height - horizon), FARTHEST, WHITE), horizon)

    def standing(self, y: float) -> Canvas:
        return _Upright(self, y)

    def polygon(self, points: Sequence[Point], colour: Colour, glow: Colour | None = None) -> None:
        """Nothing: hills are ground."""

    def box(self, *args: object, **options: object) -> None:
        """Nothing: waves are."""

    def paste(self, image: Image.Image, top: int) -> None:
        """Nothing: water is."""

    def oval(self, *args: object, **options: object) -> None:
        """Nothing: stars are far away."""


class _Upright(Canvas):
    """Draws things that stand at the row `y`, in one grey and without light."""

    def __init__(self, canvas: DepthCanvas, y: float):
        self.shapes, self._pen = canvas.shapes, canvas._pen
        near = (y - canvas.horizon) / (canvas.height - canvas.horizon)
        self.grey = mix(FARTHEST, WHITE, near) if near > 0 else BLACK

    def polygon(self, points: Sequence[Point], colour: Colour, glow: Colour | None = None) -> None:
        super().polygon(points, self.grey)

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
        super().box(x, y, width, height, self.grey, round_by=round_by)

    def oval(
        self, x: float, y: float, rx: float, ry: float, colour: Colour, glow: Colour | None = None
    ) -> None:
        super().oval(x, y, rx, ry, self.grey)
