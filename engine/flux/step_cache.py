"""Passes that run the first block alone, and go on with what the others added in computed passes.

First-block caching, as ParaAttention and cache-dit have it: the first block tells how far this pass
is from the last computed one, and it and both ends are those of this noise level. What the others
add is not held but follows its line from pass to pass, as TaylorSeer's (arXiv:2503.06923) does.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..offload.chunking import Chunking, split
from ..offload.prefetch import PrefetchRing
from ..offload.weight_block import CPU, WeightBlock
from .reuse import AT_ONCE, COMPARED, Reuse
from .velocity import Blocks, Pass

FOLLOWED = 0.75  # of that line: the rest of it is curve and noise (see benchmarks/README.md)

Visits = Sequence[Sequence[WeightBlock]]  # the weights that each block of a pass needs


class Course:
    """What the passes of a run will be, as far as that is known.

    decisions: of each pass whether it is computed, None until its first block has run.
    """

    def __init__(self, decisions: Sequence[bool | None], visits: Sequence[Visits]):
        self.decisions = [*decisions]
        self._visits = visits
        self._ahead = 0  # the first pass that `ahead` has not told of

    def ahead(self) -> list[WeightBlock]:
        """The weights that are certain to come next, each told once."""
        found: list[WeightBlock] = []
        while self._ahead < len(self.decisions):
            number, self._ahead = self._ahead, self._ahead + 1
            found += self._visits[number][0]
            if self.decisions[number] is None:
                break
            if self.decisions[number]:
                found += self.others(number)
        return found

    def decide(self, number: int, computed: bool, in_a_row: int) -> list[WeightBlock]:
        """Note what a pass is, at most so many in a row reused; returns the weights that are then
        certain to come next."""
        self.decisions[number] = computed
        last = self.decisions[max(0, number + 1 - in_a_row) : number + 1]
        if len(last) == in_a_row and not any(last):
            self.decisions[number + 1] = True
        return [*(self.others(number) if computed else ()), *self.ahead()]

    def others(self, number: int) -> list[WeightBlock]:
        """The weights that all blocks but the first need in a pass."""
        return [weights for block in self._visits[number][1:] for weights in block]

    def seconds(self, computed: Sequence[float]) -> float:
        """How long they take at most. computed: how long each takes where it is computed."""
        passes = zip(computed, self._visits, self.decisions, strict=True)
        return sum(
            seconds / len(visits) if decision is False else seconds
            for seconds, visits, decision in passes
        )

    @property
    def reused(self) -> tuple[int, ...]:
        return tuple(n for n, computed in enumerate(self.decisions) if computed is False)


@dataclass(frozen=True)
class _Added:
    """What all blocks but the first added at a noise level: of each prompt [batch, image tokens,
    width]."""

    sigma: float
    images: Sequence[Tensor]


class StepCache:
    """How the sequences pass through the blocks where steps are reused; its state is one run's.

    through: the way through all blocks; ring: by which the weights of `course` come; on_host:
    whether what is kept waits in the host's memory.
    """

    def __init__(
        self, through: Blocks, reuse: Reuse, course: Course, ring: PrefetchRing, on_host: bool
    ):
        self._through, self._reuse, self._course = through, reuse, course
        self._ring, self._on_host = ring, on_host
        self._kept: list[_Added] = []  # in the last computed passes, two at most
        self._found: Tensor | None = None  # by the first block, in the last computed pass
        self._begun: list[float] = []  # when each pass did
        self.unmoved_bytes = 0  # of weights that would have travelled

    def __call__(self, dit: Any, running: Pass, chunking: Chunking) -> Iterator[None]:
        if running.latents.is_cuda:
            torch.cuda.current_stream(running.latents.device).synchronize()  # the last pass is over
        self._begun.append(time.perf_counter())
        number, blocks = len(self._begun) - 1, self._through(dit, running, chunking)
        compared = running.sequences[0].image[:, ::COMPARED]  # the positive prompt decides
        before = chunking.retry(compared.clone) if self._reuse.chosen is None else None
        next(blocks)
        yield
        found = None if before is None else torch.sub(compared, before, out=before)
        if self._course.decisions[number] is None:
            near = self._is_near(found)
            self._ring.expect(self._course.decide(number, not near, self._reuse.in_a_row))
        if self._course.decisions[number]:
            self._found = found
            yield from self._keeping(blocks, number, running, chunking)
        else:
            self.unmoved_bytes += self._ring.bytes_to_move(self._course.others(number))
            self._add_expected(running)

    def _is_near(self, found: Tensor | None) -> bool:
        """Whether every picture is so near to the last computed pass that this one is reused."""
        assert found is not None
        assert self._found is not None
        return bool((distance(found, self._found) < self._reuse.threshold).all())

    def _keeping(
        self, blocks: Iterator[None], number: int, running: Pass, chunking: Chunking
    ) -> Iterator[None]:
        """The other blocks; what they add is kept where one of the next two passes may need it."""
        if all(self._course.decisions[number + 1 : number + 3]):
            yield from blocks
            return
        images = [sequence.image for sequence in running.sequences]
        if len(self._kept) < 2:
            device = CPU if self._on_host else running.latents.device
            new = partial(torch.empty_like, device=device)
            places = [chunking.retry(partial(new, image)) for image in images]
        else:
            places = self._kept.pop(0).images
        for place, image in zip(places, images, strict=True):
            place.copy_(image)
        yield from blocks
        for place, image in zip(places, images, strict=True):
            for some in _stretches(image):
                before = place[:, some]
                torch.sub(image[:, some].to(place.device), before, out=before)
        self._kept.append(_Added(running.sigma.item(), places))

    def _add_expected(self, running: Pass) -> None:
        """Instead of the other blocks: on the line through the last two that were computed."""
        last = self._kept[-1]
        parts = [(1.0, last.images)]
        if len(self._kept) == 2:
            older = self._kept[0]
            beyond = (running.sigma.item() - last.sigma) / (last.sigma - older.sigma)
            parts = [(1 + FOLLOWED * beyond, last.images), (-FOLLOWED * beyond, older.images)]
        for weight, images in parts:
            for sequence, kept in zip(running.sequences, images, strict=True):
                for some in _stretches(kept):
                    there = sequence.image[:, some]
                    there.add_(kept[:, some].to(there.device), alpha=weight)

    @property
    def seconds(self) -> tuple[float, float]:
        """Of the passes until now, and of as many that are all computed."""
        times = [*self._begun, time.perf_counter()]
        each = [end - start for start, end in pairwise(times)]
        decisions = zip(each, self._course.decisions, strict=True)
        return sum(each), len(each) * median(x for x, computed in decisions if computed)


def distance(found: Tensor, before: Tensor) -> Tensor:
    """Of each picture in a batch, how far it is from what was found before, as a share of that."""
    return (found - before).abs_().mean((1, 2)) / before.abs().mean((1, 2))


def _stretches(image: Tensor) -> Iterator[slice]:
    return split(slice(0, image.shape[1]), AT_ONCE)
