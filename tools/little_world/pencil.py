"""A picture as a pencil drawing: the style that the adapter learns."""

from torch import Tensor
from torch.nn import functional as F

from .supply import as_float

PAPER = (0.94, 0.91, 0.84)  # warm white, 0..1
INK = (0.22, 0.21, 0.21)
BRIGHTNESS = (0.299, 0.587, 0.114)
EDGES, SHADES = 2.5, 0.4  # how much ink they get
COLOUR_LEFT = 0.12


def pencil_drawing(pictures: Tensor) -> Tensor:
    """uint8 [n, height, width, 3] -> the same scene in grey strokes on warm paper."""
    x = (as_float(pictures) + 1) / 2
    grey = (x * x.new_tensor(BRIGHTNESS)[:, None, None]).sum(1, keepdim=True)
    smooth = F.avg_pool2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), 3, 1)
    padded = F.pad(smooth, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    edges = (across.square() + down.square()).sqrt()
    ink = (EDGES * edges + SHADES * (1 - smooth)).clamp(0, 1)
    paper, dark = (x.new_tensor(colour)[:, None, None] for colour in (PAPER, INK))
    drawn = paper + ink * (dark - paper) + COLOUR_LEFT * (x - grey)
    return (drawn.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
