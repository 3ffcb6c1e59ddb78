"""The pack without ComfyUI: the same names as `host/comfyui.py`, over plain folders and tqdm."""

import locale
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ..engine.torch_state import torch
from ..messages import say
from .place import Place
from .schema import ComfyExtension, ComfyNode, io

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.offload.offloaded_module import OffloadedModule

__all__ = [
    "ComfyExtension",
    "bundled_folder",
    "check_cancelled",
    "comfyui_version",
    "coming_prompts",
    "compute_device",
    "compute_dtype",
    "executing",
    "free_memory",
    "io",
    "language",
    "loading_progress",
    "make_patcher",
    "model_folders",
    "model_names",
    "model_path",
    "node_text",
    "on_prompt",
    "prepared_folder",
    "preview_bytes",
    "progress",
    "result_device",
    "show_on_node",
    "stage_teller",
    "text_encoder_device",
    "vae_device",
    "vae_dtype",
    "with_pictures",
]

TRADITIONAL = re.compile("tw|hk|mo|hant|traditional|taiwan|hong")  # in the name of a Chinese locale
MODEL_SUFFIXES = (".safetensors", ".sft")


def _models_folder() -> Path:
    """Of COMFYUI_PATH, of the ComfyUI that has this pack, or in the folder that one is in."""
    pack = Path(os.path.abspath(__file__)).parents[1]
    own = pack.parents[1] if pack.parent.name == "custom_nodes" else Path()
    return Path(os.environ.get("COMFYUI_PATH", own), "models")


# Where the models are, in ComfyUI's subfolders. The command line sets it.
models_folder = _models_folder()

# Of the machine's memory, that this process may pin; ComfyUI allows as much on every system. The
# processes of a batch share it.
pinned_share = 0.4

# By the nodes that will encode them. A batch sets it.
prompts_to_come: "Mapping[str | None, Sequence[str]]" = {}

# Called after each pass of the transformer with the clean latents that it leads to, for whoever
# compares runs.
on_latents: "Callable[[Tensor], None] | None" = None

_pinned_bytes = 0
_patchers: "WeakSet[StandalonePatcher]" = WeakSet()


def set_up_torch() -> None:
    """Set what ComfyUI sets for its whole process, so that both paint the same picture.

    It lets the attention of the VAE add up in bfloat16 where no fused kernel is used.
    """
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)


def check_cancelled() -> None:
    """Nothing to ask here: Ctrl+C raises by itself."""


def compute_device() -> "torch.device":
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


text_encoder_device = vae_device = compute_device


def result_device() -> "torch.device":
    return torch.device("cpu")


def comfyui_version() -> str | None:
    """Of the ComfyUI that the models folder belongs to, if it does."""
    file = models_folder.absolute().parent / "comfyui_version.py"
    return file.read_text(encoding="utf-8").split('"')[-2] if file.is_file() else None


def language() -> str:
    """That the environment names, or else Windows: Chinese, Japanese, or English for all others."""
    named = filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG")))
    name = next(named, None) or locale.getlocale()[0] or ""
    name = name.partition(".")[0].lower()
    if name.startswith(("zh", "chinese")):
        return "zh-TW" if TRADITIONAL.search(name) else "zh"
    return "ja" if name.startswith("ja") else "en"


def executing() -> Place | None:
    """Where the graph that runs is."""
    hidden = ComfyNode.hidden
    return None if hidden.unique_id is None else Place(hidden.prompt, hidden.unique_id)


def on_prompt(handler: "Callable[[dict[str, Any]], dict[str, Any]]") -> None:
    """Nothing to do: prompts are queued at a server."""


def free_memory(device: "torch.device") -> int:
    """Bytes of a card, with what PyTorch has reserved but does not use."""
    from ..engine.allocator import allocator_of

    free, _ = torch.cuda.mem_get_info(device)
    return free + allocator_of(device).unused()


def model_folders(category: str) -> list[Path]:
    """The folder for `category`, in a list as ComfyUI may have several."""
    return [models_folder.absolute() / category]


def model_names(category: str) -> list[str]:
    """File names, subfolders and linked ones included, in the models folder for `category`."""
    folder = models_folder / category
    found, visited = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:  # a link to what it is in, which would never end
            folders.clear()
            continue
        visited.add(real)
        files = (Path(place, name) for name in names)
        found += [file for file in files if file.suffix.lower() in MODEL_SUFFIXES]
    return sorted(str(path.relative_to(folder)) for path in found)


def model_path(category: str, name: str) -> Path | None:
    """The file of that name in the models folder, or None. A name cannot leave the folder."""
    folder = (models_folder / category).absolute()
    path = Path(os.path.normpath(folder / name))
    try:
        return path if path.is_relative_to(folder) and path.is_file() else None
    except (OSError, ValueError):  # no file can have this name
        return None


def prepared_folder() -> Path:
    """Where prepared weights are kept: on the disk of the models, where the room is."""
    return models_folder / "majicflux_prepared"


def bundled_folder(*parts: str) -> Path | None:
    """The same of the ComfyUI that the models folder belongs to, if it does."""
    folder = models_folder.absolute().parent.joinpath("comfy", *parts)
    return folder if folder.is_dir() else None


