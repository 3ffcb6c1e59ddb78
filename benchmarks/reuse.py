"""How near pictures with reused steps are to those with all steps computed, by the demo models.

Against rivals that take as many passes for the same picture: fewer steps of deis_2m, and ComfyUI's
own EasyCache around the same transformer, its threshold searched until it takes hardly more. PSNR
and SSIM are to the picture with all steps; the last column is PSNR to where ever more steps lead.
Passes are counted, not timed: the seconds of a toy say little. ComfyUI is looked for in
COMFYUI_PATH. --quick paints one picture in 8 steps. --apart prints instead by how much each step
differs from the one before, which is what the thresholds are compared with, in every precision.
--card measures seconds on a CUDA card with full-size random weights, resident and under 4 GB; the
steps are chosen there, because random weights decide nothing. Medians of runs in turns.
"""

import argparse
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from majicflux.dev import find_comfyui
from majicflux.engine.flux.geometry import FluxGeometry
from majicflux.engine.flux.reuse import REUSES, Reuse
from majicflux.engine.flux.step_cache import StepCache, distance
from majicflux.engine.flux.transformer import DiT, build_flux_dit
from majicflux.engine.plan.units import GB
from majicflux.engine.quant.compute import choose_compute
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.engine.run import stages
from majicflux.engine.run.pipeline import Pipeline, decode, denoise, encode_prompts
from majicflux.engine.run.request import GenerationRequest
from majicflux.engine.sampling.solvers import SOLVERS
from majicflux.host.standalone import make_patcher
from majicflux.lab.steps import fill_randomly, random_case
from majicflux.loaders import demo_models
from majicflux.loaders.weight_cache import convert_into_cache

from .budget import SMALL
from .little_world import GUIDANCE, PUBLISHED, WINDOW, cases, demo_pipeline
from .step import BFLOAT16, FLOAT32

SIDE = 256
TEXT_TOKENS = 128  # the rest of 512 is padding, and would take half of the time
LIMIT_STEPS = 60
MODES = ("mild", "fast")
BARS = {("mild", 28): 1.25, ("fast", 50): 1.6}  # times as many steps as passes, at least
CHOSEN = {  # as many as both modes come to, on the card
    28: tuple(range(6, 26, 2)),
    50: tuple(n for n in range(10, 46) if n % 3),
}
TRIALS, HIGHEST = 5, 0.8  # thresholds of EasyCache
TURNS = 3  # on the card, whose pace changes by a fifth within a minute


@dataclass(frozen=True)
class Painted:
    """latents: of one picture, in model space; passes: that were computed for them."""

    latents: Tensor
    passes: int


@dataclass(frozen=True)
class Subject:
    """A prompt and a seed, and the latents where ever more steps lead."""

    pipeline: Pipeline
    request: GenerationRequest

    def painted(self, steps: int, **changes: Any) -> Painted:
        request = replace(self.request, steps=steps, **changes)
        latents, report = denoise(self.pipeline, request, lambda _: None, lambda: None)
        reuse = report.stages[-1].reuse
        return Painted(latents, steps - (0 if reuse is None else len(reuse.reused)))

    def by_easycache(self, steps: int, passes: int) -> Painted | None:
        """With so many passes, or as few more as are found; None without ComfyUI."""
        if find_comfyui() is None:
            return None
        low, high, best = 0.0, HIGHEST, None
        for _ in range(TRIALS):
            threshold = (low + high) / 2
            with _easycache(threshold) as holder:
                found = self.painted(steps)
            found = replace(found, passes=steps - holder.total_steps_skipped)
            if found.passes < passes:
                high = threshold
                continue
            low = threshold
            if best is None or found.passes < best.passes:
                best = found
            if found.passes == passes:
                break
        return best

    def picture(self, painted: Painted) -> Tensor:
        """[1, 3, side, side] in 0..1."""
        return decode(self.pipeline, painted.latents, lambda: None)[0].movedim(-1, 1)


