"""The common half of the line that tells what was loaded."""

import time
from typing import TYPE_CHECKING

from ..messages import say

if TYPE_CHECKING:
    from ..engine.offload.offloaded_module import OffloadedModule


def where_kept(mapped: bool) -> str:
    return say("mapped from prepared weights") if mapped else say("in memory")


def size_and_time(weights: "OffloadedModule", precision: object, start: float) -> str:
    """`9.8 GB as bfloat16, 21.3 s`; `start` is what time.perf_counter() was at the start."""
    return say(
        "{size:.2f} GB as {precision}, {seconds:.1f} s",
        size=weights.total_bytes / 1e9,
        precision=str(precision).removeprefix("torch."),
        seconds=time.perf_counter() - start,
    )
