"""The documented graph and ComfyUI's own Flux for the same files, in the format of the API."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

from majicflux.loaders import demo_models

from .comfyui import ROOT

Graph = dict[str, Any]
PROMPT = "A red fox in the snow at dawn, detailed fur, film photograph"
GUIDANCE = 3.5
LORA = "random.safetensors"
DIT, CLIP, T5, VAE = (
    Path(file).name
    for file in (
        demo_models.DIT_FILE,
        demo_models.CLIP_FILE,
        demo_models.T5_FILE,
        demo_models.VAE_FILE,
    )
)


@cache
def _shipped() -> Graph:
    text = (ROOT / "workflows" / "api" / "text_to_image.json").read_text(encoding="utf-8")
    return json.loads(text)


def ours(
    seed: int, steps: int, side: int, budget: float = 0.0, lora: float = 0.0, **sample: Any
) -> Graph:
    """budget: vram_budget_gb, 0 for none; lora: strength of LORA; sample: more inputs of the sample
    node."""
    graph = copy.deepcopy(_shipped())
    if lora:
        inputs = {"dit": ["1", 0], "file": LORA, "strength": lora}
        graph["lora"] = {"class_type": "MajicFluxLoRA", "inputs": inputs}
        graph["4"]["inputs"]["dit"] = ["lora", 0]
    graph["4"]["inputs"]["vram_budget_gb"] = float(budget)
    given = {"prompt": PROMPT, "guidance": GUIDANCE, **sample}
    graph["5"]["inputs"].update(seed=seed, steps=steps, width=side, height=side, **given)
    return graph


def native(seed: int, steps: int, side: int, dtype: str, lora: float = 0.0) -> Graph:
    """dtype: weight_dtype of UNETLoader; lora: strength of LORA."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    model, nodes = "1", {}
    if lora:
        given = {"model": ["1", 0], "lora_name": LORA, "strength_model": lora}
        model, nodes = "lora", {"lora": node("LoraLoaderModelOnly", **given)}
    return nodes | {
        "1": node("UNETLoader", unet_name=DIT, weight_dtype=dtype),
        "2": node("DualCLIPLoader", clip_name1=T5, clip_name2=CLIP, type="flux"),
        "3": node("VAELoader", vae_name=VAE),
        "4": node("CLIPTextEncode", text=PROMPT, clip=["2", 0]),
        "5": node("FluxGuidance", conditioning=["4", 0], guidance=GUIDANCE),
        "6": node("ConditioningZeroOut", conditioning=["4", 0]),
        "7": node("EmptySD3LatentImage", width=side, height=side, batch_size=1),
        "8": node(
            "KSampler", model=[model, 0], positive=["5", 0], negative=["6", 0], cfg=1.0,
            latent_image=["7", 0], seed=seed, steps=steps, sampler_name="euler",
            scheduler="simple", denoise=1.0,
        ),
        "9": node("VAEDecode", samples=["8", 0], vae=["3", 0]),
        "10": node("SaveImage", images=["9", 0], filename_prefix="native"),
    }  # fmt: skip
