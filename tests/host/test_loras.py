"""The node LoRA in a real server, used as a client does."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from comfyui_server import Refused, Run, Server
from lora_dialects import DOWN_UP, LAYERS, PROJ, QKV, of_clip, random_of, written

API = Path(__file__).parents[2] / "workflows" / "api" / "text_to_image.json"
LOADERS = {"1", "2", "3"}
Graph = dict[str, Any]


def kohya(seed: int, *layers: str) -> dict[str, torch.Tensor]:
    given = {
        name: (random_of(4, LAYERS[name][1], seed=seed) / 32,
               random_of(LAYERS[name][0], 4, seed=seed + 1), 4.0)
        for name in layers
    }  # fmt: skip
    return written(given, "lora_unet_", DOWN_UP, underscores=True)


@pytest.fixture(scope="module")
def loras(server: Server) -> Path:
    folder = server.base / "models" / "loras"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    save_file(kohya(0, QKV, PROJ), folder / "one.safetensors")
    both = kohya(5, QKV) | of_clip("lora_te1_text_model_")
    save_file(both, folder / "sub" / "other.safetensors")
    whole = {f"diffusion_model.{PROJ}.diff": torch.ones(LAYERS[PROJ]) / 8}
    save_file(whole, folder / "whole.safetensors")
    sdxl = {"lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k.lora_down.weight":
            torch.zeros(4, 2048)}  # fmt: skip
    save_file(sdxl, folder / "sdxl.safetensors")
    return folder


@pytest.fixture
def plain() -> Graph:
    graph = json.loads(API.read_text(encoding="utf-8"))
    graph["5"]["inputs"].update(width=64, height=48, steps=2, seed=900)
    return graph


def with_lora(graph: Graph, *files: str, **inputs: Any) -> Graph:
    """Behind the loader one node for each file, "11" and so on."""
    changed = copy.deepcopy(graph)
    for number, file in enumerate(files):
        key = f"1{number + 1}"
        given = {"dit": changed["4"]["inputs"]["dit"], "file": file, "strength": 1.0, **inputs}
        changed[key] = {"class_type": "MajicFluxLoRA", "inputs": given}
        changed["4"]["inputs"]["dit"] = [key, 0]
    return changed


def strong(graph: Graph, strength: float) -> Graph:
    changed = copy.deepcopy(graph)
    changed["11"]["inputs"]["strength"] = strength
    return changed


def pixels(server: Server, run: Run) -> bytes:
    assert not run.of("execution_error")
    (path,) = server.outputs(run)
    with Image.open(path) as picture:
        return picture.tobytes()


def test_it_paints_is_cached_and_a_new_strength_reruns_what_is_behind_it(
    server: Server, loras: Path, plain: Graph
) -> None:
    without = pixels(server, server.run(plain))
    graph = with_lora(plain, "one.safetensors")
    run = server.run(graph)
    assert run.executed_nodes & LOADERS == set()
    changed = pixels(server, run)
    assert changed != without
    said = "one.safetensors: LoRA in the names of kohya, rank 4; layers of the transformer: 2"
    assert run.texts["11"].startswith(said)
    assert run.texts["11"].endswith("strength 1")
    again = server.run(graph)
    assert {*graph} <= {*again.of("execution_cached")[0]["nodes"]}
    halved = server.run(strong(graph, 0.5))
    assert halved.executed_nodes == {"11", "4", "5", "6"}
    assert pixels(server, halved) not in (changed, without)
    assert pixels(server, server.run(strong(graph, 0))) == without, "bit for bit"
    assert pixels(server, server.run(strong(graph, -1))) not in (changed, without)
    assert server.log().count(said) == 1, "it was read once"
    assert server.log().count("one.safetensors, strength 0.5") == 1
    new = copy.deepcopy(graph)
    new["5"]["inputs"]["seed"] = 901
    server.run(graph)
    assert server.run(new).executed_nodes == {"5", "6"}
    save_file(kohya(3, QKV), loras / "one.safetensors")
    other = server.run(graph)
    assert other.executed_nodes == {"11", "4", "5", "6"}, "the file is another one"
    assert pixels(server, other) not in (changed, without)


def test_two_of_them_and_one_of_a_subfolder_with_a_part_for_clip(
    server: Server, loras: Path, plain: Graph
) -> None:
    one = pixels(server, server.run(with_lora(plain, "one.safetensors")))
    encoders = {"text_encoders": ["2", 0]}
    graph = with_lora(plain, "one.safetensors", "sub/other.safetensors", **encoders)
    graph["12"]["inputs"]["text_encoders"] = ["11", 1]
    unused = server.run(graph)
    two = pixels(server, unused)
    assert "of CLIP-L: 4" in unused.texts["12"]
    graph["4"]["inputs"]["text_encoders"] = ["12", 1]
    run = server.run(graph)
    assert run.executed_nodes == {"4", "5", "6"}
    assert len({one, two, pixels(server, run)}) == 3


def test_one_that_is_baked_in(server: Server, loras: Path, plain: Graph) -> None:
    """Because it needs it, or because it is kept; a strength that was there before is mapped."""
    without = pixels(server, server.run(plain))
    graph = with_lora(plain, "whole.safetensors")
    run = server.run(graph)
    assert run.executed_nodes & LOADERS == set()
    whole = pixels(server, run)
    assert "layers that need baking in (of full rank): 1" in run.texts["11"]
    assert "strength 1\nbaked in, layers: 1" in run.texts["11"]
    halved = server.run(strong(graph, 0.5))
    assert halved.executed_nodes == {"11", "4", "5", "6"}
    assert len({without, whole, pixels(server, halved)}) == 3
    assert "mapped from prepared weights" in server.run(graph).texts["11"]
    kept = with_lora(plain, "sub/other.safetensors", text_encoders=["2", 0], keep=True)
    assert "baked in, layers: 1" in server.run(kept).texts["11"]
    names = [path.name for path in (server.base / "models" / "majicflux_prepared").iterdir()]
    assert sum("+whole@" in name for name in names) == 2
    assert sum("+other@1-" in name for name in names) == 1


@pytest.mark.parametrize(("file", "said"), [
    ("sdxl.safetensors", "is a LoRA for SDXL, not a LoRA for Flux.1"),
    ("gone.safetensors", "gone.safetensors is not in models/loras"),
])  # fmt: skip
def test_a_wrong_file_is_refused_with_a_sentence(
    server: Server, loras: Path, plain: Graph, file: str, said: str
) -> None:
    with pytest.raises(Refused) as caught:
        server.run(with_lora(plain, file))
    assert any(said in message for message in caught.value.errors["11"])


@pytest.mark.parametrize("strength", [4.5, -5, "much"])
def test_a_wrong_strength_is_refused(server: Server, loras: Path, plain: Graph, strength) -> None:
    with pytest.raises(Refused):
        server.run(strong(with_lora(plain, "one.safetensors"), strength))


def test_a_prompt_with_one_is_told(server: Server, plain: Graph) -> None:
    plain["5"]["inputs"]["prompt"] = "a cat <lora:one:0.8>"
    told = "<lora:one> in the prompt was read as words"
    assert server.run(plain).texts["5"].startswith(told)
    plain["7"] = {"class_type": "MajicFluxEncodePrompt", "inputs": {
        "pipeline": ["4", 0], "prompt": "a dog <lora:one:1>", "guidance": 3.5}}  # fmt: skip
    plain["5"]["inputs"]["positive"] = ["7", 0]
    assert server.run(plain).texts["7"].startswith(told)
