"""The pack inside ComfyUI. Everything that the pack asks of it is asked here."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import folder_paths
import latent_preview
import server
import torch
from comfy_api.latest import ComfyExtension, io, ui
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from torch import Tensor, nn

import nodes

from ..engine.allocator import is_out_of_memory
from ..engine.offload.offloaded_module import OffloadedModule
from ..engine.offload.pinned import give_back_host_memory
from ..engine.sizes import PIXELS_PER_LATENT
from ..messages import log, say
from .place import Place

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


UI, TEXT_EVENT = "majicflux", "majicflux.text"  # web/majicflux.js knows them
SHOW_SECONDS = 0.25  # between two texts on a node that is loading
# Four maps of 64 channels in float32 at the size of the picture, of which three are alive at once.
TAESD_PIXEL_BYTES = 4 * 64 * 4

# A folder that ComfyUI itself has not; extra_model_paths.yaml may name more of the kind.
folder_paths.add_model_folder_path("translation", str(Path(folder_paths.models_dir, "translation")))

check_cancelled = mm.throw_exception_if_processing_interrupted
compute_device = mm.get_torch_device
text_encoder_device = mm.text_encoder_device
vae_device = mm.vae_device
result_device = mm.intermediate_device
free_memory = mm.get_free_memory


def comfyui_version() -> str | None:
    """Of the ComfyUI that this is."""
    from comfyui_version import __version__

    return __version__


def language() -> str:
    """That the user has chosen for the canvas, or else the canvas itself.

    The first is there only once he has; the second is kept by the pack's extension of the canvas.
    """
    file = Path(folder_paths.get_user_directory(), "default", "comfy.settings.json")
    try:
        settings = json.loads(file.read_bytes())
        return settings.get("Comfy.Locale") or settings.get("MajicFlux.Language") or "en"
    except (OSError, ValueError, AttributeError):  # none yet, being written, or of another form
        return "en"


def executing() -> Place | None:
    """Where the prompt is whose node runs in this thread; None outside of nodes."""
    context, state = get_executing_context(), get_progress_state()
    if context is None or context.prompt_id != state.prompt_id:
        return None
    prompt = state.dynprompt
    graph = {key: prompt.get_node(key) for key in prompt.all_node_ids()}
    inside: dict[str, list[str]] = {}
    for key in graph:
        if (parent := prompt.get_parent_node_id(key)) is not None:
            inside.setdefault(parent, []).append(key)
    return Place(graph, context.node_id, context.list_index or 0, inside, _regroups)


def _regroups(class_type: str) -> bool:
    kind = nodes.NODE_CLASS_MAPPINGS[class_type]  # pyright: ignore[reportAttributeAccessIssue]
    return getattr(kind, "INPUT_IS_LIST", False) or any(getattr(kind, "OUTPUT_IS_LIST", ()))


def on_prompt(handler: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Have the body of every POST /prompt changed by `handler`."""
    instance = getattr(server.PromptServer, "instance", None)
    if instance is not None:
        instance.add_on_prompt_handler(handler)


def model_folders(category: str) -> list[Path]:
    """The host's folders for `category`."""
    return [Path(folder) for folder in folder_paths.get_folder_paths(category)]


def model_names(category: str) -> list[str]:
    """File names, subfolders included, in the host's folders for `category`."""
    return folder_paths.get_filename_list(category)


def model_path(category: str, name: str) -> Path | None:
    """The file of that name in the host's folders, or None. A name cannot leave the folders."""
    path = folder_paths.get_full_path(category, name)
    return None if path is None else Path(path)


def prepared_folder() -> Path:
    """Where prepared weights are kept: on the disk of the models, where the room is."""
    return Path(folder_paths.models_dir, "majicflux_prepared")


def bundled_folder(*parts: str) -> Path | None:
    """A folder of those in `comfy`."""
    # Not folder_paths.base_path, which --base-directory moves away from the program.
    folder = Path(comfy.latent_formats.__file__).parent.joinpath(*parts)
    return folder if folder.is_dir() else None


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype that a Flux.1 transformer is best computed in on `device`."""
    return torch.bfloat16 if mm.should_use_bf16(device) else torch.float32


def vae_dtype(device: torch.device) -> torch.dtype:
    """The same for the VAE, unless a flag of ComfyUI's names another."""
    return mm.vae_dtype(device, [torch.bfloat16])


