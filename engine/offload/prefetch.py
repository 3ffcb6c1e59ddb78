"""Blocks of weights that visit the compute device through one ring of its memory.

The order in which blocks run is known, so the next ones are copied, on a stream of their own,
while the present one computes. A block's place in the ring is given to a later block as soon as
the last kernel that reads it has been launched; the copy then waits for that kernel on the device.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .chunking import Chunking
from .pinned import PinnedTogether
from .transfers import Transfers, transfers_to

if TYPE_CHECKING:
    from .weight_block import WeightBlock

BeforeBlock = Callable[[], None]  # called before each block runs; may raise to stop there


@dataclass
class _Place:
    """A stretch of the ring. left: when its block was through with it, None while it is needed."""

    start: int
    end: int
    turn: int  # index into the order that the block was fetched for; -1: out of turn
    copied: Any = None
    left: Any = None
    needed: bool = True


class PrefetchRing:
    """The visits of one run.

    order: the blocks as they will run, as far as that is known; `expect` goes on with it. A block
    that comes out of turn is fetched when it comes, which is slower and nothing else.
    """

    def __init__(
        self,
        order: Sequence["WeightBlock"],
        device: torch.device,
        ring_bytes: int,
        before_block: BeforeBlock | None = None,
        chunking: Chunking | None = None,
        transfers: Transfers | None = None,
        pinned: PinnedTogether | None = None,
    ):
        self.order = [*order]
        self.device = device
        self.ring_bytes = ring_bytes
        self.moved_bytes = 0
        self._before_block = before_block
        self._chunking = chunking or Chunking()
        self._transfers = transfers or transfers_to(device, pinned)
        self._ring: Tensor | None = None
        self._places: list[_Place] = []  # in the order in which they were taken
        self._fetched: dict[WeightBlock, _Place] = {}
        self._next = 0  # index into `order` of the block that should come
        self._ahead = 0  # and of the first that has not been looked after yet

    def enter(self, block: "WeightBlock") -> None:
        """Make `block` ready to be computed with."""
        block.visitors += 1
        if block.visitors > 1:
            return
        try:
            if self._before_block is not None:
                self._before_block()
            self._turn_to(block)
            if not self._at_hand(block):
                place = self._fetched.get(block) or self._fetch(block)
                self._transfers.wait(place.copied)
                block.point_into(self._bytes(place))
            self._look_ahead()
        except BaseException:
            block.visitors = 0
            raise

    def leave(self, block: "WeightBlock") -> None:
        """Nothing that is launched from now on reads `block`."""
        if block.visitors == 0:  # entering failed
            return
        block.visitors -= 1
        if block.visitors:
            return
        if place := self._fetched.pop(block, None):
            block.point_to_host()
            place.left, place.needed = self._transfers.computed(), False
            self._look_ahead()

    def expect(self, blocks: Sequence["WeightBlock"]) -> None:
        """These will run behind those that are expected already."""
        self.order += blocks
        self._look_ahead()

    def bytes_to_move(self, blocks: Sequence["WeightBlock"]) -> int:
        """What would be copied for one visit of each of them."""
        return sum(block.nbytes for block in blocks if not self._at_hand(block))

    def close(self) -> None:
        """End the run, wherever it is: no copy is under way, and the ring is given back."""
        try:
            self._transfers.close()
        finally:
            self._fetched.clear()
            self._places.clear()
            self._ring = None

    def _turn_to(self, block: "WeightBlock") -> None:
        """Move on in the order to where `block` comes next, if it comes at all."""
        with suppress(ValueError):
            self._next = self.order.index(block, self._next) + 1

    def _look_ahead(self) -> None:
        """Begin to copy the blocks that come next, as many as have room."""
        self._ahead = max(self._ahead, self._next)
        while self._ahead < len(self.order):
            block = self.order[self._ahead]
            place = self._fetched.get(block)
            if place is not None and place.turn != self._ahead:
                return  # it is still there for an earlier turn
            if (
                place is None
                and not self._at_hand(block)
                and (block.visitors or self._take_place(block, self._ahead) is None)
            ):
                return
            self._ahead += 1

    def _fetch(self, block: "WeightBlock") -> _Place:
        """Copy a block that was not expected, or not expected to be away from the device."""
        self._ahead = self._next
        place = self._take_place(block)
        while place is None:
            waiting = [other for other in self._fetched if not other.visitors]
            if not waiting:
                raise RuntimeError(
                    f"a block of {block.nbytes} bytes does not fit into a ring of {self.ring_bytes}"
                )
            self._drop(waiting[-1])
            place = self._take_place(block)
        return place

    def _take_place(self, block: "WeightBlock", turn: int = -1) -> _Place | None:
        """Begin to copy `block` to the next free stretch of the ring; None if there is none."""
        start = self._places[-1].end if self._places else 0
        if start + block.nbytes > self.ring_bytes:
            start = 0
        end = start + block.nbytes
        below = [p for p in self._places if p.start < end and start < p.end]
        if end > self.ring_bytes or any(place.needed for place in below):
            return None
        self._places = [place for place in self._places if place not in below]
        place = _Place(start, end, turn)
        assert block.host_buffer is not None, "the weights have not been given memory"
        after = [p.left for p in below if p.left is not None]
        if self._ring is None:
            self._ring = self._chunking.retry(self._new_ring)
            after = [self._transfers.computed()]  # whoever had this memory may still compute
        place.copied = self._transfers.copy(block.host_buffer, self._bytes(place), after)
        self.moved_bytes += block.nbytes
        self._places.append(place)
        self._fetched[block] = place
        return place

    def _drop(self, block: "WeightBlock") -> None:
        """Give the place of a block up that was fetched and is not needed."""
        self._fetched.pop(block).needed = False  # copies follow each other: no need to wait

    def _bytes(self, place: _Place) -> Tensor:
        assert self._ring is not None
        return self._ring[place.start : place.end]

    def _new_ring(self) -> Tensor:
        return torch.empty(self.ring_bytes, dtype=torch.uint8, device=self.device)

    def _at_hand(self, block: "WeightBlock") -> bool:
        """Whether `block` can be computed with where it is."""
        return block.resident or (
            block.host_buffer is not None and block.host_buffer.device == self.device
        )
