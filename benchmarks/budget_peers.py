"""A Flux.1 step of DiffSynth, ComfyUI and diffusers in the modes that they have for small cards.

Weights are in CPU memory; what a peer puts on the card is its own decision, told by its own means
that the card has `budget` bytes. That excludes what the CUDA context takes, for every peer alike.
ComfyUI is looked for in COMFYUI_PATH. Run alone, this prints milliseconds and memory of each peer
at full size on a CUDA card; --quick runs a small transformer on the CPU.
"""

import argparse
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from majicflux.dev import find_comfyui
from majicflux.engine.flux.geometry import FluxGeometry
from majicflux.engine.flux.text_encoders import TextEmbedding
from majicflux.engine.flux.transformer import sized_flux_dit

from .step import (
    BFLOAT16,
    GB,
    GUIDANCE,
    Case,
    State,
    Step,
    _diffsynth_names,
    _name,
    _named,
    _relative,
    _wait,
    diffsynth_step,
    image_ids,
    random_weights,
)

FLOAT8 = torch.float8_e4m3fn
CPU = torch.device("cpu")
WARM_UP, STEPS = 1, 3  # `peers` has made one step before
AIMDO_HEADROOM = 256 * 2**20  # bytes that ComfyUI's dynamic mode leaves free on any card


@dataclass(frozen=True)
class Peer:
    """`step` gives the velocity [1, 16, h, w] of the case's latents."""

    name: str
    step: Callable[[], Tensor]


class NotMeasured(Exception):
    """What a peer needs is not here; the message says what."""


@dataclass(frozen=True)
class Setup:
    """What a peer is built from. `state` is on the CPU in bfloat16, under the file's names."""

    geometry: FluxGeometry
    state: State
    case: Case
    device: torch.device
    budget: int  # bytes

    @cached_property
    def float8(self) -> State:
        """The weights of a file in float8_e4m3fn without scales."""
        with torch.inference_mode(False), torch.no_grad():
            return {name: tensor.to(FLOAT8) for name, tensor in self.state.items()}


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
                _wait(device)
                yield Peer(name, lambda held=held: held[0]())
                held.clear()
        except NotMeasured as error:
            print(f"not measured: {name}: {error}")
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            print(f"not measured: {name}: {type(error).__name__}: {reason}")
        held.clear()
        _free(device)


# DiffSynth and diffusers run under no_grad, ComfyUI under inference_mode. The weights are moved in
# the mode that the program has, whatever the caller's, so the modes are those of the functions.


@contextmanager
def _diffsynth_low_vram(setup: Setup) -> Iterator[Step]:
    step = diffsynth_step(_diffsynth_module(setup), setup.case, setup.device)
    yield torch.inference_mode(False)(torch.no_grad()(step))


@torch.inference_mode(False)
@torch.no_grad()
def _diffsynth_module(setup: Setup) -> Any:
    """DiffSynth's modules as its "dynamic VRAM management" has them.

    Every layer starts in CPU memory as float8. Before it computes, it moves to the card for good
    while less than `vram_limit` GB of the card are used; else a bfloat16 copy is made for the call.
    """
    from diffsynth.configs.vram_management_module_maps import VRAM_MANAGEMENT_MODULE_MAPS
    from diffsynth.core.vram.layers import enable_vram_management
    from diffsynth.models.flux_dit import FluxJointTransformerBlock, FluxSingleTransformerBlock

    module = sized_flux_dit(setup.geometry, FluxJointTransformerBlock, FluxSingleTransformerBlock)
    module.requires_grad_(False)
    module.load_state_dict(_diffsynth_names(setup.float8), assign=True)
    # One spelling of the device everywhere: the layers compare these values.
    card = str(setup.device)
    config: dict[str, Any] = {
        "offload_dtype": FLOAT8,
        "offload_device": "cpu",
        "onload_dtype": FLOAT8,
        "onload_device": "cpu",
        "preparing_dtype": FLOAT8,
        "preparing_device": card,
        "computation_dtype": BFLOAT16,
        "computation_device": card,
    }
    names = VRAM_MANAGEMENT_MODULE_MAPS["diffsynth.models.flux_dit.FluxDiT"]
    module = enable_vram_management(
        module,
        {_named(a): _named(b) for a, b in names.items()},
        config,
        vram_limit=_diffsynth_limit(setup),
    )
    for layer in module.modules():  # as its pipeline does before the first step
        onload = getattr(layer, "onload", None)
        if onload is not None:
            onload()
    return module.eval()


