"""Masks of what is to be painted: a rectangle, a brush's strokes, or what lies around a picture."""

import torch
from torch import Tensor

DABS = 12  # of a brush
WIDE = (0.2, 0.65)  # a rectangle's sides, as parts of the picture's
BRUSH = (0.06, 0.14)  # its radius, as a part of the smaller side
STEP = 0.09  # between dabs, of the picture's sides
KEPT = (0.45, 1.2)  # the sides of what outpainting begins with; from 1 on it is the whole side


def draw_masks(count: int, height: int, width: int, device: torch.device) -> Tensor:
    """bool [count, height, width], true where something is to be painted; a third of each kind."""
    y = torch.linspace(0, 1, height, device=device)[:, None]
    x = torch.linspace(0, 1, width, device=device)
    kinds = torch.randint(3, (count, 1, 1), device=device)
    border = ~_rectangles(count, KEPT, x, y, at_an_edge=True)
    strokes = _strokes(count, x, y, width / height)
    rest = torch.where(kinds == 1, strokes, border)
    return torch.where(kinds == 0, _rectangles(count, WIDE, x, y), rest)


def _rectangles(
    count: int, sides: tuple[float, float], x: Tensor, y: Tensor, at_an_edge: bool = False
) -> Tensor:
    """at_an_edge: as far as it goes to one side or the middle of each axis, for half of them."""
    inside = []
    for place in (y, x):
        side, free, corner, snapped = torch.rand(4, count, 1, 1, device=x.device)
        side = (sides[0] + (sides[1] - sides[0]) * side).clamp(max=1)
        if at_an_edge:
            free = torch.where(snapped < 0.5, (3 * free).floor() / 2, corner)
        begin = free * (1 - side)
        inside.append((place >= begin) & (place <= begin + side))
    return inside[0] & inside[1]


def _strokes(count: int, x: Tensor, y: Tensor, proportion: float) -> Tensor:
    """Dabs of one size along a path that turns a little at each."""
    radius, across, down, turn = torch.rand(4, count, 1, 1, device=x.device)
    radius = BRUSH[0] + (BRUSH[1] - BRUSH[0]) * radius
    angle = 2 * torch.pi * turn
    covered = torch.zeros(count, y.shape[0], x.shape[0], dtype=torch.bool, device=x.device)
    for _ in range(DABS):
        away = ((x - across) * max(proportion, 1)) ** 2 + ((y - down) * max(1 / proportion, 1)) ** 2
        covered |= away < radius**2
        angle = angle + torch.randn_like(angle) * 0.7
        across = (across + STEP * angle.cos()).clamp(0, 1)
        down = (down + STEP * angle.sin()).clamp(0, 1)
    return covered
