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
CONTROL_NET = "random.safetensors"
CONTROL_STRENGTH = 0.7
SEEN = ("reference", "control net")  # what a picture can be to ours and ComfyUI's
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


def ours_seeing(picture: str, *given: Any) -> Graph:
    """picture: one of SEEN; given: to `ours`."""
    graph = ours(*given)
    graph["picture"] = _picture(graph["5"]["inputs"]["width"])
    if picture == "reference":
        graph["5"]["inputs"]["reference"] = ["picture", 0]
        return graph
    inputs = {
        "file": CONTROL_NET, "image": ["picture", 0], "strength": CONTROL_STRENGTH,
        "weight_precision": graph["1"]["inputs"]["weight_precision"], "start": 0.0, "end": 1.0,
    }  # fmt: skip
    graph["net"] = {"class_type": "MajicFluxControlNet", "inputs": inputs}
    graph["5"]["inputs"]["control"] = ["net", 0]
    return graph


def _picture(side: int) -> dict[str, Any]:
    """A grey one: what is seen costs as much, whatever it is."""
    inputs = {"width": side, "height": side, "batch_size": 1, "color": 0x808080}
    return {"class_type": "EmptyImage", "inputs": inputs}


def native_seeing(picture: str, *given: Any) -> Graph:
    """picture: one of SEEN; given: to `native`."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    graph = native(*given)
    graph["picture"] = _picture(graph["7"]["inputs"]["width"])
    if picture == "reference":
        graph["seen"] = node("VAEEncode", pixels=["picture", 0], vae=["3", 0])
        graph["with"] = node("ReferenceLatent", conditioning=["4", 0], latent=["seen", 0])
        graph["5"]["inputs"]["conditioning"] = ["with", 0]
        return graph
    graph["net"] = node("ControlNetLoader", control_net_name=CONTROL_NET)
    graph["with"] = node(
        "ControlNetApplyAdvanced", positive=["5", 0], negative=["6", 0], control_net=["net", 0],
        image=["picture", 0], strength=CONTROL_STRENGTH, start_percent=0.0, end_percent=1.0,
        vae=["3", 0],
    )  # fmt: skip
    graph["8"]["inputs"].update(positive=["with", 0], negative=["with", 1])
    return graph