def _diffsynth_limit(setup: Setup) -> float | None:
    """GB (2**30): the card's size less 0.5, as its documentation advises.

    DiffSynth compares it with all that is in use, so what is used outside PyTorch's allocator is
    added. On the CPU it cannot look: None, which "prepares" every layer.
    """
    if setup.device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(setup.device)
    outside = total - free - torch.cuda.memory_reserved(setup.device)
    return (setup.budget + outside) / GB - 0.5


@contextmanager
def _comfyui_low_vram(setup: Setup) -> Iterator[Step]:
    """ModelPatcher: some layers on the card, the others copied through two streams when they run.

    What --disable-dynamic-vram gives on NVIDIA. The host's sampling code loads the model, told by
    torch.cuda.mem_get_info that the card has the budget, so that every sum is the host's own: the
    budget less what it foresees for working memory (1.4 GB for 1024x1024) and its buffers.
    Weights that stay behind are pinned by the host. Unlike a started ComfyUI, this process has
    PyTorch's own allocator instead of cudaMallocAsync.
    """
    comfy = _comfyui(setup.device)
    with ExitStack() as card:
        if setup.device.type == "cuda":
            card.enter_context(_card_of(setup.budget, setup.device))
        patcher = _comfyui_patcher(comfy, setup)
    try:
        yield _comfyui_step(patcher, setup)
    finally:
        _comfyui_unload(comfy, patcher)


@contextmanager
def _comfyui_dynamic(setup: Setup) -> Iterator[Step]:
    """ModelPatcherDynamic over comfy-aimdo, the host's default on NVIDIA with PyTorch 2.8.

    The budget is given as with --reserve-vram, which sets the headroom that comfy-aimdo leaves: all
    of the card but the budget, and what it leaves on every card. comfy-aimdo hooks the driver's
    allocations of the whole process from here on, so this peer is the last.
    """
    if setup.device.type != "cuda":
        raise NotMeasured("it needs a CUDA card")
    comfy = _comfyui(setup.device)
    import comfy_aimdo.control as control
    import comfy_aimdo.model_vbar

    if comfy_aimdo.model_vbar.lib is None:  # bound once, at the import
        raise NotMeasured("comfy-aimdo does not load, or ComfyUI was imported before it")
    arguments = comfy.cli_args.args
    headroom = int(arguments.vram_headroom * GB)
    if not control.devctxs and not control.init_devices([(setup.device.index, headroom)]):
        raise NotMeasured("comfy-aimdo does not work with this card")
    _, total = torch.cuda.mem_get_info(setup.device)
    unseen = torch.cuda.memory_reserved(setup.device) - control.get_total_vram_usage()
    control.init(
        simple_vram_headroom=total - setup.budget + AIMDO_HEADROOM + max(0, unseen),
        nvml_pressure=not arguments.disable_nvml_pressure,
    )
    patching = comfy.model_patcher
    with (
        patch.object(comfy.memory_management, "aimdo_enabled", True),
        patch.object(patching, "CoreModelPatcher", patching.ModelPatcherDynamic),
    ):
        patcher = _comfyui_patcher(comfy, setup)
        patcher.set_in_use_by_current_prompt(True)
        try:
            yield _comfyui_step(patcher, setup)
        finally:
            _comfyui_unload(comfy, patcher)


def _comfyui(device: torch.device) -> Any:
    """The package `comfy`, told in time which device it has."""
    path = find_comfyui()
    if path is None:
        raise NotMeasured("no ComfyUI")
    if str(path) not in sys.path:
        sys.path.append(str(path))
    import comfy.cli_args

    if "comfy.model_management" not in sys.modules:
        comfy.cli_args.args.cpu = device.type == "cpu"
        if device.type == "cuda":
            import comfy_aimdo.control

            comfy_aimdo.control.init()  # loads its library, which the imports below look for
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sampler_helpers
    import comfy.sd

    return comfy


@torch.inference_mode()
def _comfyui_patcher(comfy: Any, setup: Setup) -> Any:
    """The host's own loader for a float8 file, then its own preparation of sampling."""
    patcher = comfy.sd.load_diffusion_model_state_dict(
        dict(setup.float8), model_options={"dtype": FLOAT8, "load_device": setup.device}
    )
    if patcher is None:
        raise NotMeasured("ComfyUI does not know the model")
    shape = list(setup.case.latents.shape)
    comfy.sampler_helpers.prepare_sampling(patcher, shape, {}, patcher.model_options)
    return patcher


