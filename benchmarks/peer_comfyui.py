"""ComfyUI's two ways to keep a model within a card's memory, as peers of `budget_peers`."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from majicflux.dev import find_comfyui
from majicflux.lab.steps import GUIDANCE, Step

from .peer_setup import FLOAT8, NotMeasured, Setup
from .step import BFLOAT16, GB

AIMDO_HEADROOM = 256 * 2**20  # bytes that ComfyUI's dynamic mode leaves free on any card


@contextmanager
def low_vram(setup: Setup) -> Iterator[Step]:
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
        patcher = _patcher(comfy, setup)
    try:
        yield _step(patcher, setup)
    finally:
        _unload(comfy, patcher)


@contextmanager
def dynamic_vram(setup: Setup) -> Iterator[Step]:
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
        patcher = _patcher(comfy, setup)
        patcher.set_in_use_by_current_prompt(True)
        try:
            yield _step(patcher, setup)
        finally:
            _unload(comfy, patcher)


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
def _patcher(comfy: Any, setup: Setup) -> Any:
    """The host's own loader for a float8 file, then its own preparation of sampling."""
    patcher = comfy.sd.load_diffusion_model_state_dict(
        dict(setup.float8), model_options={"dtype": FLOAT8, "load_device": setup.device}
    )
    if patcher is None:
        raise NotMeasured("ComfyUI does not know the model")
    shape = list(setup.case.latents.shape)
    comfy.sampler_helpers.prepare_sampling(patcher, shape, {}, patcher.model_options)
    return patcher


def _step(patcher: Any, setup: Setup) -> Step:
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
def _unload(comfy: Any, patcher: Any) -> None:
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
