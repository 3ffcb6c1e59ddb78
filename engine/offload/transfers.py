"""How bytes of weights reach a device."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from .pinned import PinnedTogether

STAGING_BYTES = 32 * 2**20  # of each pinned buffer that weights in pageable memory pass through
STAGING_BUFFERS = 3


class Transfers(Protocol):
    """How bytes reach a device, and how copies and computations wait for each other.

    Copies follow each other in the order in which they were begun.
    """

    def copy(self, host_buffer: Tensor, place: Tensor, after: Sequence[Any]) -> Any:
        """Begin to copy once everything in `after` has happened; returns what to wait for."""

    def wait(self, copied: Any) -> None:
        """Let computations that are launched from now on begin after that copy."""

    def computed(self) -> Any:
        """A point that is reached when everything launched so far has been computed."""

    def close(self) -> None:
        """Finish or drop what has begun: afterwards nothing reads or writes the memory."""


class PlainTransfers:
    """One thing after the other, as on a CPU or wherever there are no streams."""

    def copy(self, host_buffer: Tensor, place: Tensor, after: Sequence[Any]) -> None:
        place.copy_(host_buffer)

    def wait(self, copied: Any) -> None: ...

    def computed(self) -> None: ...

    def close(self) -> None: ...


class CudaTransfers:
    """Copies on a stream of their own.

    Pinned memory is copied by the device itself. Other memory, such as a mapped file, is pinned on
    its first journey, or else passes through a few pinned buffers. A thread does both, so that
    launching kernels never waits for it.
    """

    def __init__(self, device: torch.device, pinned: PinnedTogether | None = None):
        self.device = device
        self._pinned = pinned or PinnedTogether(())
        self.stream = torch.cuda.Stream(device)
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[Any] | None = None
        self._staging: list[tuple[Tensor, torch.cuda.Event]] = []

    def copy(self, host_buffer: Tensor, place: Tensor, after: Sequence[torch.cuda.Event]) -> Any:
        pinned = self._pinned.known(host_buffer)
        if pinned is not None and (self._last is None or self._last.done()):
            return self._copy(pinned, place, after)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "majicflux-weights")
        # While the thread has something to do, the others queue up too: they keep their order.
        self._last = self._thread.submit(self._copy_or_stage, host_buffer, place, after)
        return self._last

    def wait(self, copied: Any) -> None:
        event = copied.result() if isinstance(copied, Future) else copied
        torch.cuda.current_stream(self.device).wait_event(event)

    def computed(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.stream.synchronize()  # the pinned buffers are about to be given back

    @torch.inference_mode()  # which is a thread's own
    def _copy(self, host_buffer: Tensor, place: Tensor, after: Sequence[torch.cuda.Event]) -> Any:
        for event in after:
            self.stream.wait_event(event)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            place.copy_(host_buffer, non_blocking=True)
            return self.stream.record_event()

    @torch.inference_mode()
    def _copy_or_stage(
        self, host_buffer: Tensor, place: Tensor, after: Sequence[torch.cuda.Event]
    ) -> Any:
        with torch.cuda.device(self.device):
            pinned = self._pinned.of(host_buffer)
        if pinned is not None:
            return self._copy(pinned, place, after)
        return self._stage(host_buffer, place, after)

    def _stage(self, host_buffer: Tensor, place: Tensor, after: Sequence[torch.cuda.Event]) -> Any:
        for event in after:
            self.stream.wait_event(event)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            for first in range(0, len(host_buffer), STAGING_BYTES):
                some = slice(first, first + STAGING_BYTES)
                buffer, copied = self._next_staging()
                copied.synchronize()
                staged = buffer[: len(host_buffer[some])].copy_(host_buffer[some])
                place[some].copy_(staged, non_blocking=True)
                copied.record(self.stream)
            return self.stream.record_event()

    def _next_staging(self) -> tuple[Tensor, torch.cuda.Event]:
        if len(self._staging) < STAGING_BUFFERS:
            buffer = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
            self._staging.append((buffer, torch.cuda.Event()))
        else:
            self._staging.append(self._staging.pop(0))
        return self._staging[-1]


def transfers_to(device: torch.device, pinned: PinnedTogether | None = None) -> Transfers:
    return CudaTransfers(device, pinned) if device.type == "cuda" else PlainTransfers()
