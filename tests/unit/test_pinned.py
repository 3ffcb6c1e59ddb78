"""Weights are pinned as they travel: what travels first, as far as there is room."""

import platform
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from majicflux.engine.flux import conditioning
from majicflux.engine.offload import pinned
from majicflux.engine.offload.pinned import (
    RAM_LEFT,
    RAM_WANTED,
    PinnedWeights,
    give_back_host_memory,
)
from majicflux.engine.run import stages
from majicflux.engine.run.pipeline import paint
from majicflux.engine.run.request import GenerationRequest

SIZE = 1000
RAM = 100 * SIZE
MB = 2**20


class Host:
    """What pins memory, up to `most` pieces."""

    def __init__(self, most: int):
        self.most = most
        self.pinned: list[Tensor] = []

    def pin(self, memory: Tensor) -> bool:
        if len(self.pinned) == self.most:
            return False
        self.pinned.append(memory)
        return True

    def unpin(self, memory: Tensor) -> None:
        self.pinned = [other for other in self.pinned if other is not memory]


@pytest.fixture
def homes(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    monkeypatch.setattr(Tensor, "is_pinned", lambda _: False)  # which asks the driver for its view
    free(monkeypatch, RAM)
    return [torch.full((SIZE,), index, dtype=torch.uint8) for index in range(6)]


def free(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    ram = SimpleNamespace(available=available, total=RAM)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: ram)


def pinned_of(homes: list[Tensor], host: Host, mapped: bool) -> PinnedWeights:
    pinned = PinnedWeights(homes, mapped, host.pin, host.unpin)
    pinned.begin()
    return pinned


def test_mapped_weights_are_copied_once(homes: list[Tensor]) -> None:
    host = Host(most=9)
    pinned = pinned_of(homes, host, mapped=True)
    assert pinned.known(homes[3]) is None
    copy = pinned.of(homes[3])
    assert copy is not None
    assert torch.equal(copy, homes[3])
    assert copy.data_ptr() != homes[3].data_ptr()
    assert pinned.of(homes[3]) is pinned.known(homes[3]) is copy
    assert (len(host.pinned), pinned.nbytes) == (1, SIZE)


def test_the_processs_own_weights_are_pinned_where_they_are(homes: list[Tensor]) -> None:
    host = Host(most=9)
    assert pinned_of(homes, host, mapped=False).of(homes[2]) is homes[2]
    assert host.pinned == [homes[2]]


def test_what_travels_first_is_pinned_until_the_host_refuses(homes: list[Tensor]) -> None:
    host = Host(most=2)
    pinned = pinned_of(homes, host, mapped=True)
    order = [4, 1, 3, 0]
    found = [pinned.of(homes[index]) for index in order]
    assert [memory is not None for memory in found] == [True, True, False, False]
    host.most = 9
    assert pinned.of(homes[3]) is None, "nobody has asked for more"
    pinned.begin()
    assert pinned.of(homes[3]) is not None


def test_what_does_not_travel_at_every_pass_is_not_pinned(homes: list[Tensor]) -> None:
    host = Host(most=9)
    pinned = pinned_of(homes[:2], host, mapped=True)
    assert pinned.of(homes[5]) is None
    assert pinned.of(homes[0]) is not None, "and that is no refusal"
    pinned.grows = False
    assert pinned.of(homes[1]) is None
    assert pinned.of(homes[0]) is not None


def test_copies_leave_memory_to_others(homes: list[Tensor], monkeypatch) -> None:
    host = Host(most=9)
    pinned = pinned_of(homes, host, mapped=True)
    free(monkeypatch, int(RAM_LEFT * RAM) + SIZE - 1)
    assert pinned.of(homes[0]) is None
    in_place = pinned_of(homes, host, mapped=False)
    assert in_place.of(homes[0]) is homes[0], "which takes none"


def test_copies_go_when_the_machine_is_short_of_memory(homes: list[Tensor], monkeypatch) -> None:
    host = Host(most=9)
    pinned = pinned_of(homes, host, mapped=True)
    pinned.of(homes[0])
    free(monkeypatch, int(RAM_LEFT * RAM))  # they have taken what they may: no reason to go
    pinned.begin()
    assert pinned.nbytes == SIZE
    free(monkeypatch, int(RAM_WANTED * RAM) - 1)
    pinned.begin()
    assert not host.pinned
    assert pinned.of(homes[0]) is None
    free(monkeypatch, RAM)
    pinned.begin()
    assert pinned.of(homes[0]) is not None


def test_all_of_it_is_given_back(homes: list[Tensor]) -> None:
    host = Host(most=9)
    pinned = pinned_of(homes, host, mapped=True)
    for home in homes:
        pinned.of(home)
    pinned.release()
    assert not host.pinned
    assert pinned.nbytes == 0
    assert pinned.known(homes[0]) is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of another C library")
def test_freed_pieces_go_back_to_the_system() -> None:
    """Which the C library keeps, as long as anything lies behind them."""
    pieces = [bytearray(b"x" * 2**15) for _ in range(4096)]  # too small for a mapping of their own
    behind = bytearray(b"x" * 2**15)
    pieces.clear()
    before = psutil.Process().memory_info().rss
    give_back_host_memory()
    assert before - psutil.Process().memory_info().rss > 2**26
    assert len(behind) == 2**15


def test_the_heap_is_trimmed_once_the_process_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed, resident = [], 0

    def trim() -> None:
        nonlocal resident
        trimmed.append(resident // MB)
        resident -= 10 * MB

    monkeypatch.setattr(pinned, "trim_heap", trim)
    monkeypatch.setattr(pinned, "_resident", 0)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: SimpleNamespace(rss=resident))
    # 300 of weights leave after 420, of which 110 come back.
    for megabytes in (400, 390, 420, 424, 120, 150, 230):
        resident = megabytes * MB
        pinned.trim_grown_heap()
    assert trimmed == [400, 424, 230]


@pytest.mark.usefixtures("narrow")
def test_what_steps_are_told_is_pinned_no_longer_than_weights(make_pipeline, monkeypatch) -> None:
    """And again when the next picture asks for it, for which it is still there."""
    made = []
    memory = conditioning._host_memory

    def host_memory(*given: Any, **named: Any) -> Tensor:
        made.append(memory(*given, **named))
        return made[-1]

    monkeypatch.setattr(conditioning, "_host_memory", host_memory)
    pipeline = make_pipeline()
    request = GenerationRequest("a cat", seed=0, steps=2, guidance=3.5, width=64, height=64)
    expected = paint(pipeline, request, lambda _: None, lambda: None)[0]

    def told() -> list[Tensor]:
        return [x for each in pipeline.dit.last_conditions._kept for x in each.modulation.values()]

    def in_what_was_made(x: Tensor) -> bool:
        storages = [each.untyped_storage().data_ptr() for each in made]
        return x.untyped_storage().data_ptr() in storages

    before = told()
    assert len(before) == 2
    assert all(map(in_what_was_made, before))
    pipeline.dit.weights.unpin()
    assert not any(map(in_what_was_made, told()))
    assert all(map(torch.equal, told(), before))
    monkeypatch.setattr(stages, "conditions_of", None)  # which is not needed again
    assert torch.equal(paint(pipeline, request, lambda _: None, lambda: None)[0], expected)
    assert all(map(in_what_was_made, told()))
