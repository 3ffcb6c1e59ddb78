"""Seconds of a denoising step at 1024x1024, full-size random weights, all of them on the card.

Ours in each precision against DiffSynth's own modules in bfloat16 and with float8 weights, and
ComfyUI's own Flux in bfloat16, fp8_e4m3fn and fp8_e4m3fn_fast, all in one process on one CUDA card
with 80 GB or more. Beside the time stands the error, relative L2 against float32 throughout.
ComfyUI is looked for in COMFYUI_PATH. --quick runs a small transformer on the CPU, which only shows
that the script works.
"""

import importlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from majicflux.dev import find_comfyui
from majicflux.engine.flux.geometry import FluxGeometry
from majicflux.engine.flux.transformer import build_flux_dit, sized_flux_dit
from majicflux.engine.kernels import dispatch
from majicflux.engine.quant.compute import choose_compute
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.engine.quant.linear import StoredLinear
from majicflux.engine.quant.quantize import quantize_rows
from majicflux.lab.steps import GUIDANCE, Case, Step, our_step, random_case, seconds_of, wait_for
from majicflux.loaders.layouts import flux_dit_layout

from .measuring import device_name, relative_error
from .random_models import random_tensors
from .table import Row, options, report

WARM_UP, STEPS = 3, 7
GB = 2**30
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
State = dict[str, Tensor]

# What a step of ours is to be at most, as a share of a peer's (the goals of this benchmark).
GOALS = {
    "8-bit": {"DiffSynth bf16": 1 / 1.8, "ComfyUI fp8_e4m3fn": 1 / 1.8, "ComfyUI fast": 1 / 1.2},
    "bfloat16": {"DiffSynth bf16": 1.0},
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
    with torch.inference_mode():
        exact = diffsynth_step(_diffsynth(geometry, state, FLOAT32, device), case, device)()
        peers: dict[str, float] = {}
        for name, step in peer_steps(geometry, state, case, device):
            peers[name], latents = measure(step, device)
            print(f"{name}: {peers[name] * 1e3:.1f} ms, error {relative_error(latents, exact):.4f}")
        rows = []
        for precision, mode, triton in (
            ("bfloat16", "bfloat16", True),
            ("float8_e4m3fn", "bfloat16", True),
            ("float8_e4m3fn", "8-bit", True),
            ("int8 rotated", "bfloat16", True),
            ("int8 rotated", "8-bit", True),
            ("float8_e4m3fn", "8-bit", False),  # as on most Windows machines
            ("int8 rotated", "8-bit", False),
        ):
            if not triton:
                dispatch.triton_works = lambda _: False
            start = time.perf_counter()
            weights = ours(geometry, precision, state, device)
            wait_for(device)
            converted = time.perf_counter() - start
            computing = choose_compute(weights, device, mode, BFLOAT16)
            with our_step(weights, computing, case, device) as step:
                seconds, latents = measure(step, device)
            name = "" if triton else ", no Triton"
            print(
                f"ours {precision}{name}, {computing.report}: {seconds * 1e3:.1f} ms, "
                f"error {relative_error(latents, exact):.4f}, converted in {converted:.1f} s"
            )
            for peer, share in peers.items():
                goal = GOALS[mode].get(peer)
                bar = None if goal is None or chosen.quick or not triton else goal * share
                rows.append(
                    Row(f"{precision}, {mode} products{name}", seconds, "s", share, peer, bar=bar)
                )
            del weights
    report(rows, chosen.check)


def measure(step: Step, device: torch.device) -> tuple[float, Tensor]:
    """Median seconds of a step, and its result."""
    return seconds_of(step, device, WARM_UP, STEPS), step().float()


def random_weights(geometry: FluxGeometry, device: torch.device) -> State:
    """Every weight under its name in the file, bfloat16."""
    layout = flux_dit_layout(geometry)
    if device.type == "cpu":
        return random_tensors(layout, 0, BFLOAT16)
    state = {}
    for name, shape in layout.items():
        if len(shape) == 1:
            state[name] = torch.full(shape, float("norm" in name), dtype=BFLOAT16, device=device)
        else:
            state[name] = torch.randn(shape, dtype=BFLOAT16, device=device) * shape[1] ** -0.5
    return state


def ours(geometry: FluxGeometry, precision: str, state: State, device: torch.device) -> Any:
    """Our transformer with every weight on `device`."""
    weights = build_flux_dit(geometry, PRECISIONS[precision])
    for block in weights.all_blocks:
        block.live_in(torch.empty(block.nbytes, dtype=torch.uint8, device=device))
    renamed = diffsynth_names(state)
    for prefix, module in weights.module.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, StoredLinear) and module.scale is not None and name != "bias":
                if name == "weight":
                    source = renamed[f"{prefix}.weight"]
                    quantize_rows(source, parameter, module.scale, module.group)
            else:
                parameter.copy_(renamed[f"{prefix}.{name}"])
    return weights.module