@contextmanager
def _easycache(threshold: float) -> Iterator[Any]:
    """ComfyUI's EasyCache around the transformer, with its defaults but for the threshold."""
    if (path := str(find_comfyui())) not in sys.path:
        sys.path.append(path)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.model_sampling
    from comfy_extras import nodes_easycache

    holder = nodes_easycache.EasyCacheHolder(threshold, 0.15, 0.95, 8, False, output_channels=16)
    holder.prepare_timesteps(comfy.model_sampling.ModelSamplingFlux())
    prompt, made = uuid.uuid4(), stages.flux_velocity

    def wrapped(*given: Any) -> Callable[[Tensor, Tensor], Tensor]:
        velocity = made(*given)

        def cached(latents: Tensor, sigma: Tensor) -> Tensor:
            holder.skip_current_step = False  # as before each of its steps
            options = {"easycache": holder, "sigmas": sigma[None], "uuids": [prompt]}
            forward = lambda x, *_: velocity(x, sigma)  # noqa: E731
            given = (forward, latents.clone(), sigma[None], options)
            return nodes_easycache.easycache_forward_wrapper(*given)

        return cached

    with patch.object(stages, "flux_velocity", wrapped):
        yield holder


def subjects(pipeline: Pipeline, number: int) -> list[Subject]:
    prompts = [PUBLISHED, *(case.prompt for case in cases("English", number))][:number]
    found = []
    for seed, prompt in enumerate(encode_prompts(pipeline, prompts, lambda: None)[0]):
        text = replace(prompt, tokens=prompt.tokens[:, :TEXT_TOKENS])
        found.append(Subject(pipeline, GenerationRequest(text, seed, 20, GUIDANCE, SIDE, SIDE)))
    return found


def alike(found: Tensor, other: Tensor) -> tuple[float, float]:
    """PSNR in dB, and SSIM."""
    from kornia.metrics import ssim  # comes with ComfyUI

    decibels = -10 * (found - other).square().mean().log10()
    return decibels.item(), ssim(found, other, WINDOW).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one picture in 8 steps")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--subjects", type=int, default=4, help="prompts, each with its seed")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 28, 50])
    parser.add_argument(
        "--apart", action="store_true", help="what the thresholds are compared with"
    )
    parser.add_argument("--card", action="store_true", help="seconds, at full size")
    parser.add_argument("--scratch", type=Path, help="where --card keeps 16 GB of weights")
    chosen = parser.parse_args()
    if chosen.card:
        on_card(chosen.quick, chosen.scratch)
        return
    number, counts = (1, [8]) if chosen.quick else (chosen.subjects, chosen.steps)
    with tempfile.TemporaryDirectory() as folder:
        demo_models.write_demo_models(Path(folder))
        if chosen.apart:
            apart(Path(folder))
            return
        some = subjects(demo_pipeline(Path(folder), "bfloat16"), number)
        print(
            "| steps | | passes | steps / passes | PSNR, dB: mean | worst | SSIM | to the limit |"
        )
        print("|---|---|---|---|---|---|---|---|")
        passed = compared(some, counts)
    sys.exit(chosen.check and not passed)


def compared(some: Sequence[Subject], counts: Sequence[int]) -> bool:
    """Print a row for each way of computing so many steps; returns whether all bars are passed."""
    deis_2m, deis_3m = SOLVERS["deis_2m"], SOLVERS["deis_3m"]
    limits = [s.picture(s.painted(LIMIT_STEPS, solver=deis_3m)) for s in some]
    passed = True
    for steps in counts:
        full = [s.painted(steps) for s in some]
        pictures = [s.picture(each) for s, each in zip(some, full, strict=True)]

        def row(
            name: str,
            found: Sequence[Painted],
            steps: int = steps,
            pictures: Sequence[Tensor] = pictures,
        ) -> tuple[float, float]:
            """Prints it; returns how many times as many steps as passes there were, and PSNR."""
            made = [s.picture(each) for s, each in zip(some, found, strict=True)]
            near = [alike(*pair) for pair in zip(made, pictures, strict=True)]
            limit = mean(alike(*pair)[0] for pair in zip(made, limits, strict=True))
            passes = mean(each.passes for each in found)
            decibels = mean(each for each, _ in near)
            print(
                f"| {steps} | {name} | {passes:.1f} | {steps / passes:.2f} | {decibels:.1f} | "
                f"{min(near)[0]:.1f} | {mean(each for _, each in near):.3f} | {limit:.1f} |",
                flush=True,
            )
            return steps / passes, decibels

        row("all", full)
        for mode in MODES:
            ours = [s.painted(steps, reuse=REUSES[mode]) for s in some]
            as_many = [(s, each.passes) for s, each in zip(some, ours, strict=True)]
            times, decibels = row(f"**{mode}**", ours)
            rivals = [row("deis_2m", [s.painted(n, solver=deis_2m) for s, n in as_many])]
            easy = [s.by_easycache(steps, n) for s, n in as_many]
            if all(easy):
                rivals.append(row("EasyCache", [each for each in easy if each is not None]))
            if (bar := BARS.get((mode, steps))) is not None:
                reached = times >= bar and all(decibels > each for _, each in rivals)
                passed &= reached
                print(f"{mode} at {steps}: bar {bar} x{' MISSED' * (not reached)}", flush=True)
    return passed


