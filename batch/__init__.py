"""Many pictures from one graph: rows of values, and processes that paint them on all cards."""

from .driver import Batch
from .rows import BatchError

__all__ = ["Batch", "BatchError"]
