"""Our nodes and ComfyUI's own Flux in turns on one card; test_gpu runs this as a process.

Arguments: `dynamic` or `static`, as ComfyUI manages its own models; the models' folder. Prints what
it found as JSON: how far apart pictures are that should be equal, and weights left on the card.
"""
# ruff: noqa: E402

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

mode, models = sys.argv[1], Path(sys.argv[2])
sys.path.insert(0, os.environ["COMFYUI_PATH"])
sys.modules["server"] = SimpleNamespace(PromptServer=SimpleNamespace(instance=None))  # type: ignore[assignment]
import comfy_aimdo.control as control

if mode == "dynamic":  # as ComfyUI's main.py does it, before anything else is imported
    control.init()

import comfy.memory_management
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import folder_paths
import torch
from torch import Tensor

if mode == "dynamic":
    assert control.init_devices([(0, 0)]), "comfy-aimdo does not work with this card"
    comfy.memory_management.aimdo_enabled = True
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
for folder in ("diffusion_models", "text_encoders", "vae"):
    folder_paths.add_model_folder_path(folder, str(models / folder), is_default=True)
folder_paths.models_dir = str(models)

from majicflux.engine.plan import GB, Job
from majicflux.nodes.denoise import Denoise
from majicflux.nodes.dit_loader import DiTLoader
from majicflux.nodes.encode_prompt import EncodePrompt
from majicflux.nodes.pipeline import PipelineNode
from majicflux.nodes.sample import Sample
from majicflux.nodes.text_encoders import TextEncodersNode
from majicflux.nodes.vae_loader import VAELoader

for node in (DiTLoader, TextEncodersNode, VAELoader, PipelineNode, EncodePrompt, Denoise, Sample):
    node.hidden = SimpleNamespace(unique_id=None, extra_pnginfo=None, prompt=None)

FILE = "majicflus_v134.safetensors"
dit = DiTLoader.execute(FILE, "bfloat16").args[0]
encoders = TextEncodersNode.execute(
    "clip_l.safetensors", "t5xxl_fp16.safetensors", "bfloat16", False
).args[0]
vae = VAELoader.execute("ae.safetensors").args[0]


def ours(budget_gb: float = 0.0) -> Tensor:
    """With a budget, and without: with what ComfyUI grants."""
    pipeline = PipelineNode.execute(dit, encoders, vae, budget_gb, "bfloat16").args[0]
    given: tuple[Any, ...] = (pipeline, "a cat", 1, 4, 3.5, 256, 256, 1)
    return Sample.execute(*given).args[1]["samples"].cpu()


@torch.inference_mode()
def theirs(model: Any, conditioning: Any) -> Tensor:
    empty = torch.zeros(1, 16, 32, 32)
    noise = comfy.sample.prepare_noise(empty, 1)
    return comfy.sample.sample(
        model, noise, 4, 1.0, "euler", "simple", conditioning, conditioning, empty,
        disable_pbar=True, seed=1,
    ).cpu()  # fmt: skip


def on_card() -> int:
    return sum(part.weights.resident_bytes for part in (dit, encoders, vae))


def apart(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


first = ours()
pipeline = PipelineNode.execute(dit, encoders, vae, 0.0, "bfloat16").args[0]
little = pipeline.plan(Job(256, 256, 1, 4)).smallest_bytes / GB + 0.001
conditioning = EncodePrompt.execute(pipeline, "a cat", 3.5).args[0]
native = comfy.sd.load_diffusion_model(str(models / "diffusion_models" / FILE))
of_native = theirs(native, conditioning)
found: dict[str, Any] = {
    "native patcher": type(native).__name__,
    "ours after theirs": apart(ours(), first),
    "theirs after ours": apart(theirs(native, conditioning), of_native),
    "ours in little": apart(ours(little), first),
    "theirs after that": apart(theirs(native, conditioning), of_native),
}
resident = on_card()
mm.free_memory(1e15, mm.get_torch_device())
found["given way"] = [resident, on_card()]
found["ours after that"] = apart(ours(), first)
found["resident again"] = on_card()
pinned = torch.cuda.host_memory_stats()["allocated_bytes.current"]
mm.unload_all_models()
found["unloaded"] = on_card()
found["pinned"] = [pinned, torch.cuda.host_memory_stats()["allocated_bytes.current"]]
found["and once more"] = apart(ours(), first)
path = models / f"latents of {mode}.pt"
torch.save(first, path)
print(json.dumps({**found, "latents": str(path)}))
