"""What `majicflux doctor` and its node say of a machine: a screen of text for a bug report."""

import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..downloads import model_folders
from ..downloads.catalogue import AE, CLIP_L, HUB_NAMES, MAJICFLUS_BF16, T5_XXL
from ..engine.quant.formats import PRECISIONS
from ..host import current as host
from ..loaders.lora_models import FLUX_LORA, lora_of_another_model
from ..loaders.recognise import CLIP, FLUX_DIT, T5, VAE, Kind, is_lora, kind_of, parts_in
from ..loaders.safetensors_file import ModelFileError, SafetensorsFile
from ..loaders.shards import model_parts
from ..loaders.tokenizers import misfits
from ..loaders.weight_cache import cached_files
from ..messages import say

if TYPE_CHECKING:
    from ..engine.plan.device import DeviceProfile
    from ..engine.quant.compute import ComputePrecision

PACK = Path(__file__).parents[1]
TRITON = "triton-windows" if sys.platform == "win32" else "triton"
PACKAGES = ("diffsynth", "transformers", TRITON, "comfy-kitchen", "torchvision", "torchaudio")
JOB = (1024, 1024, 1, 20)  # width, height, pictures, steps
PLANNED = "float8_e4m3fn"  # the weight_precision that the plan is made for
LORAS = "loras"
SHOWN = 4  # names of each kind of file
NEEDED = {FLUX_DIT: MAJICFLUS_BF16, CLIP: CLIP_L, T5: T5_XXL, VAE: AE}  # and a file that is one


def diagnosis() -> str:
    """Never raises: what is missing or broken is said where it would stand.

    A file is named by its place in its models folder, so that nobody's name is in a path.
    """
    parts = (
        (say("copies to the card"), _copies),
        ("compute_precision auto", _computing),
        (say("models"), _models),
        (say("prepared weights"), _prepared),
        (say("plan of a FLUX.1 transformer in {precision}", precision=PLANNED), _plan),
    )
    return f"{machine()}\n{_told(parts)}"


def machine() -> str:
    """The first part of it: versions, the card and the memory. Never raises."""
    return _told(
        (
            ("MajicFlux", _system),
            ("torch", _torch),
            (say("packages"), _packages),
            (say("card"), _card),
            (say("RAM"), _ram),
        )
    )


def _told(parts: Iterable[tuple[str, Callable[[], str]]]) -> str:
    text = "\n".join(f"{name}: {_said(find)}" for name, find in parts).replace(": \n", ":\n")
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def _said(find: Callable[[], str]) -> str:
    try:
        return find()
    except Exception as error:  # anything: to show what is broken here is what this is for
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        return say("not known ({error}: {reason})", error=type(error).__name__, reason=reason)


def _system() -> str:
    return f"{_own_version()}, Python {platform.python_version()}, {platform.platform()}"