def _comfyui_step(patcher: Any, setup: Setup) -> Step:
    case, device = setup.case, setup.device

    @torch.inference_mode()
    def step() -> Tensor:
        return patcher.model.diffusion_model(
            case.latents.to(BFLOAT16),
            case.sigma.to(device).reshape(1),
            context=case.text.tokens.to(BFLOAT16),
            y=case.text.pooled.to(BFLOAT16),
            guidance=torch.full((1,), GUIDANCE, device=device),
        )

    return step


@torch.inference_mode()
def _comfyui_unload(comfy: Any, patcher: Any) -> None:
    management = comfy.model_management
    print(
        f"{type(patcher).__name__} had {patcher.loaded_size() / GB:.2f} of "
        f"{patcher.model_size() / GB:.2f} GB on the card, {management.NUM_STREAMS} streams and "
        f"{management.TOTAL_PINNED_MEMORY / GB:.2f} GB pinned"
    )
    management.unload_all_models()
    management.reset_cast_buffers()


@contextmanager
def _card_of(size: int, device: torch.device) -> Iterator[None]:
    """torch.cuda.mem_get_info says what it would on a card of `size` bytes."""

    def info(_: Any = None) -> tuple[int, int]:
        return max(0, size - torch.cuda.memory_reserved(device)), size

    with patch.object(torch.cuda, "mem_get_info", info):
        yield


def _diffusers(level: str, storage: torch.dtype) -> Callable[..., AbstractContextManager[Step]]:
    """Group offloading. It has no budget: all weights travel at every step, whatever the card has.

    level: "leaf_level" or "block_level". storage: FLOAT8 adds its layerwise casting, which leaves
    the modulation layers in bfloat16. On a CUDA card the copies have a stream and pinned memory.
    """

    @contextmanager
    def build(setup: Setup) -> Iterator[Step]:
        if importlib.util.find_spec("diffusers") is None:
            raise NotMeasured("no diffusers")
        yield _diffusers_step(_diffusers_module(setup, level, storage), setup)

    return build


@torch.inference_mode(False)
@torch.no_grad()
def _diffusers_module(setup: Setup, level: str, storage: torch.dtype) -> Any:
    from diffusers import FluxTransformer2DModel
    from diffusers.hooks import apply_group_offloading

    g = setup.geometry
    with torch.device("meta"):
        module = FluxTransformer2DModel(
            in_channels=g.in_channels,
            out_channels=g.out_channels,
            num_layers=g.double_blocks,
            num_single_layers=g.single_blocks,
            attention_head_dim=g.hidden // g.heads,
            num_attention_heads=g.heads,
            joint_attention_dim=g.text_width,
            pooled_projection_dim=g.pooled_width,
            guidance_embeds=g.guidance,
        )
    module.requires_grad_(False).eval()
    # The tensors are the state's own: offloading replaces the data of a parameter, never writes it.
    module.load_state_dict(_diffusers_names(setup.state, g.hidden), assign=True)
    if storage != BFLOAT16:
        module.enable_layerwise_casting(storage_dtype=storage, compute_dtype=BFLOAT16)
    streams = setup.device.type == "cuda"
    apply_group_offloading(
        module,
        onload_device=setup.device,
        offload_device=CPU,
        offload_type=level,
        num_blocks_per_group=1,
        use_stream=streams,
        record_stream=streams,
    )
    return module


def _diffusers_step(module: Any, setup: Setup) -> Step:
    """Its result differs from the others': it rounds sigma and the guidance to bfloat16."""
    case, device = setup.case, setup.device
    _, channels, height, width = case.latents.shape
    rows, columns = height // 2, width // 2

    @torch.inference_mode(False)
    @torch.no_grad()
    def step() -> Tensor:
        patches = case.latents.reshape(1, channels, rows, 2, columns, 2)
        found = module(
            patches.permute(0, 2, 4, 1, 3, 5).reshape(1, rows * columns, -1).to(BFLOAT16),
            encoder_hidden_states=case.text.tokens.to(BFLOAT16),
            pooled_projections=case.text.pooled.to(BFLOAT16),
            timestep=case.sigma.to(device).reshape(1),
            img_ids=image_ids(case.latents),
            txt_ids=torch.zeros(case.text.tokens.shape[1], 3, device=device),
            guidance=torch.full((1,), GUIDANCE, device=device),
            return_dict=False,
        )[0]
        found = found.reshape(1, rows, columns, channels, 2, 2)
        return found.permute(0, 3, 1, 4, 2, 5).reshape(case.latents.shape)

    return step


