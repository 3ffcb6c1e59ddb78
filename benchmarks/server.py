"""A whole ComfyUI server with full-size random files: ours beside ComfyUI's own Flux in it.

For each set of flags and each amount of memory left on the card by a second process, one server
paints the documented graph without a budget and with several, and ComfyUI's own graph, each twice
with new seeds. Then fresh servers paint their first picture: ours while it converts the weights,
ours with prepared weights, ComfyUI's. --turns and --soak: see `turns.py`. Every prompt is printed
as it ends. Needs ComfyUI (COMFYUI_PATH) and 34 + 22 GB in --scratch. --quick paints with small
random models on the CPU, where times and the card are not judged.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from majicflux.dev import find_comfyui

from . import flux_graphs, turns
from .card_counter import GIB, card_counter, leaving_free
from .comfyui import ROOT, ComfyUI
from .full_size import write_control_net, write_lora, write_models
from .painting import Painting, Session
from .table import Row, report

CARDS, TURNS_CARDS = "free,12,8,6,4,2", "12,8"  # GiB left
EXPANDABLE = "expandable_segments"  # no flag of ComfyUI's: an environment that many users set
FLAGS = (
    "", "--disable-cuda-malloc", "--lowvram", "--novram", "--highvram", "--gpu-only",
    "--cache-none", "--disable-dynamic-vram", "--reserve-vram 2", "--disable-pinned-memory",
    EXPANDABLE,
)  # fmt: skip
OURS, PEER, FAST = "ours", "fp8_e4m3fn", "fp8_e4m3fn_fast"
CONVERTING, PREPARED = "ours, converting", "ours, prepared"
CONTEXT_GIB = 0.8  # of CUDA and its libraries, which no budget includes
TIMES_FASTER = {"free": 1.8, "8": 2.5, "4": 2.0}  # than PEER, the second prompt
FIRST = {CONVERTING: 1.5, PREPARED: 1.1}  # times PEER's first prompt, at most
PARTS = {
    "speeds": "side by side (the default, with --first)",
    "first": "first prompts of fresh servers",
    "loras": "with a LoRA",
    "pictures": "with a picture as a reference, and through a control net",
    "turns": "in turns, cancelled, under pressure",
    "soak": "mixed prompts",
}
# That must be left for another server, another pair of prompts, or the three first ones.
SERVER_SECONDS, PAIR_SECONDS, FIRST_SECONDS = 60, 40, 150


@dataclass
class Bench:
    """What all servers have in common, and what was painted so far."""

    comfyui: Path
    scratch: Path
    quick: bool
    steps: int
    side: int
    seconds: float
    paintings: list[Painting] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counter = None if self.quick else card_counter()
        self.seeds = itertools.count(100)
        self.end = time.monotonic() + self.seconds
        if not self.quick and self.counter is None:
            sys.exit("No NVIDIA card; --quick runs on the CPU.")
        write_models(self.scratch / "models", small=self.quick)

    def note(self, painting: Painting) -> None:
        self.paintings.append(painting)
        ram = round(psutil.virtual_memory().available / GIB, 1)  # how much is pinned depends on it
        known = {"picture": str(painting.picture), "report": painting.report, "free RAM, GiB": ram}
        shown = dataclasses.asdict(painting) | known
        print(json.dumps(shown), flush=True)

    def in_time(self, what: str, seconds: float = SERVER_SECONDS) -> bool:
        if time.monotonic() + seconds < self.end:
            return True
        print(f"not measured, no time: {what}", flush=True)
        return False

    @contextlib.contextmanager
    def session(self, card: str, flags: str) -> Iterator[Session]:
        """A server of its own. Raises RuntimeError when it does not start."""
        with leaving_free(None if card == "free" else float(card)):
            before = self.counter() if self.counter else 0.0
            server = self._start(flags.split())
            try:
                yield Session(server, where(card, flags), self.note, self.counter, before)
            finally:
                server.stop()

    def _start(self, flags: Sequence[str]) -> ComfyUI:
        given, environment = [flag for flag in flags if flag != EXPANDABLE], {}
        if EXPANDABLE in flags:
            given.append("--disable-cuda-malloc")
            environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        if self.quick:
            given.append("--cpu")
            environment["OMP_WAIT_POLICY"] = "PASSIVE"  # this process waits on the same processor
            packs = self.scratch / "custom_nodes"
            packs.mkdir(exist_ok=True)
            shutil.copy(ROOT / "tests" / "small_encoders.py", packs)
        return ComfyUI(self.comfyui, self.scratch, given, environment)

    def paint(self, session: Session, what: str, number: int = 1, budget: float = 0.0) -> Painting:
        """With a new seed. what: a side, ours or a weight_dtype of ComfyUI's."""
        given = next(self.seeds), self.steps, self.side
        if not what.startswith(OURS):
            return session.paint(flux_graphs.native(*given, what), what, number)
        graph = flux_graphs.ours(*given, budget)
        return session.paint(graph, what, number, budget)


