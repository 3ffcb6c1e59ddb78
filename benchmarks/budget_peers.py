"""A Flux.1 step of DiffSynth, ComfyUI and diffusers in the modes that they have for small cards.

Weights are in CPU memory; what a peer puts on the card is its own decision, told by its own means
that the card has `budget` bytes. That excludes what the CUDA context takes, for every peer alike.
ComfyUI is looked for in COMFYUI_PATH. Run alone, this prints milliseconds and memory of each peer
at full size on a CUDA card; --quick runs a small transformer on the CPU.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from majicflux.engine.flux.geometry import FluxGeometry
from majicflux.engine.flux.text_encoders import TextEmbedding
from majicflux.lab.steps import Case, Step, wait_for

from . import peer_comfyui, peer_diffsynth
from .measuring import device_name, relative_error
from .peer_diffusers import group_offload
from .peer_setup import FLOAT8, NotMeasured, Setup
from .step import BFLOAT16, GB, State, random_weights

CPU = torch.device("cpu")
WARM_UP, STEPS = 1, 3  # `peers` has made one step before
BUILDERS: dict[str, Callable[[Setup], AbstractContextManager[Step]]] = {
    "DiffSynth low VRAM": peer_diffsynth.low_vram,
    "ComfyUI fp8 low VRAM": peer_comfyui.low_vram,
    "diffusers group offload bf16, leaves": group_offload("leaf_level", BFLOAT16),
    "diffusers group offload bf16, blocks": group_offload("block_level", BFLOAT16),
    "diffusers group offload fp8, leaves": group_offload("leaf_level", FLOAT8),
    "diffusers group offload fp8, blocks": group_offload("block_level", FLOAT8),
    "ComfyUI fp8 dynamic VRAM": peer_comfyui.dynamic_vram,
}


@dataclass(frozen=True)
class Peer:
    """`step` gives the velocity [1, 16, h, w] of the case's latents."""

    name: str
    step: Callable[[], Tensor]


def peers(
    geometry: FluxGeometry,
    state: State,
    case: Case,
    device: torch.device,
    budget_bytes: int,
    only: str = "",
) -> Iterator[Peer]:
    """One peer at a time: each is freed before the next is built, also if the caller keeps it.

    A peer has made one step when it is given out. One that cannot be built or whose first step
    fails is printed as not measured, and skipped. only: a part of the name of those wanted.
    """
    with torch.inference_mode(False):
        # Inference tensors can be neither parameters nor the data of one outside that mode.
        state = {k: v.clone() if v.is_inference() else v for k, v in state.items()}
    setup = Setup(geometry, state, case, device, budget_bytes)
    for name, build in BUILDERS.items():
        if only not in name:
            continue
        _free(device)
        held: list[Step] = []
        try:
            with build(setup) as step:
                held.append(step)
                del step
                held[0]()
                wait_for(device)
                yield Peer(name, lambda held=held: held[0]())
                held.clear()
        except NotMeasured as error:
            print(f"not measured: {name}: {error}")
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            print(f"not measured: {name}: {type(error).__name__}: {reason}")
        held.clear()
        _free(device)


def _free(device: torch.device) -> None:
    """Give back what nothing refers to, pinned memory that PyTorch keeps included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        empty_pinned = getattr(torch._C, "_host_emptyCache", None)
        if empty_pinned is not None:
            empty_pinned()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small transformer, on the CPU")
    parser.add_argument("--budget", type=float, default=8, metavar="GB", help="of 2**30 bytes")
    parser.add_argument("--only", default="", metavar="NAME", help="a part of a peer's name")
    chosen = parser.parse_args()
    if not chosen.quick and not torch.cuda.is_available():
        sys.exit("not measured: no CUDA card here; --quick shows that the script works")
    device = CPU if chosen.quick else torch.device("cuda", 0)
    small = FluxGeometry(hidden=256, double_blocks=2, single_blocks=4, text_width=64)
    geometry, side = (small, 16) if chosen.quick else (FluxGeometry(), 128)
    print(device_name(device), "torch", torch.__version__, f"budget {chosen.budget:g} GB")

    torch.manual_seed(0)
    case = Case(
        torch.randn(1, 16, side, side, device=device),
        TextEmbedding(
            torch.randn(1, 512, geometry.text_width, device=device),
            torch.randn(1, geometry.pooled_width, device=device),
        ),
        torch.tensor(0.7),
    )
    state = {name: tensor.cpu() for name, tensor in random_weights(geometry, device).items()}
    first: Tensor | None = None
    for peer in peers(geometry, state, case, device, int(chosen.budget * GB), chosen.only):
        seconds, result, memory = _measure(peer.step, device)
        first = result if first is None else first
        difference = relative_error(result, first)
        print(f"{peer.name}: {seconds * 1e3:.1f} ms, {difference:.3f} from the first{memory}")


def _measure(step: Step, device: torch.device) -> tuple[float, Tensor, str]:
    """Median seconds of a step, its result on the CPU, and the memory of the card in words."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    result = torch.empty(0)
    for _ in range(WARM_UP + STEPS):
        wait_for(device)
        start = time.perf_counter()
        result = step()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    memory = ""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        memory = (
            f"; GB: {torch.cuda.max_memory_allocated(device) / GB:.2f} allocated and "
            f"{torch.cuda.max_memory_reserved(device) / GB:.2f} reserved at most by PyTorch, "
            f"{(total - free) / GB:.2f} of the card in use"
        )
    return statistics.median(seconds[WARM_UP:]), result.float().cpu(), memory


if __name__ == "__main__":
    main()