def diffsynth_step(module: Any, case: Case, device: torch.device) -> Step:
    """DiffSynth's own call of its modules, in float32 if they are so and else in bfloat16;
    positions are float32, as in a run of ours."""
    dtype = FLOAT32 if next(module.parameters()).dtype == FLOAT32 else BFLOAT16
    from diffsynth.pipelines.flux_image import model_fn_flux_image

    def step() -> Tensor:
        return model_fn_flux_image(
            dit=module,
            latents=case.latents.to(dtype),
            timestep=(case.sigma * 1000).to(device).reshape(1),
            prompt_emb=case.text.tokens.to(dtype),
            pooled_prompt_emb=case.text.pooled.to(dtype),
            guidance=torch.full((1,), GUIDANCE, device=device),
            text_ids=torch.zeros(1, case.text.tokens.shape[1], 3, device=device),
            image_ids=image_ids(case.latents)[None],
        )

    return step


def image_ids(latents: Tensor) -> Tensor:
    """(0, row, column) of each 2x2 patch, float32 [patches, 3]."""
    rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
    ids = torch.zeros(rows, columns, 3, device=latents.device)
    ids[..., 1] = torch.arange(rows, device=latents.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=latents.device)
    return ids.reshape(-1, 3)


def peer_steps(
    geometry: FluxGeometry, state: State, case: Case, device: torch.device
) -> Iterator[tuple[str, Step]]:
    """The peers, one after the other, so that one model of theirs is there at a time."""
    for dtype in (BFLOAT16, torch.float8_e4m3fn):
        module = _diffsynth(geometry, state, dtype, device)
        name = "DiffSynth bf16" if dtype == BFLOAT16 else "DiffSynth float8 weights"
        yield name, diffsynth_step(module, case, device)
        del module
    comfyui = find_comfyui()
    if comfyui is None:
        print("not measured: no ComfyUI")
        return
    sys.path.append(str(comfyui))
    import comfy.cli_args

    comfy.cli_args.args.cpu = device.type == "cpu"
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    kinds = {
        "ComfyUI bf16": (BFLOAT16, comfy.ops.disable_weight_init),
        "ComfyUI fp8_e4m3fn": (torch.float8_e4m3fn, comfy.ops.manual_cast),
        "ComfyUI fast": (torch.float8_e4m3fn, comfy.ops.fp8_ops),
    }
    if device.type == "cpu":
        del kinds["ComfyUI fast"]  # float8 products are for cards
    for name, (dtype, operations) in kinds.items():
        g = geometry
        flux = Flux(
            in_channels=16, out_channels=16, vec_in_dim=g.pooled_width,
            context_in_dim=g.text_width, hidden_size=g.hidden, mlp_ratio=4.0, num_heads=g.heads,
            depth=g.double_blocks, depth_single_blocks=g.single_blocks, axes_dim=[16, 56, 56],
            theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
            dtype=dtype, device=device, operations=operations,
        )  # fmt: skip
        for key, parameter in flux.named_parameters():
            parameter.data.copy_(state[key.replace("_norm.weight", "_norm.scale")])
        yield name, lambda f=flux: f(
            case.latents.to(BFLOAT16), case.sigma.to(device).reshape(1),
            case.text.tokens.to(BFLOAT16), case.text.pooled.to(BFLOAT16),
            torch.full((1,), GUIDANCE, device=device),
        )  # fmt: skip
        del flux


def _diffsynth(
    geometry: FluxGeometry, state: State, dtype: torch.dtype, device: torch.device
) -> Any:
    """DiffSynth's own modules: plain, or under its VRAM management with all weights in 8 bits."""
    from diffsynth.configs.vram_management_module_maps import VRAM_MANAGEMENT_MODULE_MAPS
    from diffsynth.core.vram.layers import enable_vram_management
    from diffsynth.models.flux_dit import FluxJointTransformerBlock, FluxSingleTransformerBlock

    module = sized_flux_dit(geometry, FluxJointTransformerBlock, FluxSingleTransformerBlock)
    renamed = diffsynth_names(state)
    copies = {name: tensor.to(device, dtype, copy=True) for name, tensor in renamed.items()}
    module.load_state_dict(copies, assign=True)
    if dtype.itemsize > 1:
        return module.eval()
    config: dict[str, Any] = {}
    for state_name in ("offload", "onload", "preparing", "computation"):
        config[f"{state_name}_dtype"] = BFLOAT16 if state_name == "computation" else dtype
        config[f"{state_name}_device"] = device
    names = VRAM_MANAGEMENT_MODULE_MAPS["diffsynth.models.flux_dit.FluxDiT"]
    module = enable_vram_management(
        module, {imported(a): imported(b) for a, b in names.items()}, config, vram_limit=None
    )
    return module.eval()


def imported(path: str) -> Any:
    """A class by its full name."""
    owner, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(owner), name)


def diffsynth_names(state: State) -> State:
    """The weights under the names of DiffSynth's modules."""
    from diffsynth.utils.state_dict_converters.flux_dit import FluxDiTStateDictConverter

    return FluxDiTStateDictConverter(state)


if __name__ == "__main__":
    main()
