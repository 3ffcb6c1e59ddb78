"""What LoRAs cost: seconds of a denoising step at 1024x1024 with them and without.

Full-size random weights, all of them on the card, 8-bit products; the LoRAs are random and reach
every layer of the blocks but the modulation, as most files do. Steps follow each other as in a run,
where the host starts kernels while the card still computes the last ones. Their bars are shares of
the step without any, measured in turns in the same process; rows without a bar are what the card
itself computes, which a slow host does not change. --quick runs a small transformer on the CPU,
which only shows that the script works.
"""

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from majicflux.engine.flux.geometry import FluxGeometry, kind_of_layer
from majicflux.engine.quant.adapters import Adapters, LastTerms, adapted, bound_bytes, touched
from majicflux.engine.quant.compute import choose_compute
from majicflux.engine.quant.linear import StoredLinear
from majicflux.engine.quant.low_rank import Adapter, LowRankTerm
from majicflux.lab.steps import Case, our_step, random_case, wait_for

from .measuring import device_name
from .step import BFLOAT16, ours, random_weights
from .table import Row, options, report

TURNS, STEPS = 7, 4  # in a row
RANKS = ((), (16,), (64,), (32, 32, 32))  # of the LoRAs that are there at once
BARS = {  # times the step without
    "int8 rotated": {(16,): 1.04, (64,): 1.08, (32, 32, 32): 1.10},
    "float8_e4m3fn": {(16,): 1.10, (64,): 1.14, (32, 32, 32): 1.16},
}


def main() -> None:
    chosen = options(__doc__ or "")
    if not chosen.quick and not torch.cuda.is_available():
        sys.exit("not measured: no CUDA card here; --quick shows that the script works")
    device = torch.device("cpu") if chosen.quick else torch.device("cuda", 0)
    small = FluxGeometry(hidden=256, double_blocks=2, single_blocks=4, text_width=64)
    geometry, side = (small, 16) if chosen.quick else (FluxGeometry(), 128)
    print(device_name(device), "torch", torch.__version__)
    case = random_case(geometry, side, device)
    state = random_weights(geometry, device)
    rows = []
    with torch.inference_mode():
        for precision, bars in BARS.items():
            module = ours(geometry, precision, state, device)
            seconds, busy = in_turns(module, case, device, 1 if chosen.quick else TURNS)
            for ranks, bar in bars.items():
                name = f"{precision}, ranks {' + '.join(map(str, ranks))}"
                limit = None if chosen.quick else bar * seconds[()]
                rows.append(Row(name, seconds[ranks], "s", seconds[()], "none", bar=limit))
                rows.append(Row(f"{name}: the card", busy[ranks], "s", busy[()], "none"))
            del module
    report(rows, chosen.check)


def in_turns(
    module: Any, case: Case, device: torch.device, turns: int
) -> tuple[dict[tuple[int, ...], float], dict[tuple[int, ...], float]]:
    """Median seconds of a step with LoRAs of each of RANKS, and those that the card computes."""
    compute = choose_compute(module, device, "8-bit", BFLOAT16)
    found: dict[tuple[int, ...], list[float]] = {ranks: [] for ranks in RANKS}
    busy: dict[tuple[int, ...], float] = {}
    loras = {ranks: [(random_lora(module, rank), 0.7) for rank in ranks] for ranks in RANKS}
    terms = {ranks: LastTerms().made_of(ranks) for ranks in RANKS}  # bound once
    for ranks, adapters in loras.items():
        names = touched(adapters)
        nbytes, _ = bound_bytes(module, adapters, names, compute.method(module, device))
        print(f"{compute.choice}, ranks {ranks}: {nbytes / 1e6:.0f} MB beside the weights")
    for turn in range(turns):
        for ranks, adapters in loras.items():
            with ExitStack() as stack:
                step = stack.enter_context(our_step(module, compute, case, device))
                stack.enter_context(beside(module, adapters, device, terms[ranks]))
                for _ in range(3 if turn == 0 and turns > 1 else 1):
                    step()
                wait_for(device)
                start = time.perf_counter()
                for _ in range(STEPS):
                    step()
                wait_for(device)
                found[ranks].append((time.perf_counter() - start) / STEPS)
                if turn == turns - 1:
                    busy[ranks] = busy_seconds(step, device)
    return {ranks: statistics.median(seconds) for ranks, seconds in found.items()}, busy


def busy_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Of what a step computes, without what is between that."""
    kind = ProfilerActivity.CPU if device.type == "cpu" else ProfilerActivity.CUDA
    with profile(activities=[kind]) as profiled:
        for _ in range(STEPS):
            step()
        wait_for(device)
    events, cuda = profiled.events() or (), torch.autograd.DeviceType.CUDA
    if device.type == "cpu":
        microseconds = sum(event.self_cpu_time_total for event in events)
    else:
        microseconds = sum(event.device_time for event in events if event.device_type == cuda)
    return microseconds / 1e6 / STEPS


def beside(
    module: Any, adapters: Adapters, device: torch.device, terms: LastTerms | None = None
) -> Any:
    return adapted(module, adapters, touched(adapters), BFLOAT16, device, terms)


def random_lora(module: Any, rank: int) -> Adapter:
    """On every linear layer of the blocks but the modulation, a tenth of the weight's size."""
    terms = {}
    for name, layer in module.named_modules():
        if isinstance(layer, StoredLinear) and kind_of_layer(name) in ("attention", "mlp"):
            columns, width = layer.weight.shape
            # Drawn where it is fast, and kept where a file leaves it.
            down = torch.randn(rank, width, dtype=BFLOAT16, device=layer.weight.device).cpu()
            up = torch.randn(columns, rank, dtype=BFLOAT16, device=layer.weight.device).cpu()
            terms[name] = (LowRankTerm(down, up, 0.1 * (rank * width) ** -0.5),)
    return Adapter(terms)


if __name__ == "__main__":
    main()
