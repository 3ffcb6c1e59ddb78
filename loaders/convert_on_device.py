"""Rows that are quantized on a card: there and back by its own copies, a few pieces at a time."""

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .read_ahead import BUFFER_BYTES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PIECES_AT_ONCE = 2  # each takes 60 MB of the card, or 90 if it is rotated


class DeviceQuantizer:
    """Quantizes on `device` for several threads."""

    def __init__(self, device: "torch.device"):
        import torch

        self.device = device
        self._cuda = device.type == "cuda"
        self._streams: queue.SimpleQueue[torch.cuda.Stream | None] = queue.SimpleQueue()
        for _ in range(PIECES_AT_ONCE):
            self._streams.put(torch.cuda.Stream(device) if self._cuda else None)

    def buffer(self) -> "Tensor":
        """CPU memory for a piece, uint8 [BUFFER_BYTES], pinned if the system allows it."""
        import torch

        try:
            return torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=self._cuda)
        except RuntimeError:
            return torch.empty(BUFFER_BYTES, dtype=torch.uint8)

    def quantize(self, values: "Tensor", into: "Tensor", scale: "Tensor", group: int) -> None:
        """What quantize_rows does, with the same bits but for rotated values; `values` are used up.

        Done by the CPU when the card is out of memory. Raises ValueError as quantize_rows does.
        """
        import torch

        from ..engine.allocator import is_out_of_memory
        from ..engine.quant.quantize import quantize_rows

        # No value takes fewer bytes in the file than in 8 bits: the result fits where it was.
        staged = values.flatten().view(torch.uint8)[: into.numel()]
        staged = staged.view(into.dtype).view(into.shape)
        try:
            with self._stream():
                self._there_and_back(values, staged, scale, group)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            quantize_rows(values, into, scale, group)
        else:
            into.copy_(staged)

    def _there_and_back(
        self, values: "Tensor", staged: "Tensor", scale: "Tensor", group: int
    ) -> None:
        """What this takes of the card is free when it returns, and the stream another thread's."""
        import torch

        from ..engine.quant.quantize import quantize_rows

        on_device = values.to(self.device, non_blocking=True)
        quantized = torch.empty(staged.shape, dtype=staged.dtype, device=self.device)
        device_scale = torch.empty(scale.shape, dtype=scale.dtype, device=self.device)
        quantize_rows(on_device, quantized, device_scale, group)
        staged.copy_(quantized, non_blocking=True)
        scale.copy_(device_scale)  # not ahead of what was begun before

    def close(self) -> None:
        """Give back the memory of the card and what is no longer used of pinned memory."""
        from ..engine.allocator import allocator_of
        from ..engine.offload.pinned import give_back_pinned

        if self._cuda:
            allocator_of(self.device).give_back()
            give_back_pinned()

    @contextmanager
    def _stream(self) -> Iterator[None]:
        """One of the streams, whose work is done at the end."""
        import torch

        stream = self._streams.get()
        try:
            if stream is None:
                yield
                return
            try:
                with torch.cuda.stream(stream):
                    yield
            finally:
                stream.synchronize()
        finally:
            self._streams.put(stream)
