"""Edges of pictures by Canny's way, as ComfyUI's node finds them: white on black."""

import torch
from torch import Tensor
from torch.nn import functional as F

LOW, HIGH = 0.4, 0.8  # the node's defaults: of an edge that goes on, and of one that begins
GREY = (0.299, 0.587, 0.114)
SPREAD, REACH = 1.0, 2  # of the blur, and how far it is taken, in pixels
SMALLEST = 1e-6
# Rows and columns to the neighbour in each eighth of a turn, from the right clockwise.
AROUND = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))


def edges(pictures: Tensor) -> Tensor:
    """uint8 [n, height, width, 3] -> the same, 255 where an edge is."""
    grey = (pictures.float() / 255 @ torch.tensor(GREY, device=pictures.device))[:, None]
    strength, turn = _slope(_blurred(grey))
    strength = strength * _is_ridge(strength, turn)
    weak, found = strength > LOW, strength > HIGH
    before = torch.zeros_like(found)
    while not torch.equal(found, before):  # weak edges go on from strong ones
        before = found
        found = weak & (F.max_pool2d(found.float(), 3, stride=1, padding=1) > 0)
    return (found * 255).to(torch.uint8).permute(0, 2, 3, 1).expand(pictures.shape).contiguous()


def _blurred(grey: Tensor) -> Tensor:
    away = torch.arange(-REACH, REACH + 1, device=grey.device).float()
    bell = torch.exp(-(away**2) / (2 * SPREAD**2))
    kernel = torch.outer(bell, bell) / bell.sum() ** 2
    return F.conv2d(F.pad(grey, [REACH] * 4, mode="reflect"), kernel[None, None])


def _slope(grey: Tensor) -> tuple[Tensor, Tensor]:
    """How steep each pixel is, and where it rises to, in eighths of a turn: [n, 1, h, w] each."""
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=grey.device)
    kernels = torch.stack([sobel, sobel.T])[:, None]
    across, down = F.conv2d(F.pad(grey, [1] * 4, mode="replicate"), kernels).split(1, 1)
    turn = (torch.atan2(down, across) / (torch.pi / 4)).round().long() % len(AROUND)
    return (across.square() + down.square() + SMALLEST).sqrt(), turn


def _is_ridge(strength: Tensor, turn: Tensor) -> Tensor:
    """Whether both neighbours, where it rises to and falls to, are less steep."""
    height, width = strength.shape[2:]
    wide = F.pad(strength, [1] * 4)
    shifted = [wide[:, :, 1 + y : 1 + y + height, 1 + x : 1 + x + width] for y, x in AROUND]
    around = torch.cat(shifted, 1)
    ahead, behind = (around.gather(1, (turn + half) % len(AROUND)) for half in (0, 4))
    return strength > torch.maximum(ahead, behind)