def loading_progress(node_id: str | None) -> Callable[[int, int, str], None]:
    """A function to call with bytes done, bytes in all and what is being done, as a text for `say`
    with `done` and `total` in GB; it raises when cancelled. The node shows them, now and then."""
    show_on_node(node_id, say("preparing to load"))
    bar = comfy.utils.ProgressBar(1)
    shown = ("", 0.0)  # what was being done, and when that was

    def on_bytes(done: int, total: int, doing: str) -> None:
        nonlocal shown
        check_cancelled()
        now = time.monotonic()
        if doing != shown[0] or now - shown[1] >= SHOW_SECONDS or done == total:
            shown = doing, now
            bar.update_absolute(done, total)
            show_on_node(node_id, say(doing, done=done / 1e9, total=total / 1e9))

    return on_bytes


def coming_prompts(node_id: str | None) -> Sequence[str]:
    """Of graphs that are queued nothing is known before they run."""
    return ()


def show_on_node(node_id: str | None, text: str) -> None:
    """Show a text on a node while it runs."""
    instance = getattr(server.PromptServer, "instance", None)
    if instance is not None and node_id is not None:  # there is none when no server runs
        instance.send_sync(TEXT_EVENT, {"node": node_id, "text": text}, instance.client_id)


def stage_teller(node_id: str | None) -> Callable[[str, float | None], None]:
    """A function to call with the label of each stage that begins, and its seconds where they are
    predicted: the node shows them."""

    def tell(label: str, seconds: float | None) -> None:
        text = say("{phase} …", phase=label)
        if seconds is not None:
            text = say("{phase} …, about {seconds:.0f} s", phase=label, seconds=seconds)
        show_on_node(node_id, text)

    return tell


def node_text(lines: Sequence[str], **values: Any) -> dict[str, Any]:
    """`ui` of a NodeOutput: the text that its node keeps, and for scripts, in the history, values.

    Empty lines are left out. The pack's extension of the canvas shows it; ComfyUI's own progress
    texts are in no history, and newer canvases remove them at the end of a job.
    """
    return {UI: [{"text": "\n".join(filter(None, lines)), **values}]}


def with_pictures(
    node: type[io.ComfyNode], shown: dict[str, Any], pictures: Tensor
) -> dict[str, Any]:
    """What `node_text` gives, and pictures [n, height, width, 3] in 0..1 on the node below it."""
    return {**shown, **ui.PreviewImage(pictures, cls=node).as_dict()}