DIFFUSERS_NAMES = {
    "time_in.": "time_text_embed.timestep_embedder.",
    "guidance_in.": "time_text_embed.guidance_embedder.",
    "vector_in.": "time_text_embed.text_embedder.",
    ".in_layer.": ".linear_1.",
    ".out_layer.": ".linear_2.",
    "txt_in.": "context_embedder.",
    "img_in.": "x_embedder.",
    "final_layer.linear.": "proj_out.",
    "final_layer.adaLN_modulation.1.": "norm_out.linear.",
    "double_blocks.": "transformer_blocks.",
    "single_blocks.": "single_transformer_blocks.",
    "img_mod.lin.": "norm1.linear.",
    "txt_mod.lin.": "norm1_context.linear.",
    "modulation.lin.": "norm.linear.",
    "img_attn.proj.": "attn.to_out.0.",
    "txt_attn.proj.": "attn.to_add_out.",
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    ".norm.query_norm.scale": ".attn.norm_q.weight",
    ".norm.key_norm.scale": ".attn.norm_k.weight",
    "img_mlp.0.": "ff.net.0.proj.",
    "img_mlp.2.": "ff.net.2.",
    "txt_mlp.0.": "ff_context.net.0.proj.",
    "txt_mlp.2.": "ff_context.net.2.",
    "linear2.": "proj_out.",
}
DIFFUSERS_PARTS = {
    "img_attn.qkv.": ["attn.to_q.", "attn.to_k.", "attn.to_v."],
    "txt_attn.qkv.": ["attn.add_q_proj.", "attn.add_k_proj.", "attn.add_v_proj."],
    "linear1.": ["attn.to_q.", "attn.to_k.", "attn.to_v.", "proj_mlp."],
}


def _diffusers_names(state: State, hidden: int) -> State:
    """The weights under diffusers' names; its own conversion knows the full width only."""
    renamed: State = {}
    for name, tensor in state.items():
        for old, new in DIFFUSERS_NAMES.items():
            name = name.replace(old, new)
        old = next((old for old in DIFFUSERS_PARTS if old in name), None)
        if old is not None:
            new = DIFFUSERS_PARTS[old]
            rows = [hidden] * (len(new) - 1)
            rows.append(tensor.shape[0] - sum(rows))
            for part, piece in zip(new, tensor.split(rows), strict=True):
                renamed[name.replace(old, part)] = piece
        elif name.startswith("norm_out."):  # scale before shift there
            renamed[name] = torch.cat(tensor.chunk(2)[::-1])
        else:
            renamed[name] = tensor
    return renamed


BUILDERS: dict[str, Callable[[Setup], AbstractContextManager[Step]]] = {
    "DiffSynth low VRAM": _diffsynth_low_vram,
    "ComfyUI fp8 low VRAM": _comfyui_low_vram,
    "diffusers group offload bf16, leaves": _diffusers("leaf_level", BFLOAT16),
    "diffusers group offload bf16, blocks": _diffusers("block_level", BFLOAT16),
    "diffusers group offload fp8, leaves": _diffusers("leaf_level", FLOAT8),
    "diffusers group offload fp8, blocks": _diffusers("block_level", FLOAT8),
    "ComfyUI fp8 dynamic VRAM": _comfyui_dynamic,
}


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
    print(_name(device), "torch", torch.__version__, f"budget {chosen.budget:g} GB")

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
        difference = _relative(result, first)
        print(f"{peer.name}: {seconds * 1e3:.1f} ms, {difference:.3f} from the first{memory}")


def _measure(step: Step, device: torch.device) -> tuple[float, Tensor, str]:
    """Median seconds of a step, its result on the CPU, and the memory of the card in words."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    result = torch.empty(0)
    for _ in range(WARM_UP + STEPS):
        _wait(device)
        start = time.perf_counter()
        result = step()
        _wait(device)
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