def apart(folder: Path) -> None:
    """Print a row for each precision, and for each a second one in 8 bits where it has them."""
    print("| precision | products | largest | middle | smallest |\n|---|---|---|---|---|")
    for precision in ("bfloat16", "float8_e4m3fn", "int8 rotated"):
        pipeline = demo_pipeline(folder, precision)
        module, device = pipeline.dit.weights.module, pipeline.dit.patcher.device
        for mode in ("float32",) if precision == "bfloat16" else ("float32", "8-bit"):
            compute = choose_compute(module, device, mode, FLOAT32)
            (subject,) = subjects(replace(pipeline, compute=compute), 1)
            found: list[float] = []

            def noted(cache: StepCache, now: Tensor, found: list[float] = found) -> bool:
                found.append(distance(now, cache._found).item())
                return False

            with patch.object(StepCache, "_is_near", noted):
                subject.painted(28, reuse=REUSES["mild"])
            shown = " | ".join(f"{each:.3f}" for each in (max(found), median(found), min(found)))
            print(f"| {precision} | {mode} | {shown} |", flush=True)


def on_card(quick: bool, scratch: Path | None) -> None:
    """Print a row for each budget and number of steps."""
    device = torch.device("cpu") if quick else torch.device("cuda", 0)
    geometry, side = (SMALL, 64) if quick else (FluxGeometry(), 1024)
    precision, dit = (
        PRECISIONS["int8 rotated"],
        build_flux_dit(geometry, PRECISIONS["int8 rotated"]),
    )
    print("| GB | steps | computed | s, all | s | times | GB moved, all | GB moved | peak | bits |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=scratch) as folder, torch.inference_mode():
        convert_into_cache(dit, Path(folder) / "dit.majicflux", partial(fill_randomly, dit, device))
        parts = DiT(dit, make_patcher(dit, device, ""), geometry, precision), None, None
        compute = choose_compute(dit.module, device, "auto", FLOAT32 if quick else BFLOAT16)
        prompt = random_case(geometry, 16, device).text
        bits: dict[int, Tensor] = {}
        for budget in (None, 4):
            pipeline = Pipeline(*parts, budget and budget * GB, compute)
            for steps, chosen in ({4: (2,)} if quick else CHOSEN).items():
                asked = GenerationRequest(prompt, 0, steps, GUIDANCE, side, side)
                turns = (None, *(None, Reuse(chosen=chosen)) * (1 if quick else TURNS))
                done = [
                    denoise(pipeline, replace(asked, reuse=reuse), lambda _: None, lambda: None)
                    for reuse in turns  # the first one warms up
                ]
                latents, runs = done[-1][0], [report.stages[-1] for _, report in done[1:]]
                seconds, fewer = (median(each.seconds for each in runs[n::2]) for n in (0, 1))
                whole, found = runs[-2:]
                same = torch.equal(bits.setdefault(steps, latents), latents)
                moved = " | ".join(f"{each.moved_bytes / GB:.1f}" for each in (whole, found))
                print(
                    f"| {budget or 'all'} | {steps} | {steps - len(chosen)} | {seconds:.2f} "
                    f"| {fewer:.2f} | {seconds / fewer:.2f} | {moved} "
                    f"| {(found.peak_bytes or 0) / GB:.2f} of {found.planned_bytes / GB:.2f} "
                    f"| {'same' if same else 'others'} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
