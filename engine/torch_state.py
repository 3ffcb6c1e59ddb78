"""PyTorch once it is needed, and its defaults for a whole process or thread, which other nodes may
have left changed."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
else:

    class _Torch:
        """The module, which takes seconds to import, from the first use of something in it on."""

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module("torch"), name)

    torch = _Torch()


@contextmanager
def own_state() -> Iterator[None]:
    """Default dtype, default device and autocast as PyTorch has them at first; then as before.

    Around all that runs code of others, which relies on them. What the pack makes itself names its
    dtype and device, because threads, and what is written to disk, must not depend on this.
    """
    with ExitStack() as before:
        before.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        # PyTorch 2.7's get_default_device() knows nothing of a `with torch.device(...)`.
        if torch.empty(0, dtype=torch.float32).device.type != "cpu":
            before.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                before.enter_context(torch.autocast(kind, enabled=False))
        yield