def preview_bytes(width: int, height: int) -> int:
    """Of the device, that a preview of a picture of this size takes at most."""
    if latent_preview.args.preview_method != latent_preview.LatentPreviewMethod.TAESD:
        return 0
    rows, columns = _previewed(height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    return rows * columns * PIXELS_PER_LATENT**2 * TAESD_PIXEL_BYTES


def _previewed(rows: int, columns: int) -> tuple[int, int]:
    """The size of latents whose picture is not larger than what is shown of it."""
    most = max(1, latent_preview.MAX_PREVIEW_RESOLUTION // PIXELS_PER_LATENT)
    share = min(1.0, most / max(rows, columns))
    return max(1, round(rows * share)), max(1, round(columns * share))


def progress(
    passes: int, steps: int, device: torch.device, node_id: str | None
) -> Callable[[Tensor], None]:
    """A function to call after each pass, with the clean latents so far.

    The bar counts steps, and raises ComfyUI's interrupt exception when the user has cancelled. The
    node shows how long a step takes, and how long the others will.
    """
    bar = comfy.utils.ProgressBar(steps)
    made = 0
    previewer = latent_preview.get_previewer(device, comfy.latent_formats.Flux())
    start = time.perf_counter()

    def on_pass(clean: Tensor) -> None:
        nonlocal made
        made += 1
        done = made * steps // passes
        if done == bar.current:  # of a step of two passes the first
            return
        preview = None
        if previewer:
            try:
                if isinstance(previewer, latent_preview.TAESDPreviewerImpl):
                    size = _previewed(*clean.shape[2:])
                    clean = torch.nn.functional.interpolate(clean[:1], size, mode="area")
                preview = previewer.decode_latent_to_preview_image("JPEG", clean)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                log.debug("no preview: the card is short of memory")
        bar.update_absolute(done, steps, preview)
        seconds = (time.perf_counter() - start) * passes / steps / made
        left = seconds * (steps - done)
        values = {"done": done, "steps": steps, "seconds": seconds, "left": left}
        text = say("step {done} of {steps}, {seconds:.2f} s a step, {left:.0f} s left", **values)
        show_on_node(node_id, text)

    return on_pass


def _pin(memory: Tensor) -> bool:
    # pin_memory makes room for itself among the host's models, and goes on when it found none.
    fits = mm.TOTAL_PINNED_MEMORY + memory.nbytes <= mm.MAX_PINNED_MEMORY
    return fits and mm.pin_memory(memory)


class _Owner(nn.Module):
    """What ComfyUI's manager holds weakly as "the model". Nothing inside refers back to it."""

    device: torch.device  # where the manager believes the weights are

    def __init__(self, weights: OffloadedModule, device: torch.device):
        super().__init__()
        self.weights = weights
        self.device = device


class WeightsPatcher(comfy.model_patcher.ModelPatcher):
    """An OffloadedModule as ComfyUI's memory manager knows models.

    A subclass of the plain ModelPatcher, never of CoreModelPatcher, which under dynamic VRAM is
    loaded whole and is not evicted for others.
    """

    model: _Owner

    def __init__(
        self,
        model: _Owner,
        load_device: torch.device,
        offload_device: torch.device,
        size: int = 0,
        weight_inplace_update: bool = False,
    ):
        self.weight_cap: int | None = None
        super().__init__(model, load_device, offload_device, size, weight_inplace_update)

    @property
    def device(self) -> torch.device:
        return self.load_device

    @property
    def weights(self) -> OffloadedModule:
        return self.model.weights

    def load(
        self,
        working_bytes: int,
        weight_cap: int | None,
        *beside: tuple["WeightsPatcher", int | None],
    ) -> None:
        together = [(self, weight_cap), *beside]
        for each, cap in together:
            each.weight_cap = cap
            if cap is not None:  # before the manager looks for room among the others
                each.weights.release(each.weights.resident_bytes - cap)
        patchers = [each for each, _ in reversed(together)]  # which the manager loads backwards
        mm.load_models_gpu(
            patchers, memory_required=working_bytes, minimum_memory_required=working_bytes
        )

    def available(self) -> int | None:
        if mm.is_device_cpu(self.load_device):
            return None
        loaded = (entry for entry in mm.current_loaded_models if entry.device == self.load_device)
        givers = sum(entry.model_loaded_memory() for entry in loaded if entry.model is not None)
        free = mm.get_free_memory(self.load_device)
        return int(free + givers - mm.extra_reserved_memory())

    def pin(self) -> None:
        self.weights.pin(_pin, mm.unpin_memory)

    # What follows is the manager's side.

    def model_size(self) -> int:
        total = self.weights.travelling_bytes
        return total if self.weight_cap is None else min(total, self.weight_cap)

    def loaded_size(self) -> int:
        return self.weights.resident_bytes

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        before = self.loaded_size()
        granted = before + extra_memory
        if self.weight_cap is not None:
            granted = min(granted, self.weight_cap)
        self.weights.keep_resident(device_to, granted)
        self.model.device = device_to
        return self.loaded_size() - before

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        return self.weights.release(memory_to_free)

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        # The manager also calls this, with False, each time it reuses a loaded model.
        if unpatch_all:
            self.weights.release(float("inf"))
            self.weights.unpin()
            give_back_host_memory()
            self.model.device = self.offload_device
        return self.model

    def patch_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.model

    def unpatch_model(self, *args: Any, **kwargs: Any) -> None:
        pass


def make_patcher(weights: OffloadedModule, device: torch.device, label: str) -> WeightsPatcher:
    """Make `weights` known to the memory manager, which shows them in the log as `label`."""
    offload_device = torch.device("cpu")
    owner_class = type(label, (_Owner,), {})  # the manager logs the class name
    return WeightsPatcher(owner_class(weights, offload_device), device, offload_device)
