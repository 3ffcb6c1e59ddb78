"""What `majicflux bench` measures of a user's card, with random weights in place of model files."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

import psutil
import torch
from torch import Tensor

from ..engine.allocator import allocator_of
from ..engine.errors import BudgetError
from ..engine.flux.geometry import FluxGeometry
from ..engine.flux.transformer import DiT, build_flux_dit
from ..engine.offload.offloaded_module import OffloadedModule
from ..engine.plan.measure import copy_rate
from ..engine.plan.plan import DENOISE
from ..engine.plan.units import GB
from ..engine.quant.attention import PYTORCH, Attention
from ..engine.quant.compute import ComputePrecision, choose_compute
from ..engine.quant.formats import PRECISIONS
from ..engine.run.attention import int8_obstacle
from ..engine.run.pipeline import Pipeline, denoise
from ..engine.run.request import GenerationRequest
from ..engine.sizes import PIXELS_PER_LATENT
from ..host import current as host
from ..messages import say
from .doctor import machine
from .steps import GUIDANCE, Case, fill_randomly, our_step, random_case, seconds_of, wait_for

log = logging.getLogger("majicflux")
MEASURED = ("bfloat16", "float8_e4m3fn", "int8 rotated")  # weight precisions
JOINT_BLOCKS = (19, 8, 4, 2, 1)  # of as many as the card has room for; twice as many single ones
SPARE = GB  # of the card and of the RAM, beside the weights
WARM_UP, STEPS = 2, 3
RUN_STEPS = 12  # of a run in a budget; what travels is pinned in the first ones


@dataclass(frozen=True)
class Measured:
    """Seconds of a step with all weights on the card. share: of the blocks, from which the seconds
    of all were told."""

    precision: str
    computing: ComputePrecision
    seconds: float
    share: float


@torch.inference_mode()
def bench(
    device: torch.device,
    budget_gb: float | None = None,
    geometry: FluxGeometry | None = None,
    side: int = 1024,
) -> str:
    """Markdown for an issue. budget_gb: None for what the host grants; side: of the picture, in
    pixels."""
    geometry = geometry or FluxGeometry()
    case = random_case(geometry, side // PIXELS_PER_LATENT, device)
    obstacle = int8_obstacle(device, host.compute_dtype(device))
    refused = Attention(obstacle=obstacle)
    attentions = [PYTORCH] if obstacle else [PYTORCH, Attention(0)]
    given = (attentions, geometry, case, device)
    steps = [step for name in MEASURED for step in _resident(name, *given)]
    lines = [machine(), *_copies(device), *filter(None, [refused.report])]
    in_8_bits = [step for step in steps if step.precision != "bfloat16"]
    if in_8_bits:
        fastest = min(in_8_bits, key=lambda step: step.seconds)
        try:
            lines.append(_in_budget(fastest, budget_gb, geometry, case, device))
        except BudgetError as error:
            lines.append(str(error))
    return "\n".join(["```", *lines, "```", "", *_table(steps, side)])


def _resident(
    precision: str,
    attentions: Sequence[Attention],
    geometry: FluxGeometry,
    case: Case,
    device: torch.device,
) -> Iterator[Measured]:
    found = _on_the_card(precision, geometry, device)
    if found is None:
        log.info("%s: too little of the card is free", precision)
        return
    weights, share = found
    module = weights.module
    chosen = choose_compute(module, device, "auto", host.compute_dtype(device))
    for attention in attentions:
        computing = replace(chosen, attention=attention)
        with our_step(module, computing, case, device) as step:
            seconds = seconds_of(step, device, WARM_UP, STEPS) / share
        log.info("%s, %s: %.3f s", precision, computing.choice, seconds)
        yield Measured(precision, computing, seconds, share)
    weights.forget()
    allocator_of(device).give_back()


def _on_the_card(
    precision: str, geometry: FluxGeometry, device: torch.device
) -> tuple[OffloadedModule, float] | None:
    """A transformer of random weights that live there, with the share of the blocks for which there
    is room; None where there is none."""
    joint = geometry.double_blocks
    for blocks in (joint, *(some for some in JOINT_BLOCKS if some < joint)):
        some = replace(geometry, double_blocks=blocks, single_blocks=2 * blocks)
        weights = build_flux_dit(some, PRECISIONS[precision])
        if device.type == "cpu" or weights.total_bytes + SPARE <= host.free_memory(device):
            for block in weights.all_blocks:
                block.live_in(torch.empty(block.nbytes, dtype=torch.uint8, device=device))
            fill_randomly(weights, device)
            return weights, blocks / joint
    return None


def _copies(device: torch.device) -> Iterator[str]:
    if device.type == "cuda":
        pinned, other = (copy_rate(device, pinned) / 1e9 for pinned in (True, False))
        yield say(
            "copies to the card: {pinned:.1f} GB/s from pinned memory, {other:.1f} from other",
            pinned=pinned,
            other=other,
        )


def _in_budget(
    chosen: Measured,
    budget_gb: float | None,
    geometry: FluxGeometry,
    case: Case,
    device: torch.device,
) -> str:
    """A run with all weights in the machine's memory, as far as they do not stay on the card:
    predicted and measured. Raises BudgetError where the budget is too small."""
    weights = build_flux_dit(geometry, PRECISIONS[chosen.precision])
    needed = weights.total_bytes + SPARE
    if psutil.virtual_memory().available < needed:
        return say("no run: {needed:.0f} GB of RAM must be free for it", needed=needed / GB)
    fill_randomly(weights.allocate(), device)
    patcher = host.make_patcher(weights, device, "")
    dit = DiT(weights, patcher, geometry, PRECISIONS[chosen.precision])
    budget = None if budget_gb is None else int(budget_gb * GB)
    pipeline = Pipeline(dit, None, None, budget, chosen.computing)
    pipeline.denoise.measure()
    height, width = (PIXELS_PER_LATENT * side for side in case.latents.shape[2:])
    request = GenerationRequest(case.text, 0, RUN_STEPS, GUIDANCE, width, height)
    plan, ends = pipeline.plan(request.workload), []

    def on_pass(_: Tensor) -> None:
        wait_for(device)
        ends.append(time.perf_counter())

    denoise(pipeline, request, on_pass, lambda: None)
    steps = [end - start for start, end in pairwise(ends)]
    return say(
        "a run in {budget:.2f} GB, {precision}: {measured:.3f} s a step, predicted "
        "{predicted}; {visiting:.2f} GB of weights visit at each step, {pinned:.2f} of them from "
        "pinned memory",
        budget=(plan.budget_bytes or 0) / GB,
        precision=chosen.precision,
        measured=median(steps[len(steps) // 2 :]),
        predicted=f"{plan.seconds:.3f}" if plan.seconds else "?",
        visiting=plan.of(DENOISE).visiting / GB,
        pinned=weights.pinned_bytes / GB,
    )


def _table(steps: list[Measured], side: int) -> Iterator[str]:
    weights, seconds = say("weights"), say("seconds a step, {side}x{side}", side=side)
    yield f"| {weights} | {say('computing')} | {seconds} |"
    yield "|---|---|---|"
    for step in steps:
        of = "" if step.share == 1 else say(" (from {share:.0%} of the blocks)", share=step.share)
        yield f"| {step.precision} | {step.computing.choice} | {step.seconds:.3f}{of} |"