def compute_dtype(device: "torch.device") -> "torch.dtype":
    """The dtype that a Flux.1 transformer is best computed in on `device`."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


# A processor without units for bfloat16 takes minutes for its convolutions.
vae_dtype = compute_dtype


def loading_progress(node_id: str | None) -> "Callable[[int, int, str], None]":
    """A function to call with bytes done, bytes in all and what is being done, as a text for `say`
    with `done` and `total` in GB."""
    from tqdm import tqdm

    shape = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}"
    bar = tqdm(desc=say("preparing to load"), unit="B", unit_scale=True, leave=False,
               bar_format=shape)  # fmt: skip

    def on_bytes(done: int, total: int, doing: str) -> None:
        bar.total = total
        text = say(doing, done=done / 1e9, total=total / 1e9)
        bar.set_description(text, refresh=False)
        bar.update(done - bar.n)
        if done == total:  # which may be for long
            bar.refresh()

    return on_bytes


def coming_prompts(node_id: str | None) -> "Sequence[str]":
    """Which the node will have to encode soon, in graphs that follow."""
    return prompts_to_come.get(node_id, ())


def show_on_node(node_id: str | None, text: str) -> None:
    """Nothing to show it on: the log has the same line."""


def stage_teller(node_id: str | None) -> "Callable[[str, float | None], None]":
    """Nothing to show it on: the log has a line of each stage when it ends."""
    return lambda label, seconds: None


def node_text(lines: "Sequence[str]", **values: Any) -> None:
    """Nothing to show it on: the log says as much."""


def with_pictures(node: Any, shown: None, pictures: "Tensor") -> None:
    """Nothing to show them on."""


def preview_bytes(width: int, height: int) -> int:
    """Nothing is previewed."""
    return 0


def progress(
    passes: int, steps: int, device: "torch.device", node_id: str | None
) -> "Callable[[Tensor], None]":
    """A function to call after each pass of the transformer."""
    from tqdm import tqdm

    bar = tqdm(total=steps, desc=say("sampling"), unit=say("step"))
    made = 0

    def on_pass(clean: "Tensor") -> None:
        nonlocal made
        made += 1
        if on_latents is not None:
            on_latents(clean)
        bar.update(made * steps // passes - bar.n)
        if made == passes:
            bar.close()

    return on_pass


def _pin(memory: "Tensor") -> bool:
    """Pin this memory if all that is pinned stays below pinned_share of the machine's."""
    global _pinned_bytes
    import psutil

    if _pinned_bytes + memory.nbytes > pinned_share * psutil.virtual_memory().total:
        return False
    cudart: Any = torch.cuda.cudart()
    if cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0) != 0:
        with suppress(RuntimeError):  # which CUDA would raise again at the next call
            torch.cuda.synchronize()
        return False
    _pinned_bytes += memory.nbytes
    return True


def _unpin(memory: "Tensor") -> None:
    global _pinned_bytes
    cudart: Any = torch.cuda.cudart()
    cudart.cudaHostUnregister(memory.data_ptr())
    _pinned_bytes -= memory.nbytes


class StandalonePatcher:
    """An OffloadedModule that shares the device with the other ones of this process."""

    def __init__(self, weights: "OffloadedModule", device: "torch.device"):
        self.weights = weights
        self.device = device
        _patchers.add(self)

    def load(
        self,
        working_bytes: int,
        weight_cap: int | None,
        *beside: "tuple[StandalonePatcher, int | None]",
    ) -> None:
        together = [(self, weight_cap), *beside]
        for each, cap in together:
            each._load(working_bytes, cap, [patcher for patcher, _ in together])

    def _load(
        self, working_bytes: int, weight_cap: int | None, kept: "Sequence[StandalonePatcher]"
    ) -> None:
        from ..engine.allocator import allocator_of

        wanted = self.weights.travelling_bytes if weight_cap is None else weight_cap
        if self.device.type == "cuda":
            wanted = min(wanted, self._make_room(wanted, working_bytes, kept))
            allocator_of(self.device).give_back()
        self.weights.keep_resident(self.device, wanted)

    def available(self) -> "int | None":
        if self.device.type != "cuda":
            return None
        own = (patcher for patcher in _patchers if patcher.device == self.device)
        return free_memory(self.device) + sum(patcher.weights.resident_bytes for patcher in own)

    def pin(self) -> None:
        self.weights.pin(_pin, _unpin)

    def _make_room(
        self, wanted: int, working_bytes: int, kept: "Sequence[StandalonePatcher]"
    ) -> int:
        """Send the components that are not `kept` home until `wanted` fits; returns what fits in
        the end."""
        for other in (self, *_patchers):
            fits = free_memory(self.device) + self.weights.resident_bytes - working_bytes
            if fits >= wanted:
                break
            if other not in kept:
                other.weights.release(wanted - fits)
        return max(0, free_memory(self.device) + self.weights.resident_bytes - working_bytes)


def make_patcher(
    weights: "OffloadedModule", device: "torch.device", label: str
) -> StandalonePatcher:
    return StandalonePatcher(weights, device)
