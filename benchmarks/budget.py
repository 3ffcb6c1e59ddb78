"""The VRAM budget on a card: kept, how fast within it, and what others do with as much.

Full-size random weights as the loader leaves them: prepared files in --scratch (27 GB), mapped, of
which what travels at every step is pinned as it travels. Whole runs at 1024x1024 under every
budget, the smallest ones at 1024 and 2048, then steps of denoising: nothing resident against the
copies and the resident step, everything resident against no streaming at all, all of them against
the prediction, and the peers of `budget_peers` under the same budget. --quick runs small models on
the CPU, where nothing is measured, to show that the script works.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from majicflux.engine.errors import BudgetError
from majicflux.engine.flux.conditioning import conditions_of
from majicflux.engine.flux.geometry import ClipGeometry, FluxGeometry, T5Geometry
from majicflux.engine.flux.text_encoders import TextEmbedding, TextEncoders, build_text_encoders
from majicflux.engine.flux.transformer import DiT, build_flux_dit
from majicflux.engine.flux.vae import VAE, build_vae
from majicflux.engine.flux.velocity import flux_velocity
from majicflux.engine.plan.measure import copy_rate
from majicflux.engine.plan.plan import DENOISE
from majicflux.engine.plan.split import RING_BLOCKS
from majicflux.engine.plan.units import GB
from majicflux.engine.quant.compute import choose_compute
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.engine.run.pipeline import Pipeline, paint
from majicflux.engine.run.request import GenerationRequest
from majicflux.host.standalone import make_patcher
from majicflux.lab.steps import GUIDANCE, Case, fill_randomly, wait_for
from majicflux.loaders.weight_cache import convert_into_cache

from . import budget_peers
from .measuring import relative_error
from .step import BFLOAT16, random_weights
from .table import Row, report

BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16, 24)  # GB
SMALLEST = {1024: (0.6, 1.0), 2048: (1.1, 1.6)}  # side: GB allocated and reserved, at most
STEPS = 4  # of each run
PASSES = 6  # of a timed run of steps
PEER_BUDGET = 8
GOALS = {"DiffSynth low VRAM": 7.0, "ComfyUI fp8 low VRAM": 2.0}  # times our speed
SMALL = FluxGeometry(hidden=256, double_blocks=2, single_blocks=4, text_width=64)
SMALL_T5 = T5Geometry(width=64, mlp_width=128, layers=2, heads=2, head_dim=32, vocabulary=1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small version, for any CPU")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--precision", choices=PRECISIONS, default="float8_e4m3fn")
    parser.add_argument("--scratch", type=Path, help="where the prepared files are kept")
    parser.add_argument("--parts", default="budgets,steps,peers", help="what to measure")
    chosen = parser.parse_args()
    if not chosen.quick and not torch.cuda.is_available():
        sys.exit("not measured: no CUDA card here; --quick shows that the script works")
    device = torch.device("cpu", 0) if chosen.quick else torch.device("cuda", 0)
    rows: list[Row] = []
    parts = chosen.parts.split(",")
    with tempfile.TemporaryDirectory(dir=chosen.scratch) as scratch, torch.inference_mode():
        pipeline = random_pipeline(chosen.precision, device, chosen.quick, Path(scratch))
        print(pipeline.compute.report)
        if "budgets" in parts:
            rows += budgets(pipeline, chosen.quick)
        if "steps" in parts:
            rows += steps(pipeline, device, chosen.quick)
        if "peers" in parts:
            rows += peers(pipeline, device, chosen.quick)
    report(rows, chosen.check)


def random_pipeline(precision: str, device: torch.device, quick: bool, folder: Path) -> Pipeline:
    geometry, t5 = (SMALL, SMALL_T5) if quick else (FluxGeometry(), T5Geometry())
    clip = ClipGeometry(mlp_width=64, layers=2) if quick else ClipGeometry()
    dit = build_flux_dit(geometry, PRECISIONS[precision])
    parts = (dit, build_text_encoders(clip, t5, BFLOAT16), build_vae(BFLOAT16))
    for name, weights in zip(("dit", "text encoders", "vae"), parts, strict=True):
        convert = partial(fill_randomly, weights, device)
        if not convert_into_cache(weights, folder / f"{name}.majicflux", convert):
            sys.exit(f"not measured: {folder} takes no prepared weights; choose another --scratch")
    one, two, three = (make_patcher(weights, device, "") for weights in parts)
    return Pipeline(
        DiT(parts[0], one, geometry, PRECISIONS[precision]),
        TextEncoders(parts[1], two, Letters(), Letters()),
        VAE(parts[2], three, BFLOAT16),
        None,
        choose_compute(dit.module, device, "auto", BFLOAT16),
    )


class Letters:
    """A tokenizer whose tokens are letters."""

    pad_token_id, unk_token_id = 0, -1

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> SimpleNamespace:
        ids = [ord(letter) % 999 for letter in text]
        return SimpleNamespace(input_ids=[1, *ids, 2] if add_special_tokens else ids)


def budgets(pipeline: Pipeline, quick: bool) -> Iterator[Row]:
    """Whole runs: the peak of the allocator against the budget, and whether bits depend on it."""
    print("| GB | size | peak, GB | allocated | s a step | moved a step | bits | phases: GB, s |")
    print("|---|---|---|---|---|---|---|---|")
    first: dict[int, Tensor] = {}  # latents by the size of the picture
    jobs = [(float(budget), 1024) for budget in BUDGETS]
    jobs += [(_smallest(pipeline, side), side) for side in SMALLEST]
    for budget, side in [(2.0, 64)] if quick else jobs:
        request = GenerationRequest("a cat", 1, STEPS, GUIDANCE, side, side)
        limited = _with_budget(pipeline, budget)
        for _ in range(2):  # the first compiles kernels, and is held to the budget too
            if not quick:
                torch.cuda.reset_peak_memory_stats()
            limited.text_encoders.forget()
            limited.dit.last_conditions.forget()
            try:
                _, latents, found = paint(limited, request, lambda *_: None, lambda: None)
            except BudgetError as error:
                print(f"| {budget:.2f} | {side} | {error} |")
                break
            assert torch.isfinite(latents).all()
            before = first.setdefault(side, latents)
            apart = relative_error(latents, before)
            bits = "same" if torch.equal(before, latents) else f"{apart:.1e} apart"
            if found.peak_bytes is None:
                continue
            peak, allocated = found.peak_bytes / GB, torch.cuda.max_memory_allocated() / GB
            denoising = next(phase for phase in found.stages if phase.name == DENOISE)
            phases = ", ".join(
                f"{phase.label} {(phase.peak_bytes or 0) / GB:.2f}, {phase.seconds:.2f}"
                for phase in found.stages
            )
            print(
                f"| {budget:.2f} | {side} | {peak:.3f} | {allocated:.2f} "
                f"| {denoising.seconds / STEPS:.3f} "
                f"| {denoising.moved_bytes / STEPS / GB:.2f} | {bits} | {phases} |"
            )
            name = f"peak at {side}x{side} under {budget:.2f} GB"
            bar = budget if budget in BUDGETS else SMALLEST[side][1]
            yield Row(name, peak, "GB", bar=bar)
            if budget not in BUDGETS:
                yield Row(f"of it allocated, {name}", allocated, "GB", bar=SMALLEST[side][0])


def _smallest(pipeline: Pipeline, side: int) -> float:
    request = GenerationRequest("", 0, STEPS, GUIDANCE, side, side)
    return pipeline.plan(request.workload).smallest_bytes / GB


def _with_budget(pipeline: Pipeline, budget_gb: float) -> Pipeline:
    parts = (pipeline.dit, pipeline.text_encoders, pipeline.vae)
    return Pipeline(*parts, int(budget_gb * GB), pipeline.compute)


def steps(pipeline: Pipeline, device: torch.device, quick: bool) -> Iterator[Row]:
    """Seconds of a step with all, a half and nothing resident."""
    weights = pipeline.dit.weights
    ring = RING_BLOCKS * weights.largest_bytes
    # In turns, because a card that has just begun to work is faster or slower than later on.
    turns = [
        [_seconds(pipeline, device, 1.0, ring, quick, streamed) for streamed in (False, True)]
        for _ in range(1 if quick else 5)
    ]
    resident, kept = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
    half = _seconds(pipeline, device, 0.5, ring, quick)
    nothing = _seconds(pipeline, device, 0.0, ring, quick)
    print(
        f"no streaming {resident:.4f} s, all resident {kept:.4f}, half {half:.4f}, 0 {nothing:.4f}"
    )
    if quick:
        return
    yield Row("all resident", kept, "s", resident, "no streaming", bar=1.01 * resident)
    copy = sum(block.nbytes for block in weights.blocks) / copy_rate(device)
    print(f"copying all blocks at the pinned rate: {copy:.4f} s")
    nothing_peer, half_peer = max(copy, resident), max(copy / 2, resident)
    yield Row("nothing resident", nothing, "s", nothing_peer, "copy or step", 1.15 * nothing_peer)
    yield Row("half resident", half, "s", half_peer, "half the copy or step", 1.1 * half_peer)
    job = GenerationRequest("", 0, STEPS, GUIDANCE, 1024, 1024).workload
    pipeline.denoise.measure()
    predicted = pipeline.plan(job, [pipeline.denoise]).seconds
    assert predicted is not None
    for name, measured, expected in (
        ("all", kept, predicted), ("half", half, max(copy / 2, predicted)),
        ("nothing", nothing, max(copy, predicted)),
    ):  # fmt: skip
        off = 100 * abs(expected / measured - 1)
        yield Row(f"prediction off, {name} resident ({expected:.4f} s)", off, "%", bar=15)


def _seconds(
    pipeline: Pipeline,
    device: torch.device,
    share: float,
    ring: int,
    quick: bool,
    streamed: bool = True,
) -> float:
    """Of one of several steps that follow each other, with this share of the blocks resident."""
    case, weights = _case(pipeline, device, quick), pipeline.dit.weights
    passing = sum(block.footprint for block in weights.blocks)
    weights.release(float("inf"))
    weights.keep_resident(device, weights.root.footprint + share * passing)
    sigmas = case.sigma[None]
    computing, module = pipeline.compute, weights.module
    with (
        weights.running_on(device, ring_bytes=ring),
        computing.applied_to(module, device),
    ):
        given = (BFLOAT16, device, case.latents.dtype, sigmas)
        (conditions,) = conditions_of(module, [case.text], GUIDANCE, *given)
        velocity = flux_velocity(module, conditions)
        velocity(case.latents, case.sigma)
    pipeline.dit.patcher.pin()
    with (
        computing.applied_to(module, device),
        weights.running_on(device, passes=PASSES, ring_bytes=ring) if streamed else _nothing(),
    ):
        velocity(case.latents, case.sigma)
        wait_for(device)
        start = time.perf_counter()
        for _ in range(PASSES - 1):
            velocity(case.latents, case.sigma)
        wait_for(device)
        seconds = (time.perf_counter() - start) / (PASSES - 1)
    weights.release(float("inf"))
    return seconds


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def peers(pipeline: Pipeline, device: torch.device, quick: bool) -> Iterator[Row]:
    """A step under the same budget, one process, what all have in common not counted."""
    if quick:
        print("not measured: peers; run `python -m benchmarks.budget_peers --quick`")
        return
    case, geometry = _case(pipeline, device, quick), pipeline.dit.geometry
    plan = _with_budget(pipeline, PEER_BUDGET).plan(
        GenerationRequest("", 0, 20, 3.5, 1024, 1024).workload
    )
    phase = plan.stages[1]
    weights = pipeline.dit.weights
    passing = sum(block.footprint for block in weights.blocks)
    share = (phase.resident - weights.root.footprint) / passing
    ours = _seconds(pipeline, device, min(1.0, share), phase.ring, quick)
    print(f"ours under {PEER_BUDGET} GB: {ours:.4f} s, {share:.2f} of the blocks resident")
    for part in (pipeline.dit, pipeline.text_encoders):
        part.weights.forget()
    torch.manual_seed(0)
    state = {name: tensor.cpu() for name, tensor in random_weights(geometry, device).items()}
    for peer in budget_peers.peers(geometry, state, case, device, PEER_BUDGET * GB):
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(3):
            wait_for(device)
            start = time.perf_counter()
            peer.step()
            wait_for(device)
            seconds.append(time.perf_counter() - start)
        theirs = statistics.median(seconds)
        held = torch.cuda.max_memory_reserved() / GB
        print(f"{peer.name}: {theirs:.4f} s, {held:.2f} GB reserved by PyTorch")
        goal = GOALS.get(peer.name)
        yield Row("ours", ours, "s", theirs, peer.name, bar=None if not goal else theirs / goal)


def _case(pipeline: Pipeline, device: torch.device, quick: bool) -> Case:
    geometry, side = pipeline.dit.geometry, 16 if quick else 128
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    text = TextEmbedding(draw(1, 512, geometry.text_width), draw(1, geometry.pooled_width))
    return Case(draw(1, 16, side, side), text, torch.tensor(0.7))


if __name__ == "__main__":
    main()
