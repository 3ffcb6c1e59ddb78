"""`majicflux bench`: on the CPU, with a small transformer, what it says of a card."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from majicflux.cli import main
from majicflux.engine.errors import OutOfVramError
from majicflux.engine.flux.geometry import FluxGeometry
from majicflux.engine.quant.attention import PYTORCH, Attention
from majicflux.engine.quant.compute import ComputePrecision
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.host import current as host
from majicflux.lab import bench as room
from majicflux.lab.steps import random_case, seconds_of

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SMALL = FluxGeometry(hidden=256, double_blocks=2, single_blocks=4, text_width=64)
ROW = re.compile(r"\| ([^|]+) \| ([^|]+) \| (\d+\.\d{3}) \|")
STEP = room.Measured("int8 rotated", ComputePrecision(torch.bfloat16), 2.0, 1.0)


def test_every_precision_is_measured_and_a_run_besides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fewer in (("WARM_UP", 0), ("STEPS", 1), ("RUN_STEPS", 3)):
        monkeypatch.setattr(room, name, fewer)
    said = room.bench(CPU, geometry=SMALL, side=32)
    seconds = {name: float(seconds) for name, _, seconds in ROW.findall(said)}
    assert [*seconds] == [*room.MEASURED]
    assert min(seconds.values()) > 0
    assert re.match(r"```\nMajicFlux: .*, Python \d", said)
    assert said.count("```") == 2
    assert "\nno attention in int8: int8 matrix units begin" in said
    fastest = min(room.MEASURED[1:], key=seconds.__getitem__)
    found = rf"\na run in .* GB, {fastest}: \d\.\d{{3}} s a step, predicted \?; .*, 0.00 of them"
    assert re.search(found, said)


def test_attention_in_int8_is_measured_beside_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def step(module, computing, *_: object) -> Iterator[Attention]:
        with computing.applied_to(module, CPU):
            yield module.blocks[0].attention

    def seconds(attention: Attention, *_: object) -> float:
        measured.append(attention)
        return 0.5 if attention.in_int8(1) else 1.0

    measured: list[Attention] = []
    monkeypatch.setattr(room, "int8_obstacle", lambda *_: "")
    monkeypatch.setattr(room, "our_step", step)
    monkeypatch.setattr(room, "seconds_of", seconds)
    monkeypatch.setattr(room, "fill_randomly", lambda *_: None)
    monkeypatch.setattr(room, "_in_budget", lambda chosen, *_: f"a run: {chosen.computing.choice}")
    said = room.bench(CPU, geometry=SMALL, side=32)
    assert measured == [PYTORCH, Attention(0)] * 3
    ways = [how for _, how, _ in ROW.findall(said)]
    assert [how.endswith("; attention in int8") for how in ways] == [False, True] * 3
    (run,) = (line for line in said.splitlines() if line.startswith("a run"))
    assert run.endswith("; attention in int8"), "by the fastest of those in 8 bits"


def test_a_card_with_little_room_is_told_from_fewer_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of full-size blocks, which are not allocated here."""
    precision, card = "int8 rotated", SimpleNamespace(type="cuda")
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, dtype, **_: empty(*size, dtype=dtype, device="meta")
    )
    monkeypatch.setattr(room, "fill_randomly", lambda *_: None)
    for gb, joint in ((24, 19), (12, 8), (6, 4), (3, 2), (2, 1), (1, 0)):
        monkeypatch.setattr(host, "free_memory", lambda _, gb=gb: gb * 2**30)
        found = room._on_the_card(precision, FluxGeometry(), card)  # type: ignore
        if joint == 0:
            assert found is None
            continue
        assert found is not None
        weights, share = found
        assert (len(weights.module.blocks), share) == (joint, joint / 19)
        assert len(weights.module.single_blocks) == 2 * joint
    *_, row = room._table([room.Measured(precision, STEP.computing, 2.0, 8 / 19)], 1024)
    assert row == "| int8 rotated | computes in bfloat16 | 2.000 (from 42% of the blocks) |"


def test_a_machine_with_little_ram_has_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(available=2**30)
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: memory)
    case = random_case(SMALL, 8, CPU)
    said = room._in_budget(STEP, 8.0, FluxGeometry(), case, CPU)
    needed = room.build_flux_dit(FluxGeometry(), PRECISIONS["int8 rotated"]).total_bytes
    assert said == f"no run: {needed / 2**30 + 1:.0f} GB of RAM must be free for it"


def test_a_budget_that_is_too_small_costs_the_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise OutOfVramError(phase="denoising", smallest=2.0)

    monkeypatch.setattr(room, "_resident", lambda name, *_: [replace(STEP, precision=name)])
    monkeypatch.setattr(room, "_in_budget", refuse)
    said = room.bench(CPU, 1.0, geometry=SMALL, side=32)
    assert "\nThe card ran out of memory in the phase 'denoising', which needs 2.00 GB" in said
    assert len(ROW.findall(said)) == len(room.MEASURED)


def test_a_step_is_the_median_of_those_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 9, 10, 11, 20, 23, 30, 32.0])
    monkeypatch.setattr("majicflux.lab.steps.time", SimpleNamespace(perf_counter=clock.__next__))
    assert seconds_of(lambda: torch.empty(0), CPU, 1, 3) == 2


def test_a_run_is_timed_once_its_weights_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(pipeline, request, on_pass, before_block) -> None:
        for _ in range(6):
            on_pass(None)

    clock = iter([0, 9, 18, 20, 22, 24.0])
    monkeypatch.setattr(room, "time", SimpleNamespace(perf_counter=clock.__next__))
    monkeypatch.setattr(room, "denoise", run)
    case = random_case(SMALL, 8, CPU)
    assert "rotated: 2.000 s a step" in room._in_budget(STEP, 8.0, SMALL, case, CPU)


def test_both_kinds_of_memory_are_copied_from(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {True: 25e9, False: 6e9}
    monkeypatch.setattr(room, "copy_rate", lambda _, pinned=True: rates[pinned])
    (said,) = room._copies(torch.device("cuda", 0))
    assert said == "copies to the card: 25.0 GB/s from pinned memory, 6.0 from other"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(capsys) -> None:
    assert main(["bench"]) == 1
    assert capsys.readouterr().err == (
        "error: There is no card here that PyTorch can use: nothing to measure.\n"
    )
