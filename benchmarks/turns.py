"""One ComfyUI server that is used as servers are: with others, under pressure, cancelled, all day.

For `server.py`. Each function paints with the server of a session and yields rows for the table.
"""

import itertools
import random
import statistics
import threading
from collections.abc import Callable, Iterator
from typing import Any

from .card_counter import grabbing
from .flux_graphs import PROMPT, SEEN, Graph, native, native_seeing, ours, ours_seeing
from .painting import PROMPT_SECONDS, Held, Painting, Session
from .table import Row

InTime = Callable[[str, float], bool]  # whether what is named, and takes so many seconds, may begin
PEER = "fp8_e4m3fn"
# What a server may hold more of, as `Session.held` has it, in GiB.
GROWTH = (("card", 0.1), ("resident memory", 0.1), ("of that not mapped", None))
SLOWER = 1.1  # times as long as alone, at most
SEEING_FASTER = 1.6  # than ComfyUI, with a picture
GRAB_GIB = 4
LACKS_MEMORY = ("majicflux.TooLittleVramError", "majicflux.OutOfVramError")  # what it may say then
SETTLED, SETTLED_ROUNDS = 10, 3  # prompts and rounds, after which a server may not grow
ROUND_SECONDS, PROMPT_ENDS = 20, 10  # that must be left for another round, another prompt
LORA_STEPS = (("first", 0.0), ("without", 0.0), ("added", 1.0), ("strength changed", 0.5),
              ("again", 0.5))  # fmt: skip
KINDS = {  # of the soak: how often in ten, how it may end
    "plain": (3, {"success"}),
    "batch": (1, {"success"}),
    "cfg": (1, {"success"}),
    "native": (1, {"success"}),
    "after /free": (1, {"success"}),
    "cancelled": (1, {"success", "interrupted"}),
    "refused": (1, {"refused"}),
    "error": (1, {"error"}),
}


def in_turns(
    session: Session, steps: int, side: int, rounds: int, judged: bool, in_time: InTime
) -> Iterator[Row]:
    """Ours and ComfyUI's Flux, twice each in each round; the second as fast as alone."""
    seeds = itertools.count(1000)

    def twice(what: str) -> list[Painting]:
        graphs: dict[str, Callable[[int], Graph]] = {
            "ours": lambda seed: ours(seed, steps, side),
            PEER: lambda seed: native(seed, steps, side, PEER),
        }
        return [
            session.paint(graphs[what](next(seeds)), f"turns: {what}", number) for number in (1, 2)
        ]

    alone: dict[str, float] = {}
    failed = 0
    for what in ("ours", PEER):
        session.free(forget=True)
        painted = twice(what) + twice(what)
        failed += sum(painting.status != "success" for painting in painted)
        alone[what] = min(painting.seconds for painting in painted)
    again: dict[str, list[float]] = {what: [] for what in alone}
    early, number = (0.0, 0.0, 0.0), 0
    while number < rounds and (number < SETTLED_ROUNDS or in_time("more rounds", ROUND_SECONDS)):
        for what, seconds in again.items():
            painted = twice(what)
            failed += sum(painting.status != "success" for painting in painted)
            seconds.append(painted[1].seconds)
        number += 1
        if number == min(SETTLED_ROUNDS, rounds - 1):
            early = session.held_idle()
    place = f"{session.where}, {number} rounds in turns"
    yield Row(f"{place}: failed", failed, "", bar=0)
    for what, seconds in again.items():
        bar = round(SLOWER * alone[what], 2) if judged else None
        yield Row(f"{place}: {what}", statistics.median(seconds), "s", alone[what], "alone", bar)
    yield from _growth(place, early, session.held_idle())


def with_loras(session: Session, steps: int, side: int, judged: bool) -> Iterator[Row]:
    """A LoRA is added, and its strength changed: whole prompts of ours beside ComfyUI's."""
    seeds = itertools.count(2000)
    graphs: dict[str, Callable[[int, float], Graph]] = {
        "ours": lambda seed, lora: ours(seed, steps, side, lora=lora),
        PEER: lambda seed, lora: native(seed, steps, side, PEER, lora),
    }
    seconds: dict[str, dict[str, float]] = {}
    failed = 0
    for what, graph in graphs.items():
        session.free(forget=True)
        seconds[what] = {}
        for number, (step, lora) in enumerate(LORA_STEPS):
            painting = session.paint(graph(next(seeds), lora), f"loras: {what}", number + 1)
            failed += painting.status != "success"
            seconds[what][step] = painting.seconds
    yield Row(f"{session.where}, with a LoRA: failed", failed, "", bar=0)
    for step, theirs in seconds[PEER].items():
        bar = theirs if judged and step not in ("first", "without") else None
        name = f"{session.where}, LoRA: {step}"
        yield Row(name, seconds["ours"][step], "s", theirs, PEER, bar)


def with_pictures(session: Session, steps: int, side: int, judged: bool) -> Iterator[Row]:
    """A picture as a reference, and through a control net: ours beside ComfyUI's, each twice."""
    seeds = itertools.count(3000)
    failed = 0
    for seen in SEEN:
        seconds: dict[str, float] = {}
        for what in ("ours", PEER):
            session.free(forget=True)
            for number in (1, 2):
                given = next(seeds), steps, side
                graph = (
                    ours_seeing(seen, *given)
                    if what == "ours"
                    else native_seeing(seen, *given, PEER)
                )
                painting = session.paint(graph, f"{seen}: {what}", number)
                failed += painting.status != "success"
                seconds[what] = painting.seconds
        bar = round(seconds[PEER] / SEEING_FASTER, 2) if judged else None
        yield Row(f"{session.where}, {seen}", seconds["ours"], "s", seconds[PEER], PEER, bar)
    yield Row(f"{session.where}, with a picture: failed", failed, "", bar=0)


