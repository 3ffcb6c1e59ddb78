"""Guidance by a negative prompt."""

from torch import Tensor


def classifier_free(positive: Tensor, negative: Tensor, cfg: float) -> Tensor:
    """From the negative prompt's velocity to the positive one's, and `cfg` times as far.

    Source: Ho and Salimans 2022, arXiv:2207.12598.
    """
    return negative + cfg * (positive - negative)
