"""Processes that draw pictures and captions into memory that this one shares."""

import mmap
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .captions import caption
from .learner import log
from .painting import paint
from .scenes import Scene, draw_scene
from .vocabulary import CLIP_LENGTH, T5_LENGTH, Words

FIRST_SEED = 10_000_000  # tests and measurements have smaller ones
CAPTIONS = 4  # of a picture: some and all that it shows, in two languages
NICENESS = 19  # the training process must never wait for a core
LOGGED_FAILURES = 3  # of a worker
Size = tuple[int, int]  # width, height in pixels
Derive = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass
class Shelf:
    """The pictures of one size, in shared memory; `done` tells which ones are there.

    seeds: of the scenes. pictures: uint8 [n, height, width, 3]; ids: int16 [n, CAPTIONS, tokens].
    at_once: pictures of a slot, one below the other.
    """

    at_once: ClassVar[int] = 1
    size: Size
    seeds: range
    pictures: np.ndarray = field(init=False)
    t5_ids: np.ndarray = field(init=False)
    clip_ids: np.ndarray = field(init=False)
    done: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        (width, height), n = self.size, len(self.seeds)
        self.pictures = _shared((n, self.at_once * height, width, 3), np.uint8)
        self.t5_ids = _shared((n, CAPTIONS, T5_LENGTH), np.int16)
        self.clip_ids = _shared((n, CAPTIONS, CLIP_LENGTH), np.int16)
        self.done = _shared((n,), np.uint8)

    def draw(self, slot: int, words: Words) -> None:
        """Fill a slot with the scene of its seed."""
        r = Random(self.seeds[slot])
        scene = draw_scene(r)
        self.put(slot, words, [paint(scene, r, *self.size)], captions_of(scene, r))

    def put(
        self, slot: int, words: Words, pictures: Sequence[Image.Image], texts: Sequence[str]
    ) -> None:
        self.pictures[slot] = np.concatenate([np.asarray(picture) for picture in pictures])
        for number, text in enumerate(texts):
            self.t5_ids[slot, number], self.clip_ids[slot, number] = words(text, T5_LENGTH)
        self.done[slot] = 1


def captions_of(scene: Scene, r: Random) -> list[str]:
    given = [{"chinese": number % 2 == 1, "whole": number >= 2} for number in range(CAPTIONS)]
    return [caption(scene, r, **each) for each in given]


class Supply:
    """Draws `count` pictures in all, shared out among the sizes, and stops."""

    def __init__(
        self,
        sizes: Sequence[Size],
        shares: Sequence[float],
        count: int,
        workers: int,
        words_folder: Path,
        kind: type[Shelf] = Shelf,
    ) -> None:
        """words_folder: of the two tokenizers; kind: of all shelves.

        It forks, so it comes before anything that starts threads or a card.
        """
        self.shelves, seed = [], FIRST_SEED
        for size, share in zip(sizes, shares, strict=True):
            own = max(1, round(count * share))
            self.shelves.append(kind(size, range(seed, seed + own)))
            seed += own
        self._words_folder = words_folder
        Words(words_folder)  # if they cannot be read, here; and what that imports, for all
        fork = multiprocessing.get_context("fork")
        self._processes = [
            fork.Process(target=self._work, args=(number, workers, os.getpid()), daemon=True)
            for number in range(workers)
        ]
        for process in self._processes:
            process.start()

    @property
    def ready(self) -> int:
        return sum(int(shelf.done.sum()) for shelf in self.shelves)

    @property
    def drawing(self) -> bool:
        return any(process.is_alive() for process in self._processes)

    def wait(self, count: int, seconds: float) -> None:
        """Until so many pictures are there, or the time is over, or there will be no more."""
        end = time.monotonic() + seconds
        while self.ready < count and self.drawing:
            if time.monotonic() > end and all(shelf.done.any() for shelf in self.shelves):
                break
            time.sleep(0.02)
        if not all(shelf.done.any() for shelf in self.shelves):
            raise RuntimeError("not one picture of some size could be drawn; see the log")

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def _work(self, number: int, workers: int, parent: int) -> None:
        os.nice(NICENESS)
        words, failures = Words(self._words_folder), 0
        # All sizes grow alike: their slots are taken in the order of the share that is done.
        slots = sorted(
            ((slot / len(shelf.seeds), kind, slot)
             for kind, shelf in enumerate(self.shelves)
             for slot in range(len(shelf.seeds)))
        )  # fmt: skip
        for _, kind, slot in slots[number::workers]:
            if os.getppid() != parent:
                return  # it was killed
            shelf = self.shelves[kind]
            try:
                shelf.draw(slot, words)
            except Exception:
                failures += 1
                if failures <= LOGGED_FAILURES:
                    log(f"seed {shelf.seeds[slot]} is left out:\n{traceback.format_exc()}")


