"""The node LoRA beside ComfyUI's own loader, in float32 on the CPU, and when it is freed."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_dialects import DOWN_UP, LAYERS, written
from majicflux.loaders.demo_models import DIT_FILE, VAE_FILE

Graph = dict[str, Any]
COMPARED = Path(__file__).parents[3] / "workflows" / "api" / "compare_precisions.json"
FILES = ("first.safetensors", "second.safetensors")


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture(autouse=True)
def files(comfy) -> Iterator[None]:
    """Two LoRAs in the names of kohya, that together change every layer but the embedders."""
    folder = comfy.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    layers = [name for name in LAYERS if "blocks" in name]
    for number, (file, own) in enumerate(zip(FILES, (layers, layers[::2]), strict=True)):
        given = {}
        for index, name in enumerate(own):
            generator = torch.Generator().manual_seed(1000 * number + index)
            rows, columns = LAYERS[name]
            down = torch.randn(4, columns, generator=generator) / columns**0.5
            up = torch.randn(rows, 4, generator=generator) / 4
            given[name] = down.bfloat16(), up.bfloat16(), 2.0
        save_file(written(given, "lora_unet_", DOWN_UP, underscores=True), folder / file)
    yield
    for file in FILES:
        (folder / file).unlink()


def graph_of(small_graph: Graph, *strengths: float, keep: bool = False) -> Graph:
    """Our sampler "ours" and ComfyUI's "stock", each behind its LoRAs of these strengths."""
    graph = {key: small_graph[key] for key in "1234"}
    graph["1"]["inputs"]["weight_precision"] = "bfloat16"
    graph["3"]["inputs"]["file"] = Path(VAE_FILE).name
    ours, theirs = ["1", 0], ["unet", 0]
    for file, strength in zip(FILES, strengths, strict=False):
        graph[f"our {file}"] = node(
            "MajicFluxLoRA", dit=ours, file=file, strength=strength, keep=keep
        )
        graph[f"their {file}"] = node(
            "LoraLoaderModelOnly", model=theirs, lora_name=file, strength_model=strength
        )
        ours, theirs = [f"our {file}", 0], [f"their {file}", 0]
    graph["4"]["inputs"]["dit"] = ours
    pipeline, prompts = ["4", 0], {"guidance": 3.5, "pipeline": ["4", 0]}
    return graph | {
        "unet": node("UNETLoader", unet_name=Path(DIT_FILE).name, weight_dtype="default"),
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "positive": node("MajicFluxEncodePrompt", prompt="a cat", **prompts),
        "sigmas": node(
            "BasicScheduler", model=["unet", 0], scheduler="simple", steps=4, denoise=1.0
        ),
        "ours": node(
            "MajicFluxDenoise", pipeline=pipeline, positive=["positive", 0], latent=["empty", 0],
            seed=7, steps=4, guidance=3.5, sigmas=["sigmas", 0],
        ),
        "select": node("KSamplerSelect", sampler_name="euler"),
        "stock": node(
            "SamplerCustom", model=theirs, add_noise=True, noise_seed=7, cfg=1.0,
            positive=["positive", 0], negative=["positive", 0], sampler=["select", 0],
            sigmas=["sigmas", 0], latent_image=["empty", 0],
        ),
        "shown": node("PreviewAny", source=["ours", 0]),
        "shown too": node("PreviewAny", source=["stock", 0]),
    }  # fmt: skip


def painted(comfy, graph: Graph, executor: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    executor = executor or comfy.executor()
    kind, data = comfy.run(executor, graph)[-1]
    assert kind == "execution_success", data
    found = comfy.outputs(executor, graph)
    return found["ours"]["samples"], found["stock"]["samples"]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("strengths", [(1.0,), (-0.5,), (0.7, 1.3)])
def test_the_samples_of_comfyuis_own_loader(comfy, small_graph: Graph, strengths) -> None:
    ours, theirs = painted(comfy, graph_of(small_graph, *strengths))
    plain, _ = painted(comfy, graph_of(small_graph))
    assert difference(ours, theirs) <= 1e-4
    assert difference(plain, theirs) > 0.02


def test_the_samples_where_they_are_baked_in(comfy, small_graph: Graph) -> None:
    """Both programs round the sums to bfloat16, each in its own way."""
    ours, theirs = painted(comfy, graph_of(small_graph, 0.7, 1.3, keep=True))
    beside, _ = painted(comfy, graph_of(small_graph, 0.7, 1.3))
    assert 0 < difference(ours, beside) < 0.02
    assert difference(ours, theirs) < 0.02


def test_what_is_kept_of_it_goes_with_the_transformer(comfy, small_graph: Graph) -> None:
    comfy.manager.unload_all_models()
    gc.collect()
    kept = comfy.pack("nodes.lora")._kept
    before = {id(files) for files in kept.values()}  # of tests before this one
    executor = comfy.executor()
    graph = graph_of(small_graph, 1.0, 0.5)
    painted(comfy, graph, executor)
    (files,) = (files for files in kept.values() if id(files) not in before)
    assert len(files) == 2
    adapters = [id(adapter) for _, adapter, _ in files.values()]
    graph["our first.safetensors"]["inputs"]["strength"] = 0.25
    painted(comfy, graph, executor)
    assert [id(adapter) for _, adapter, _ in files.values()] == adapters
    del files, executor
    comfy.manager.unload_all_models()
    gc.collect()
    assert {id(files) for files in kept.values()} <= before


def test_precisions_are_compared_with_it(comfy, monkeypatch) -> None:
    """The template of three precisions, each behind the node: one file, read once."""
    loader = comfy.pack("nodes.lora")
    read, reads = loader.load_lora, []
    monkeypatch.setattr(loader, "load_lora", lambda *a, **k: reads.append(a[0]) or read(*a, **k))
    graph = json.loads(COMPARED.read_text(encoding="utf-8"))
    of_kind = {kind: [n for n, each in graph.items() if each["class_type"] == f"MajicFlux{kind}"]
               for kind in ("DiTLoader", "Pipeline", "Sample")}  # fmt: skip
    for sample in of_kind["Sample"]:
        graph[sample]["inputs"] |= {"width": 64, "height": 64, "steps": 2}
    executor = comfy.executor()

    def latents() -> list[torch.Tensor]:
        kind, data = comfy.run(executor, graph)[-1]
        assert kind == "execution_success", data
        found = (executor.caches.outputs.get_local(sample) for sample in of_kind["Sample"])
        return [entry.outputs[1][0]["samples"] for entry in found]

    plain = latents()
    for number, pipeline in enumerate(of_kind["Pipeline"]):
        given = graph[pipeline]["inputs"]
        graph[f"lora {number}"] = node("MajicFluxLoRA", dit=given["dit"], file=FILES[0], strength=1)
        given["dit"] = [f"lora {number}", 0]
    *eight_bit, exact = latents()
    assert len(eight_bit) == 2
    assert len(reads) == 1
    for found, before in zip((*eight_bit, exact), plain, strict=True):
        assert difference(found, before) > 0.02
    for found in eight_bit:
        assert 0 < difference(found, exact) < difference(found, plain[-1])
