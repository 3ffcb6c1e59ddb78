"""What the plan must know of a device."""

from dataclasses import dataclass

from .units import MB

WORKSPACE_BYTES = 128 * MB  # of cuBLAS and cuDNN, and what the allocator rounds up


@dataclass(frozen=True)
class DeviceProfile:
    """What the plan must know of a device.

    workspace_bytes: that libraries need besides the tensors. fused: whether rows
    are prepared by fused kernels, which need no memory in between. Rates, where they are known:
    copies from pinned memory in bytes/s, products in the weights' format and attention in FLOP/s.
    """

    workspace_bytes: int = 0
    fused: bool = False
    copy_rate: float | None = None
    product_rate: float | None = None
    attention_rate: float | None = None

    def overhead(self, values: int) -> int:
        """Bytes besides tensors of so many: for libraries, and lost between the tensors."""
        return self.workspace_bytes + values // 16 if self.workspace_bytes else 0