def where(card: str, flags: str) -> str:
    left = "whole card" if card == "free" else f"{card} GiB left"
    return f"{left}, {flags or 'default flags'}"


def side_by_side(
    bench: Bench, session: Session, budgets: Sequence[float], peers: Sequence[str]
) -> None:
    """Each twice in one server; what others hold on the card is given back before."""
    kinds = [(OURS, budget) for budget in budgets] + [(peer, 0.0) for peer in peers]
    for what, budget in kinds:
        if not bench.in_time(f"{session.where}, {what}, {budget:g} GB", PAIR_SECONDS):
            continue
        session.free()
        for number in (1, 2):
            bench.paint(session, what, number, budget)


def first_prompts(bench: Bench) -> None:
    """Of fresh servers, with the whole card and default flags."""
    for what in (CONVERTING, PREPARED, PEER):
        if what == CONVERTING:
            shutil.rmtree(bench.scratch / "models" / "majicflux_prepared", ignore_errors=True)
        with bench.session("free", "") as session:
            session.where = "fresh server"
            bench.paint(session, what)


def judged(paintings: Sequence[Painting], quick: bool = False) -> list[Row]:
    """The rows of the table. quick: errors are judged, times and memory are not."""
    mine = [painting for painting in paintings if painting.what.startswith(OURS)]
    failed = sum(painting.status != "success" for painting in mine)
    rows = [Row("prompts of ours without a picture", failed, f"of {len(mine)}", bar=0)]
    found = {(p.where, p.what, p.budget, p.number): p for p in paintings if p.status == "success"}
    for painting in found.values():
        if painting.budget and painting.peak is not None:
            name = f"{painting.where}, {painting.budget:g} GB, prompt {painting.number}: card"
            rows.append(Row(name, painting.peak, "GiB", bar=painting.budget + CONTEXT_GIB))
    bars = {where(card, ""): factor for card, factor in TIMES_FASTER.items()}
    for place in dict.fromkeys(painting.where for painting in paintings):
        ours = found.get((place, OURS, 0.0, 2))
        for peer in (PEER, FAST):
            theirs = found.get((place, peer, 0.0, 2))
            if ours and theirs:
                factor = bars.get(place) if peer == PEER and not quick else None
                bar = None if factor is None else round(theirs.seconds / factor, 2)
                name = f"{place}, second prompt"
                rows.append(Row(name, ours.seconds, "s", theirs.seconds, peer, bar))
        theirs = found.get((place, PEER, 0.0, 1))
        for what, factor in FIRST.items():
            if (ours := found.get((place, what, 0.0, 1))) and theirs:
                bar = None if quick else round(factor * theirs.seconds, 2)
                rows.append(Row(f"{place}, {what}", ours.seconds, "s", theirs.seconds, PEER, bar))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small random models on the CPU")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--scratch", type=Path, help="a folder for models and pictures, reused")
    parser.add_argument("--cards", help=f"GiB left of the card; default: {CARDS}, or {TURNS_CARDS}")
    parser.add_argument("--flags", action="append", help='such as "--flags=--lowvram"; repeatable')
    parser.add_argument("--budgets", help="GB; default: 0,8,4,1, or 0 and 1 less than is left")
    parser.add_argument("--peers", default=f"{PEER},{FAST}", help="weight_dtype of ComfyUI's")
    for part, of_part in PARTS.items():
        parser.add_argument(f"--{part}", action="store_true", help=of_part)
    parser.add_argument("--rounds", type=int, help="of --turns; default: 20, quick: 2")
    parser.add_argument("--prompts", type=int, help="of --soak; default: 200, quick: 20")
    parser.add_argument("--steps", type=int, help="default: 20, quick: 2")
    parser.add_argument("--seconds", type=float, default=3600, help="begin nothing that ends later")
    parser.add_argument("--out", type=Path, help="a JSON file for all prompts")
    chosen = parser.parse_args()
    comfyui = find_comfyui()
    if comfyui is None:
        sys.exit("Set COMFYUI_PATH to a checkout of ComfyUI.")
    with contextlib.ExitStack() as stack:
        scratch = chosen.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        quick = chosen.quick
        steps, side = chosen.steps or (2 if quick else 20), 64 if quick else 1024
        scratch = scratch.absolute() / ("small" if quick else "full")
        bench = Bench(comfyui, scratch, quick, steps, side, chosen.seconds)
        rows: list[Row] = []
        try:
            for row in _measure(bench, chosen):
                rows.append(row)
                print(row, flush=True)  # what is known, should this be cut off
        finally:
            if chosen.out:
                shown = [dataclasses.asdict(painting) for painting in bench.paintings]
                chosen.out.write_text(json.dumps(shown, indent=1, default=str))
    if not bench.paintings:
        sys.exit("Nothing was measured.")
    report(judged(bench.paintings, quick) + rows, chosen.check)


