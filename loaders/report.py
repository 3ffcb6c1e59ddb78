"""The common half of the line that tells what was loaded."""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine.offload import OffloadedModule


def size_and_time(weights: "OffloadedModule", precision: object, start: float) -> str:
    """`9.8 GB as bfloat16, 21.3 s`; `start` is what time.perf_counter() was at the start."""
    name = str(precision).removeprefix("torch.")
    return f"{weights.total_bytes / 1e9:.2f} GB as {name}, {time.perf_counter() - start:.1f} s"
