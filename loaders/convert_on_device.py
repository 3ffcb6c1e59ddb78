"""Rows that are quantized on a card: there and back by its own copies, a few pieces at a time."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from ..engine.torch_state import torch
from .read_ahead import BUFFER_BYTES

PIECES_AT_ONCE = 2  # each takes 45 MB of the card, or 60 if it is rotated


class DeviceQuantizer:
    """Quantizes on `device` for several threads, by a few of its own.

    By its own, because cuBLAS has a workspace (32 MB) for each thread and stream that multiplies.
    """

    def __init__(self, device: "torch.device"):
        self.device = device
        self._cuda = device.type == "cuda"
        self._threads = ThreadPoolExecutor(PIECES_AT_ONCE, "majicflux-quantize", self._begin)

    def _begin(self) -> None:
        """Each thread has a stream, so that one copies while the other computes."""
        if self._cuda:
            torch.cuda.set_stream(torch.cuda.Stream(self.device))

    def buffer(self) -> "torch.Tensor":
        """CPU memory for a piece, uint8 [BUFFER_BYTES], pinned if the system allows it."""
        try:
            return torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=self._cuda)
        except RuntimeError:
            return torch.empty(BUFFER_BYTES, dtype=torch.uint8)

    def quantize(
        self, values: "torch.Tensor", into: "torch.Tensor", scale: "torch.Tensor", group: int
    ) -> None:
        """What quantize_rows does, with the same bits but for rotated values; `values` are used up.

        Done by the CPU when the card is out of memory. Raises ValueError as quantize_rows does.
        """
        from ..engine.allocator import is_out_of_memory
        from ..engine.quant.quantize import quantize_rows

        # No value takes fewer bytes in the file than in 8 bits: the result fits where it was.
        staged = values.flatten().view(torch.uint8)[: into.numel()]
        staged = staged.view(into.dtype).view(into.shape)
        try:
            self._threads.submit(self._there_and_back, values, staged, scale, group).result()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            quantize_rows(values, into, scale, group)
        else:
            into.copy_(staged)

    def _there_and_back(
        self, values: "torch.Tensor", staged: "torch.Tensor", scale: "torch.Tensor", group: int
    ) -> None:
        """What this takes of the card is free for the next piece when it returns."""
        from ..engine.quant.quantize import quantize_rows

        with torch.inference_mode():
            on_device = values.to(self.device, non_blocking=True)
            quantized = torch.empty(staged.shape, dtype=staged.dtype, device=self.device)
            device_scale = torch.empty(scale.shape, dtype=scale.dtype, device=self.device)
            quantize_rows(on_device, quantized, device_scale, group)
            staged.copy_(quantized, non_blocking=True)
            scale.copy_(device_scale)  # not ahead of what was begun before

    def close(self) -> None:
        """Give back the memory of the card and what is no longer used of pinned memory."""
        from ..engine.allocator import allocator_of
        from ..engine.offload.pinned import give_back_host_memory

        self._threads.shutdown()
        if self._cuda:
            # PyTorch keeps a thread's workspace when the thread is gone. No public name clears it.
            with suppress(AttributeError):
                torch._C._cuda_clearCublasWorkspaces()
            allocator_of(self.device).give_back()
            give_back_host_memory()