def _own_version() -> str:
    project = PACK / "pyproject.toml"
    if not project.is_file():
        return metadata.version("majicflux")
    version = re.search(r'^version = "(.+)"', project.read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    return version[1]


def _torch() -> str:
    import torch

    hip, cuda = torch.version.hip, torch.version.cuda
    built_for = f"ROCm {hip}" if hip else f"CUDA {cuda}" if cuda else _without("CUDA")
    return "\n- ".join([f"{torch.__version__}, {built_for}", *misfits()])


def _without(package: str) -> str:
    return say("no {package}", package=package)


def _packages() -> str:
    def version(name: str) -> str:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            return _without(name)

    comfyui = host.comfyui_version()
    own = f"ComfyUI {comfyui}" if comfyui else _without("ComfyUI")
    return ", ".join([own, *map(version, PACKAGES)])


def _card() -> str:
    import torch

    from ..engine.plan.units import GB
    from ..engine.quant.compute import device_name

    device = host.compute_device()
    if device.type != "cuda":
        return say(
            "none that PyTorch can use here; computing on the {device}",
            device=device_name(device),
        )
    total = torch.cuda.get_device_properties(device).total_memory
    return say(
        "{device}; {free:.1f} of {total:.1f} GB of VRAM are free",
        device=device_name(device),
        free=host.free_memory(device) / GB,
        total=total / GB,
    )


def _ram() -> str:
    import psutil

    memory = psutil.virtual_memory()
    free, total = memory.available / 2**30, memory.total / 2**30
    return say("{free:.1f} of {total:.1f} GB are free", free=free, total=total)


def _copies() -> str:
    from ..engine.plan.measure import copy_rate

    device = host.compute_device()
    if device.type != "cuda":
        return say("no card")
    return say("{rate:.1f} GB/s from pinned memory", rate=copy_rate(device) / 1e9)


def _computing() -> str:
    lines = [""]
    for name in PRECISIONS:
        weights = say("{precision} weights", precision=name)
        lines.append(f"- {weights}: {_said(lambda p=name: _computing_of(p))}")
    return "\n".join(lines)


def _computing_of(precision: str) -> str:
    computing, card = _measured(precision)
    rate = f", {card.product_rate / 1e12:.0f} TFLOP/s" if card.product_rate else ""
    return computing.choice + rate


def _measured(precision: str) -> "tuple[ComputePrecision, DeviceProfile]":
    """What `auto` chooses for weights in this precision, and the rates of the card, if any."""
    from ..engine.flux.geometry import FluxGeometry
    from ..engine.flux.transformer import build_flux_dit
    from ..engine.plan.measure import device_profile
    from ..engine.quant.compute import choose_compute

    device = host.compute_device()
    small = build_flux_dit(FluxGeometry(double_blocks=1, single_blocks=1), PRECISIONS[precision])
    computing = choose_compute(small.module, device, "auto", host.compute_dtype(device))
    return computing, device_profile(device, computing, rates=True)


def _models() -> str:
    """Folder by folder, what each file is, told from its header; then what is missing."""
    usable: set[Kind] = set()
    lines = [""]
    for folder in ("diffusion_models", LORAS, "text_encoders", "vae", model_folders.CHECKPOINTS):
        files: dict[str, list[str]] = {}
        for name in model_folders.choices(folder):
            what, kinds = _examined(folder, name)
            files.setdefault(what, []).append(name)
            usable |= kinds
        lines.append(f"- {folder}: {'' if files else say('empty')}".rstrip())
        for what, names in files.items():
            shown, more = ", ".join(names[:SHOWN]), len(names) - SHOWN
            if more > 0:
                shown = say("{names} and {more} more", names=shown, more=more)
            lines.append(f"  - {what}: {shown}")
    for kind, file in NEEDED.items():
        if kind not in usable:
            text = say(
                "MISSING {kind}, such as {file} of {places}, in models/{folder}; "
                "`python custom_nodes/majicflux download` fetches it",
                kind=kind,
                file=file.name,
                places=" / ".join(f"{HUB_NAMES[p.hub]} {p.repository}" for p in file.places),
                folder=file.folder,
            )
            lines.append(f"- {text}")
    return "\n".join(lines)


def _examined(folder: str, name: str) -> tuple[str, set[Kind]]:
    """What the file is or why it cannot be read, and what of it a loader takes."""
    path, loaders = Path(name), _loaders()
    try:
        path = model_folders.resolve(folder, name)
        headers = [SafetensorsFile(part).tensors for part in model_parts(path)]
        names = [tensor for header in headers for tensor in header]
        if folder == LORAS and is_lora(names):
            shapes = {name: entry.shape for name, entry in headers[0].items()}
            return str(lora_of_another_model(shapes) or FLUX_LORA), set()
        kind = next(iter(parts_in(names)), None) or kind_of(names)
        if kind is None:
            return say("nothing that MajicFlux knows"), set()
        if kind not in loaders:
            return str(kind), set()
        loaders[kind](path)
    except ModelFileError as error:
        said = str(error).partition("\n")[0]
        # The file's name stands in front in every language, and with its likes below here.
        reason = said.replace(str(path), path.name).removeprefix(path.name).lstrip(" :：")
        return say("unusable ({reason})", reason=reason.rstrip(".。")), set()
    if folder == model_folders.CHECKPOINTS:  # it may hold the other parts too
        held = {k for k, look in loaders.items() if not model_folders.problem(folder, name, look)}
        return str(kind), held
    if folder != NEEDED[kind].folder:
        values = {"kind": kind, "folder": NEEDED[kind].folder}
        return say("{kind}, which belongs in models/{folder}", **values), set()
    return str(kind), {kind}


def _loaders() -> dict[Kind, Callable[[Path], Any]]:
    """How each loader looks into a file that it is to load. They raise ModelFileError."""
    from ..loaders.flux_dit import inspect_flux_dit
    from ..loaders.text_encoders import inspect_clip, inspect_t5
    from ..loaders.vae import inspect_vae

    return {FLUX_DIT: inspect_flux_dit, CLIP: inspect_clip, T5: inspect_t5, VAE: inspect_vae}


def _prepared() -> str:
    folder = host.prepared_folder().absolute()
    kept = cached_files(folder)
    disk = next(place for place in (folder, *folder.parents) if place.is_dir())
    return say(
        "{count} files of {size:.1f} GB; {free:.0f} GB of the disk are free",
        count=len(kept),
        size=sum(path.stat().st_size for path in kept) / 1e9,
        free=shutil.disk_usage(disk).free / 1e9,
    )


def _plan() -> str:
    from ..engine.plan.estimate import estimate_plan
    from ..engine.plan.units import GB, in_gb_above

    device = host.compute_device()
    if device.type != "cuda":
        plan = estimate_plan(None, PRECISIONS[PLANNED], JOB, None, True, None, None)
        smallest = in_gb_above(plan.smallest_bytes)
        return say("on a card, 1024x1024 needs {smallest} GB of VRAM or more", smallest=smallest)
    computing, card = _measured(PLANNED)
    rates = None, None  # where the card is too full to be measured
    if card.copy_rate and card.product_rate:
        rates = card.copy_rate / 1e9, card.product_rate / 1e12
    plan = estimate_plan(
        None, PRECISIONS[PLANNED], JOB, host.free_memory(device) / GB, bool(computing.eight_bit),
        *rates,
    )  # fmt: skip
    return "\n- ".join(["", *str(plan).splitlines()])
