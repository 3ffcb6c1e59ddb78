"""Bytes that tensors hold, counted as they come and go."""

import weakref
from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
# What PyTorch works out in Python on the meta device, for milliseconds, of calls that every block
# makes: the result alone, as there.
RESULTS = {
    ATEN.linear.default: lambda x, weight, *_: x.new_empty(*x.shape[:-1], len(weight)),
    ATEN.layer_norm.default: lambda x, *_: x.new_empty(x.shape),
    ATEN.clamp_.default: lambda x, *_: x,
    ATEN.clamp_min_.default: lambda x, *_: x,
    ATEN.gelu_.default: lambda x, **_: x,
}


class LiveBytes(TorchDispatchMode):
    """Counts the storages on a device that are made inside `with` and are still alive.

    peak: the most there were at once. A view has no storage of its own and counts nothing.
    allowed: told the number of the allocation, its bytes and those that are alive with it; where it
    returns False there is no memory.
    """

    def __init__(
        self,
        device: str = "meta",
        allowed: Callable[[int, int, int], bool] = lambda *_: True,
    ) -> None:
        super().__init__()
        self.device, self.allowed = device, allowed
        self.now = self.peak = self.made = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        on_meta = function in RESULTS and args[0].device.type == "meta"
        result = (RESULTS[function] if on_meta else function)(*args, **(kwargs or {}))
        made = {storage._cdata: storage for storage in self._storages(result)}
        if made.keys() - self._alive:
            given = {storage._cdata for storage in self._storages([args, kwargs])}
            for key, storage in made.items():
                if key not in given and key not in self._alive:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self._alive.add(key)
        size = storage.nbytes()
        self.now += size
        self.made += 1
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self._alive.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)
        if not self.allowed(self.made - 1, size, self.now):
            raise torch.OutOfMemoryError("simulated")

    def _storages(self, tensors: object) -> Iterator[torch.UntypedStorage]:
        if isinstance(tensors, torch.Tensor):
            if tensors.device.type == self.device:
                yield tensors.untyped_storage()
        elif isinstance(tensors, list | tuple | dict):
            for each in tensors.values() if isinstance(tensors, dict) else tensors:
                yield from self._storages(each)
