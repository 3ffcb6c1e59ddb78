"""Bytes that tensors hold, counted as they come and go."""

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
        result = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in self._storages((args, kwargs))}
        for storage in self._storages(result):
            if storage._cdata not in given and storage._cdata not in self._alive:
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

    def _storages(self, tensors: object) -> list[torch.UntypedStorage]:
        leaves = (leaf for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor))
        return [leaf.untyped_storage() for leaf in leaves if leaf.device.type == self.device]
