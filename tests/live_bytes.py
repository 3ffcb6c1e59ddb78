"""Bytes that tensors hold, counted as they come and go."""

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
META = torch.device("meta")
OF_ONE = ("cos", "exp", "rsqrt", "silu", "sin", "square")


def _empty(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=META)


def _of_one(x: Tensor) -> Tensor | None:
    return _empty(x.shape, x.dtype) if _plain(x, x) else None


def _of_two(x: Tensor, y: object) -> Tensor | None:
    if isinstance(y, float | int):
        return _of_one(x)
    if not _plain(x, y):
        return None
    same = x.shape == y.shape
    return _empty(x.shape if same else torch.broadcast_shapes(x.shape, y.shape), x.dtype)


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    if not all(_plain(first, x) and x.dim() == first.dim() for x in tensors):
        return None
    shape = [*first.shape]
    shape[dim] = sum(x.shape[dim] for x in tensors)
    return _empty(shape, first.dtype)


def _mean(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor | None:
    if not keepdim or not _plain(x, x):
        return None
    gone = {dim % x.dim() for dim in dims}
    return _empty((1 if dim in gone else size for dim, size in enumerate(x.shape)), x.dtype)


def _plain(x: Tensor, y: object) -> bool:
    """Whether the result of both has the dtype of `x` and no strides of its own."""
    return (
        isinstance(y, Tensor)
        and x.dtype == y.dtype
        and x.is_floating_point()
        and y.is_meta
        and x.is_contiguous()
        and y.is_contiguous()
    )


# What PyTorch works out in Python on the meta device, for up to a millisecond, of calls that every
# block makes: the result alone, as there. None: PyTorch itself is to say.
RESULTS: dict[object, Callable[..., Tensor | None]] = {
    ATEN.linear.default: lambda x, weight, *_: _empty((*x.shape[:-1], len(weight)), x.dtype),
    ATEN.layer_norm.default: lambda x, *_: _empty(x.shape, x.dtype),
    ATEN.clamp_.default: lambda x, *_: x,
    ATEN.clamp_min_.default: lambda x, *_: x,
    ATEN.gelu_.default: lambda x, **_: x,
    ATEN.cat.default: _joined,
    ATEN.mean.dim: _mean,
    **dict.fromkeys((ATEN.add.Tensor, ATEN.mul.Tensor, ATEN.div.Tensor), _of_two),
    **dict.fromkeys((getattr(ATEN, name).default for name in OF_ONE), _of_one),
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
        kwargs = kwargs or {}
        result = None
        if function in RESULTS and self._on_meta(args[0]):
            result = RESULTS[function](*args, **kwargs)
        if result is None:
            result = function(*args, **kwargs)
        made = [x for x in self._storages(result) if x._cdata not in self._alive]
        if made:
            given = {storage._cdata for storage in self._storages([args, kwargs])}
            for storage in made:
                if storage._cdata not in given and storage._cdata not in self._alive:
                    self._count(storage)
        return result

    @staticmethod
    def _on_meta(given: object) -> bool:
        first = given[0] if isinstance(given, list | tuple) else given
        return isinstance(first, Tensor) and first.is_meta

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
        if isinstance(tensors, Tensor):
            on_it = tensors.is_meta if self.device == "meta" else tensors.device.type == self.device
            return [tensors.untyped_storage()] if on_it else []
        if isinstance(tensors, dict):
            tensors = [*tensors.values()]
        if isinstance(tensors, list | tuple):
            return [storage for each in tensors for storage in self._storages(each)]
        return []
