"""What the host's memory manager does for the weights of one component."""

from typing import Any, Protocol

import torch


class Patcher(Protocol):
    """How the host's memory manager sees one component's weights (see `host/`)."""

    device: torch.device

    def load(
        self, working_bytes: int, weight_cap: int | None, *beside: tuple[Any, int | None]
    ) -> None:
        """Make room for `working_bytes`, then keep up to `weight_cap` bytes of weights resident.

        beside: patchers of the same host, whose weights are needed at the same time, and their
        caps.
        """

    def available(self) -> int | None:
        """Bytes of the device that this component could have if all others gave way; None on a
        device whose memory is not counted."""

    def pin(self) -> None:
        """Let the weights that travel at every pass be pinned as far as the host allows, until they
        leave the device."""
