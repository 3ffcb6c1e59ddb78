"""The node ControlNet beside ComfyUI's own loader and Canny, in float32 on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from control_nets import FILES, control_net_tensors, picture
from PIL import Image
from safetensors.torch import save_file

from majicflux.benchmarks.random_models import DIT
from majicflux.engine.flux.geometry import ControlGeometry
from majicflux.loaders.demo_models import DIT_FILE, VAE_FILE

Graph = dict[str, Any]
NAMES = ["Union-Pro 2.0", "upscaler"]
PICTURE = "shapes.png"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def geometry(name: str) -> ControlGeometry:
    return ControlGeometry(**{**vars(FILES[name]), "hidden": DIT.hidden})


@pytest.fixture(autouse=True)
def files(comfy) -> None:
    folder = comfy.base / "models" / "controlnet"
    folder.mkdir(exist_ok=True)
    for name in NAMES:
        tensors = control_net_tensors(geometry(name), dtype=torch.bfloat16)
        save_file(tensors, folder / f"{name}.safetensors")
    (comfy.base / "input").mkdir(exist_ok=True)
    pixels = torch.nn.functional.interpolate(picture(5, 7).movedim(-1, 1), (70, 90)).movedim(1, -1)
    Image.fromarray((255 * pixels[0].numpy()).astype(np.uint8)).save(comfy.base / "input" / PICTURE)


def graph_of(small_graph: Graph, *strengths: float, end: float = 1.0) -> Graph:
    """Our sampler "ours" and ComfyUI's "stock", each behind nets of these strengths."""
    graph = {key: small_graph[key] for key in "1234"}
    graph["1"]["inputs"]["weight_precision"] = "bfloat16"
    graph["3"]["inputs"]["file"] = Path(VAE_FILE).name
    pipeline, prompt = ["4", 0], {"guidance": 3.5, "pipeline": ["4", 0]}
    graph |= {
        "unet": node("UNETLoader", unet_name=Path(DIT_FILE).name, weight_dtype="default"),
        "vae": node("VAELoader", vae_name=Path(VAE_FILE).name),
        "empty": node("EmptySD3LatentImage", width=64, height=48, batch_size=1),
        "positive": node("MajicFluxEncodePrompt", prompt="a cat", **prompt),
        "picture": node("LoadImage", image=PICTURE),
        "edges": node("Canny", image=["picture", 0], low_threshold=0.1, high_threshold=0.3),
        "sigmas": node(
            "BasicScheduler", model=["unet", 0], scheduler="simple", steps=4, denoise=1.0
        ),
        "select": node("KSamplerSelect", sampler_name="euler"),
    }
    ours, theirs = {}, ["positive", 0]
    for name, strength in zip(NAMES, strengths, strict=False):
        file = f"{name}.safetensors"
        graph[f"our {name}"] = node(
            "MajicFluxControlNet", file=file, weight_precision="bfloat16", image=["edges", 0],
            strength=strength, start=0.0, end=end, **ours,
        )  # fmt: skip
        graph[f"loaded {name}"] = node("ControlNetLoader", control_net_name=file)
        graph[f"their {name}"] = node(
            "ControlNetApplyAdvanced", positive=theirs, negative=theirs, vae=["vae", 0],
            control_net=[f"loaded {name}", 0], image=["edges", 0], strength=strength,
            start_percent=0.0, end_percent=end,
        )  # fmt: skip
        ours, theirs = {"control": [f"our {name}", 0]}, [f"their {name}", 0]
    return graph | {
        "ours": node(
            "MajicFluxDenoise", pipeline=pipeline, positive=["positive", 0], latent=["empty", 0],
            seed=7, steps=4, guidance=3.5, sigmas=["sigmas", 0], **ours,
        ),
        "stock": node(
            "SamplerCustom", model=["unet", 0], add_noise=True, noise_seed=7, cfg=1.0,
            positive=theirs, negative=theirs, sampler=["select", 0], sigmas=["sigmas", 0],
            latent_image=["empty", 0],
        ),
        "shown": node("PreviewAny", source=["ours", 0]),
        "shown too": node("PreviewAny", source=["stock", 0]),
    }  # fmt: skip


def painted(comfy, graph: Graph) -> tuple[torch.Tensor, torch.Tensor]:
    executor = comfy.executor()
    kind, data = comfy.run(executor, graph)[-1]
    assert kind == "execution_success", data
    found = comfy.outputs(executor, graph)
    return found["ours"]["samples"], found["stock"]["samples"]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("strengths", "end"), [((0.8,), 1.0), ((0.8,), 0.3), ((0.7, 1.2), 0.8)])
def test_the_samples_of_comfyuis_own_nodes(comfy, small_graph: Graph, strengths, end) -> None:
    ours, theirs = painted(comfy, graph_of(small_graph, *strengths, end=end))
    plain, _ = painted(comfy, graph_of(small_graph))
    assert difference(ours, theirs) <= 1e-4
    assert difference(plain, theirs) > 0.02


def test_what_their_nodes_give_is_refused_with_advice(comfy, small_graph: Graph) -> None:
    graph = graph_of(small_graph, 0.8)
    graph["ours"]["inputs"]["positive"] = [f"their {NAMES[0]}", 0]
    del graph["shown too"]
    kind, data = comfy.run(comfy.executor(), graph)[-1]
    assert kind == "execution_error"
    assert "carries control, control_apply_to_uncond, which" in data["exception_message"]
    assert "connect the Majic node ControlNet to control." in data["exception_message"]