def _growth(place: str, early: Held, late: Held) -> Iterator[Row]:
    for (name, bar), before, now in zip(GROWTH, early, late, strict=True):
        yield Row(f"{place}: growth, {name}", round(now - before, 3), "GiB", bar=bar)


def under_pressure(session: Session, steps: int, side: int) -> Iterator[Row]:
    """Another process takes memory in the middle of a run: the same bits, or the sentence."""
    undisturbed = [session.paint(ours(77, steps, side), "undisturbed", n) for n in (1, 2)][1]
    seconds = undisturbed.seconds
    with grabbing(GRAB_GIB, 2 * seconds + 5) as grab:
        disturbed = _meanwhile(
            seconds / 3, grab, lambda: session.paint(ours(77, steps, side), "disturbed")
        )
    said = disturbed.error.startswith(LACKS_MEMORY)
    right = said or (undisturbed.pixels and disturbed.pixels == undisturbed.pixels)
    place = f"{session.where}, {GRAB_GIB} GiB taken in a run"
    if not right:
        print(disturbed.away_from(undisturbed), flush=True)
    yield Row(f"{place}: neither the same bits nor the sentence", not right, "", bar=0)
    yield _repeated(session, steps, side, undisturbed, "after the pressure")


def cancelled(session: Session, steps: int, side: int) -> Iterator[Row]:
    """/interrupt inside each phase, then the same picture as before; and after /free."""
    session.paint(ours(76, steps, side), "warm")
    reference = session.paint(ours(77, steps, side, prompt="a cat"), "reference")
    begin, ran_on = 0.0, 0
    for number, (phase, seconds) in enumerate(reference.phases):
        # A new prompt, or its encoding is remembered.
        graph = ours(78, steps, side, prompt=f"a cat and {number} dogs")
        stopped = _meanwhile(
            begin + seconds / 2,
            lambda: session.server.post("/interrupt", {}),
            lambda graph=graph, phase=phase: session.paint(graph, f"cancelled: {phase}"),
        )
        ran_on += stopped.status != "interrupted"
        begin += seconds
        yield _repeated(session, steps, side, reference, f"after a cancel in {phase}", "a cat")
    # The last phase may be over before the cancel arrives.
    yield Row(f"{session.where}: cancels that came to nothing", ran_on, "of 3", bar=1)
    for forget in (False, True):
        session.free(forget)
        name = f"after /free{', everything' * forget}"
        yield _repeated(session, steps, side, reference, name, "a cat")


def _repeated(
    session: Session, steps: int, side: int, before: Painting, name: str, prompt: str = PROMPT
) -> Row:
    again = session.paint(ours(77, steps, side, prompt=prompt), name)
    differs = not before.pixels or again.pixels != before.pixels
    return Row(f"{session.where}, {name}: another picture", differs, "", bar=0)


def _meanwhile(seconds: float, do: Callable[[], object], paint: Callable[[], Painting]) -> Painting:
    timer = threading.Timer(seconds, do)
    timer.start()
    try:
        return paint()
    finally:
        timer.cancel()
        timer.join()


def soak(session: Session, side: int, prompts: int, in_time: InTime) -> Iterator[Row]:
    """Mixed prompts, small and short; none lost, and nothing held that was not held before."""
    chosen, lost, number = random.Random(0), 0, 0
    held: dict[int, Held] = {}
    ten = [kind for kind, (times, _) in KINDS.items() for _ in range(times)]
    for number in range(1, prompts + 1):
        last = number == prompts or not in_time("more prompts", PROMPT_ENDS)
        if number % len(ten) == 1:
            chosen.shuffle(ten)
        kind = ten[number % len(ten)]
        graph = _mixed(kind, number, chosen, side)
        if kind == "after /free":
            session.free(forget=chosen.random() < 0.5)
        # What is interrupted when nothing runs any more is nothing.
        wait = chosen.uniform(0, 1) if kind == "cancelled" else PROMPT_SECONDS
        painting = _meanwhile(
            wait,
            lambda: session.server.post("/interrupt", {}),
            lambda graph=graph, kind=kind, number=number: session.paint(graph, kind, number),
        )
        lost += painting.status not in KINDS[kind][1]
        if number in (SETTLED, prompts // 2) or last:
            held[number] = session.held_idle()
        if last:
            break
    place = f"{session.where}, {number} mixed prompts"
    yield Row(f"{place}: lost", lost, "", bar=0)
    for early in [*held][:-1]:
        yield from _growth(f"{place}, since the {early}th", held[early], held[number])


def _mixed(kind: str, seed: int, chosen: random.Random, side: int) -> Graph:
    small = chosen.choice((side // 4, side // 2, 3 * side // 4))
    sample: dict[str, Any] = {
        "batch": {"batch_size": 2},
        "cfg": {"cfg": 3.0, "negative_prompt": "blurry"},
        "refused": {"steps": 0},
        "error": {"strength": 0.5},  # without a picture to begin from
    }.get(kind, {})
    if kind == "native":
        return native(seed, 2, side // 2, PEER)
    graph = ours(seed, 2, small, chosen.choice((0, 2, 4)))
    graph["5"]["inputs"].update(sample)
    return graph
