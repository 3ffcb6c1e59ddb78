"""The weights that are needed at the same time, in one buffer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .transfers import Transfers
from .weight_sizes import BlockSize, aligned

CPU = torch.device("cpu")


@dataclass(frozen=True)
class _View:
    owner: nn.Module
    name: str
    offset: int  # bytes into the block's buffer
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def of(self, buffer: Tensor) -> nn.Parameter:
        data = buffer[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)
        return nn.Parameter(data, requires_grad=False)


class WeightBlock:
    """Parameters in one contiguous CPU buffer, so that moving the block is one copy."""

    def __init__(self, parameters: Sequence[tuple[nn.Module, str, nn.Parameter]]):
        self.resident = False
        self.visitors = 0  # forwards that are computing with it now
        self._views: list[_View] = []
        end = 0
        for owner, name, meta in parameters:
            view = _View(owner, name, end, meta.shape, meta.dtype)
            self._views.append(view)
            end += aligned(view.nbytes)
        self.size = BlockSize(end)
        self.nbytes, self.footprint = end, self.size.footprint
        self.host_buffer: Tensor | None = None
        self.address = 0  # where it is on the device while it is resident
        self._on_host: list[nn.Parameter] = []

    def live_in(self, buffer: Tensor) -> None:
        """Make `buffer`, uint8 [nbytes] in CPU memory, the place where the parameters are kept."""
        self.host_buffer = buffer
        self._on_host = [view.of(buffer) for view in self._views]
        self.point_to_host()

    def stay_on(self, device: torch.device, transfers: Transfers) -> Callable[[], None]:
        """Begin to become resident there; the function that is returned is to be called once."""
        assert self.host_buffer is not None, "the weights have not been given memory"
        place, copied = self.host_buffer, None
        if device != CPU:
            place = torch.empty_like(self.host_buffer, device=device)
            # Whoever had this memory may still compute.
            copied = transfers.copy(self.host_buffer, place, [transfers.computed()])

        def arrive() -> None:
            transfers.wait(copied)
            self.address = place.data_ptr()
            self.point_into(place)
            self.resident = True

        return arrive

    def leave(self) -> None:
        self.point_to_host()
        self.resident = False

    def point_to_host(self) -> None:
        assert self.host_buffer is not None, "the weights have not been given memory"
        self._point_to(self._on_host)

    def point_into(self, buffer: Tensor) -> None:
        """Let the parameters be views of `buffer`, which holds their bytes."""
        self._point_to([view.of(buffer) for view in self._views])

    def _point_to(self, parameters: list[nn.Parameter]) -> None:
        for view, parameter in zip(self._views, parameters, strict=True):
            # Not by setattr, which would take as long as launching what computes with them.
            view.owner._parameters[view.name] = parameter
