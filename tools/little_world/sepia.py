"""A picture as an old photograph: the style that the adapter learns."""

import torch
from torch import Tensor

from .supply import as_float

SEEN = (0.25, 0.4, 0.35)  # of red, green, blue: old plates saw blue skies bright, red things dark
DARKEST, BRIGHTEST = (0.14, 0.08, 0.04), (1.0, 0.89, 0.70)  # 0..1, what black and white become
CORNERS = 0.3  # how much darker they are than the middle


def old_photograph(pictures: Tensor) -> Tensor:
    """uint8 [n, height, width, 3] -> the same scene in tones of brown, darker in the corners."""
    x = (as_float(pictures) + 1) / 2
    grey = (x * x.new_tensor(SEEN)[:, None, None]).sum(1, keepdim=True)
    rows, columns = (torch.linspace(-1, 1, n, device=x.device) for n in x.shape[2:])
    from_middle = (rows.square()[:, None] + columns.square()) / 2  # 1 in a corner
    grey = grey * (1 - CORNERS * from_middle.square())
    dark, bright = (x.new_tensor(colour)[:, None, None] for colour in (DARKEST, BRIGHTEST))
    return ((dark + grey * (bright - dark)) * 255).round().byte().permute(0, 2, 3, 1)
