"""What the benchmark of a whole server judges, with made-up servers."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from majicflux.benchmarks import server, turns
from majicflux.benchmarks.card_counter import peak_of
from majicflux.benchmarks.painting import Held, Painting
from majicflux.benchmarks.table import Row

CARD = server.where("8", "")
OURS = Painting(CARD, "ours", 2, "success", seconds=4.0, peak=7.7, budget=7.0)
GOOD = [
    replace(OURS, budget=0.0),
    OURS,
    Painting(CARD, "fp8_e4m3fn", 2, "success", seconds=10.1),
    Painting("fresh server", "ours, converting", 1, "success", seconds=14.9),
    Painting("fresh server", "ours, prepared", 1, "success", seconds=10.9),
    Painting("fresh server", "fp8_e4m3fn", 1, "success", seconds=10.0),
]


def missed(paintings: list[Painting]) -> list[str]:
    return [row.name for row in server.judged(paintings) if row.missed]


def test_what_keeps_every_bar_passes() -> None:
    assert missed(GOOD) == []
    assert sum(row.bar is not None for row in server.judged(GOOD)) == 5


@pytest.mark.parametrize(
    ("index", "change", "said"),
    [
        (0, {"status": "error"}, "without a picture"),
        (0, {"seconds": 4.1}, "8 GiB left, default flags, second prompt"),
        (1, {"peak": 7.9}, "7 GB, prompt 2: card"),
        (3, {"seconds": 15.1}, "ours, converting"),
        (4, {"seconds": 11.1}, "ours, prepared"),
    ],
)
def test_each_bar_can_be_missed(index: int, change: dict, said: str) -> None:
    worse = [replace(p, **change) if n == index else p for n, p in enumerate(GOOD)]
    (name,) = missed(worse)
    assert said in name


def test_errors_of_comfyuis_own_models_are_not_ours() -> None:
    assert missed([*GOOD, Painting(CARD, "fp8_e4m3fn_fast", 2, "error")]) == []


def test_the_peak_is_what_the_counter_showed_meanwhile() -> None:
    shown = iter([1.0, 5.0])
    seen: list[float] = []

    def counter() -> float:
        seen.append(next(shown, 2.0))
        return seen[-1]

    with peak_of(counter) as highest:
        while len(seen) < 4:
            pass
    assert highest == [5.0]
    with peak_of(None) as highest:
        pass
    assert highest == []


class Made:
    """A session that paints at once. `fault` changes the nth painting, and what is held after."""

    where = "made up"

    def __init__(self, folder: Path, fault: Callable[[Painting], Painting], grows: float = 0.0):
        self.folder, self.fault, self.grows = folder, fault, grows
        self.painted: list[str] = []
        self.server = self
        report = '{"phases": [{"name": "denoising", "seconds": 0.01}]}'
        self.info = PngInfo()
        self.info.add_text("majicflux", report)

    def post(self, path: str, body: object) -> None: ...

    def paint(self, graph: dict, what: str, number: int = 1, budget: float = 0.0) -> Painting:
        self.painted.append(what)
        path = self.folder / f"{len(self.painted)}.png"
        seed = next(n["inputs"]["seed"] for n in graph.values() if "seed" in n["inputs"])
        Image.new("RGB", (1, 1), (seed % 256, 0, 0)).save(path, pnginfo=self.info)
        kind = what.split(":")[0]
        status = {"refused": "refused", "error": "error", "cancelled": "interrupted"}
        status = status.get(kind, "success")
        painting = Painting(self.where, what, number, status, 1.0, picture=path)
        return self.fault(painting)

    def free(self, forget: bool = False) -> None: ...

    def held_idle(self) -> Held:
        return 1.0, 2.0 + self.grows * len(self.painted), 1.5


def rows_of(session: Made, in_time: turns.InTime = lambda *_: True) -> list[Row]:
    return [
        *turns.in_turns(session, 2, 64, 5, True, in_time),
        *turns.cancelled(session, 2, 64),
        *turns.soak(session, 64, 20, in_time),
    ]


def in_use(session: Made) -> list[str]:
    """The bars that are missed."""
    return [row.name for row in rows_of(session) if row.missed]


def test_rounds_and_prompts_end_with_the_time_and_say_how_many(tmp_path: Path) -> None:
    session = Made(tmp_path, lambda painting: painting)
    names = [row.name for row in rows_of(session, lambda *_: False)]
    assert any("3 rounds in turns: failed" in name for name in names)
    assert any("1 mixed prompts: lost" in name for name in names)


def test_a_server_that_is_as_it_was_passes(tmp_path: Path) -> None:
    session = Made(tmp_path, lambda painting: painting)
    assert in_use(session) == []
    assert set(turns.KINDS) <= set(session.painted)


FAULTS = {
    "lost": ("cfg", {"status": "lost"}, "20 mixed prompts: lost"),
    "slower in turns": ("turns: ours", {"seconds": 2.0}, "rounds in turns: ours"),
    "failed in turns": ("turns: fp8_e4m3fn", {"status": "error"}, "in turns: failed"),
    "other pixels": ("after /free", {"picture": None}, "after /free: another picture"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_seen(tmp_path: Path, kind: str) -> None:
    at, change, said = FAULTS[kind]
    alone = 4  # prompts of each side, before the rounds
    seen: list[str] = []

    def fault(painting: Painting) -> Painting:
        seen.append(painting.what)
        if painting.what != at or (at.startswith("turns") and seen.count(at) <= alone):
            return painting
        return replace(painting, **change)

    assert any(said in name for name in in_use(Made(tmp_path, fault)))


@pytest.mark.parametrize(
    ("change", "right"),
    [
        ({}, True),
        (
            {"status": "error", "picture": None, "error": "majicflux.OutOfVramError: too little"},
            True,
        ),
        ({"status": "error", "picture": None, "error": "torch.OutOfMemoryError: "}, False),
        ({"picture": None}, False),
    ],
)
def test_under_pressure_the_same_bits_or_the_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, right: bool
) -> None:
    monkeypatch.setattr(turns, "grabbing", lambda *_: contextlib.nullcontext(lambda: None))
    session = Made(tmp_path, lambda p: replace(p, **change) if p.what == "disturbed" else p)
    assert [row.missed for row in turns.under_pressure(session, 2, 64)] == [not right, False]


def test_growth_is_seen(tmp_path: Path) -> None:
    found = in_use(Made(tmp_path, lambda painting: painting, grows=0.03))
    assert [name.split(": ")[-1] for name in found] == ["growth, resident memory"] * 2
