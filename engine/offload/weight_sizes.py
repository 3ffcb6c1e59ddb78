"""Sizes of the blocks in which weights travel: what the plan must know of a model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

SMALL_BYTES, RESERVED = 2**20, 2 * 2**20  # from the one on, it reserves multiples of the other
ALIGNMENT = 256  # bytes; what CUDA's allocator and vector loads expect of a tensor's start
GOLDEN = (5**0.5 - 1) / 2


def aligned(nbytes: int) -> int:
    """Bytes that a tensor takes in the buffer of its block."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...

    @property
    def footprint(self) -> int: ...


Block = TypeVar("Block", bound=Sized)


@dataclass(frozen=True, eq=False)  # two blocks of one size are two
class BlockSize:
    nbytes: int

    @property
    def footprint(self) -> int:
        """What PyTorch's CUDA allocator reserves for it."""
        if self.nbytes < SMALL_BYTES:
            return self.nbytes
        return -(-self.nbytes // RESERVED) * RESERVED


@dataclass(frozen=True)
class WeightSizes:
    """Of an OffloadedModule: its root, the blocks of a pass, those that a run needs once.

    rotated, integers: whether there are weights that are.
    """

    root: BlockSize
    blocks: Sequence[BlockSize]
    once: Sequence[BlockSize]
    rotated: bool = False
    integers: bool = False

    @property
    def travelling_bytes(self) -> int:
        """Of the device, if all that can be resident is."""
        return sum(block.footprint for block in (self.root, *self.blocks, *self.once))

    @property
    def largest_bytes(self) -> int:
        """Of a block that can visit."""
        return max((block.nbytes for block in (*self.blocks, *self.once)), default=0)

    def fitting(self, budget_bytes: float) -> list[BlockSize]:
        """The blocks that would be resident in that many bytes."""
        return fitting(preferred(self.root, self.blocks, self.once), budget_bytes)


def joined(modules: Sequence[WeightSizes]) -> WeightSizes:
    """Of modules that compute in turns, in one ring."""
    if len(modules) == 1:
        return modules[0]
    return WeightSizes(
        BlockSize(sum(each.root.footprint for each in modules)),
        [block for each in modules for block in each.blocks],
        [block for each in modules for block in each.once],
        any(each.rotated for each in modules),
        any(each.integers for each in modules),
    )


def shares(modules: Sequence[WeightSizes], resident: int) -> list[int]:
    """How many of the bytes that stay, of all of them `joined`, are each one's."""
    if len(modules) == 1:
        return [resident]
    staying = set(joined(modules).fitting(resident))
    return [
        each.root.footprint
        + sum(block.footprint for block in (*each.blocks, *each.once) if block in staying)
        for each in modules
    ]


def preferred(root: Block, blocks: Sequence[Block], once: Sequence[Block]) -> list[Block]:
    """What may be resident, in the order of preference.

    The root comes first, then the blocks of every pass, then those that a run needs once. The
    golden ratio spreads the resident ones evenly over the pass, however many there are: while
    they compute, the others are copied.
    """
    spread = sorted(range(len(blocks)), key=lambda index: index * GOLDEN % 1)
    return [root, *(blocks[index] for index in spread), *once]


def fitting(blocks: Iterable[Block], budget_bytes: float) -> list[Block]:
    """Of blocks in their order, each that fits beside those before it."""
    used = 0
    chosen = []
    for block in blocks:
        if used + block.footprint <= budget_bytes:
            used += block.footprint
            chosen.append(block)
    return chosen