class Gallery:
    """What was drawn so far, on the device, ready for batches.

    derive: what is kept of uint8 pictures [n, height, width, 3], as tensors of n values each;
    most: pictures of each size.
    """

    AT_ONCE = 512  # pictures that are derived together

    def __init__(self, supply: Supply, device: torch.device, derive: Derive, most: int = 10**9):
        self._supply, self._device, self._derive = supply, device, derive
        self._rooms = [_Room(shelf, min(most, len(shelf.seeds))) for shelf in supply.shelves]

    @property
    def have(self) -> int:
        return sum(room.have for room in self._rooms)

    def refill(self, at_least: int = AT_ONCE) -> bool:
        """Take new pictures of one size; False if there are not `at_least` so many of any.

        The last ones are taken however few they are.
        """
        drawing = self._supply.drawing
        for room in self._rooms:
            fresh = room.fresh(self.AT_ONCE)
            if len(fresh) >= at_least or (len(fresh) > 0 and not drawing):
                room.take(fresh, self._derive, self._device)
                return True
        return False

    def refill_all(self) -> None:
        """Take all that there is."""
        while self.refill(at_least=1):
            pass

    def batch(self, count: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """What was derived of `count` pictures of one size, and ids of a caption of each.

        Each picture is as likely as any other. Needs one picture of some size.
        """
        likely = torch.tensor([float(room.have) for room in self._rooms])
        room = self._rooms[int(torch.multinomial(likely, 1))]
        return room.batch(count, self._device)


class _Room:
    """The pictures of one shelf that are on the device."""

    def __init__(self, shelf: Shelf, most: int) -> None:
        self.shelf, self.most, self.have = shelf, most, 0
        self._taken = np.zeros(len(shelf.seeds), bool)
        self._tensors: list[Tensor] = []  # the derived ones, and the ids of both encoders

    def fresh(self, count: int) -> np.ndarray:
        """Slots of pictures that are not here yet."""
        count = min(count, self.most - self.have)
        return np.flatnonzero((self.shelf.done == 1) & ~self._taken)[:count]

    @torch.no_grad()
    def take(self, slots: np.ndarray, derive: Derive, device: torch.device) -> None:
        shelf = self.shelf
        drawn = (shelf.pictures, shelf.t5_ids, shelf.clip_ids)
        pictures, *ids = (torch.from_numpy(array[slots]).to(device) for array in drawn)
        new = [*derive(pictures), *ids]
        if not self._tensors:
            self._tensors = [x.new_empty(self.most, *x.shape[1:]) for x in new]
        end = self.have + len(slots)
        for mine, x in zip(self._tensors, new, strict=True):
            mine[self.have : end] = x
        self._taken[slots] = True
        self.have = end

    def batch(self, count: int, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        which = torch.randint(self.have, (count,), device=device)
        caption = torch.randint(CAPTIONS, (count,), device=device)
        *derived, t5_ids, clip_ids = self._tensors
        t5_ids, clip_ids = (tensor[which, caption].long() for tensor in (t5_ids, clip_ids))
        return tuple(tensor[which] for tensor in derived), t5_ids, clip_ids


def as_float(pictures: Tensor) -> Tensor:
    """uint8 [n, height, width, 3] -> float32 [n, 3, height, width] in -1..1."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def _shared(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros that forked processes write for all to see; pages that nobody writes cost nothing."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)