def _servers(bench: Bench, cards: str, all_flags: Sequence[str]) -> Iterator[tuple[str, Session]]:
    """A card and a server for it; one that does not start is a prompt that is lost."""
    for flags, card in itertools.product(all_flags, cards.split(",")):
        if not bench.in_time(where(card, flags)):
            continue
        try:
            with bench.session(card, flags) as session:
                yield card, session
        except RuntimeError as error:
            bench.note(Painting(where(card, flags), OURS, 1, "lost", error=str(error)))


def _measure(bench: Bench, chosen: argparse.Namespace) -> Iterator[Row]:
    """What `turns` finds; the rest is judged by what was painted."""
    scale, quick = (bench.steps, bench.side), bench.quick
    parts = {part for part in PARTS if getattr(chosen, part)} or {"speeds", "first"}
    if "loras" in parts:
        write_lora(bench.scratch / "models", small=quick)
    if "pictures" in parts:
        write_control_net(bench.scratch / "models", small=quick)
    cards = "free" if quick else chosen.cards or (CARDS if "speeds" in parts else TURNS_CARDS)
    all_flags = chosen.flags or (FLAGS if "speeds" in parts and not quick else [""])
    for card, session in _servers(bench, cards, all_flags) if parts != {"first"} else ():
        if "speeds" in parts:
            budgets = [0.0, 8.0, 4.0, 1.0] if card == "free" else [0.0, float(card) - 1]
            if chosen.budgets:
                budgets = [float(budget) for budget in chosen.budgets.split(",")]
            side_by_side(bench, session, budgets, list(filter(None, chosen.peers.split(","))))
        if "loras" in parts:
            yield from turns.with_loras(session, *scale, not quick)
        if "pictures" in parts:
            yield from turns.with_pictures(session, *scale, not quick)
        if "turns" in parts:
            rounds = chosen.rounds or (2 if quick else 20)
            yield from turns.cancelled(session, *scale)
            if bench.counter:
                yield from turns.under_pressure(session, *scale)
            given = (rounds, not quick, bench.in_time)
            yield from turns.in_turns(session, *scale, *given)
        if "soak" in parts:
            prompts = chosen.prompts or (20 if quick else 200)
            yield from turns.soak(session, bench.side, prompts, bench.in_time)
    if "first" in parts and bench.in_time("first prompts", FIRST_SECONDS):
        first_prompts(bench)


if __name__ == "__main__":
    main()
