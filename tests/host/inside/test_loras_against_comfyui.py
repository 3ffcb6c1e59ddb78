"""What a LoRA adds to each weight, beside what ComfyUI's own code adds, in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from file_layouts import Tensors
from lora_dialects import (
    AB,
    DOWN_UP,
    LAYERS,
    PROJ,
    QKV,
    Factors,
    H,
    dialects,
    engine_names,
    to_xlabs,
    written,
)
from majicflux.benchmarks.random_models import CLIP, DIT
from majicflux.engine.quant.low_rank import LowRankTerm
from majicflux.loaders import demo_models
from majicflux.loaders.lora import load_lora

pytestmark = pytest.mark.usefixtures("comfy")
READ = ["kohya", "Diffusers", "Diffusers, alphas", "Diffusers, old", "Diffusers, oldest",
        "Diffusers, bare", "ai-toolkit", "OneTrainer", "LyCORIS"]  # fmt: skip
XLABS = [f"double_blocks.1.{s}_attn.{part}" for s in ("img", "txt") for part in ("qkv", "proj")]


def random_of(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def factors(layers: list[str] | None = None, rank: int = 4) -> Factors:
    found = {}
    for index, name in enumerate(layers or LAYERS):
        generator = torch.Generator().manual_seed(index)
        rows, columns = LAYERS[name]
        down = torch.randn(rank, columns, generator=generator)
        up = torch.randn(rows, rank, generator=generator)
        found[name] = down, up, 1.0 + index % 3
    return found


@pytest.fixture(scope="module")
def flux(models: Path) -> Any:
    """ComfyUI's own model of the demo file, whose weights nobody looks at."""
    import comfy.model_detection

    state = load_file(models / demo_models.DIT_FILE)
    config = comfy.model_detection.model_config_from_unet(state, "model.diffusion_model.")
    config.set_inference_dtype(torch.float32, None)
    return config.get_model(state, "model.diffusion_model.", "cpu")


def theirs(flux: Any, path: Path) -> Tensors:
    """What ComfyUI adds to weights and biases, by their names; that of all others is 0."""
    import comfy.lora
    import comfy.lora_convert
    import comfy.utils

    found = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(str(path)))
    keys = comfy.lora.model_lora_keys_unet(flux, {})
    added: Tensors = {}
    shapes = {name: weight.shape for name, weight in flux.state_dict().items()}
    for key, patch in comfy.lora.load_lora(found, keys).items():
        name, *rest = key if isinstance(key, tuple) else (key,)
        offset, function = (*rest, None, None)[:2]
        weight = added.setdefault(name, torch.zeros(shapes[name]))
        comfy.lora.calculate_weight([(1.0, patch, 1.0, offset, function)], weight, name)
    return added


def ours(path: Path) -> Tensors:
    """The same of ours, in ComfyUI's names."""
    adapter = load_lora(path, DIT, CLIP, torch.float32)
    assert not adapter.report.unused
    names = {engine: layer for layer, engine in engine_names(LAYERS).items()}
    added = {
        f"diffusion_model.{names[layer]}.weight": change(terms, LAYERS[names[layer]])
        for layer, terms in adapter.terms.items()
    }
    biases = {f"diffusion_model.{names[n]}.bias": b.double() for n, b in adapter.biases.items()}
    return added | biases


def change(terms: tuple[LowRankTerm, ...], shape: tuple[int, int]) -> torch.Tensor:
    total = torch.zeros(shape, dtype=torch.float64)
    for term in terms:
        rows = slice(term.first, term.first + len(term.up))
        total[rows] += term.scale * term.up.double() @ term.down.double()
    return total


def require_same(flux: Any, path: Path, count: int) -> None:
    found, expected = ours(path), theirs(flux, path)
    assert len(found) == count
    assert found.keys() == expected.keys()
    for name, added in found.items():
        difference = (added - expected[name].double()).norm() / expected[name].double().norm()
        assert difference < 1e-5, name


@pytest.mark.parametrize("dialect", READ)
def test_each_dialect_that_comfyui_reads(flux: Any, saved: Callable, dialect: str) -> None:
    require_same(flux, saved(dialects(factors())[dialect]), len(LAYERS))


def test_parts_of_unequal_ranks(flux: Any, saved: Callable) -> None:
    tensors: Tensors = {}
    for rank, layers in ((2, ["to_q"]), (3, ["to_v", "add_k_proj"])):
        for layer in layers:
            given = {
                f"transformer_blocks.1.attn.{layer}": (random_of(rank, H), random_of(H, rank), 2.0)
            }
            tensors |= written(given, "transformer.", AB)
    mlp = {"single_transformer_blocks.2.proj_mlp": (random_of(5, H), random_of(4 * H, 5), 1.0)}
    require_same(flux, saved(tensors | written(mlp, "transformer.")), 3)


@pytest.mark.parametrize("alpha", [torch.tensor(3), torch.tensor(3, dtype=torch.float16)])
def test_alphas(flux: Any, saved: Callable, alpha: torch.Tensor) -> None:
    tensors = written(factors([PROJ, QKV]), "diffusion_model.")
    tensors[f"diffusion_model.{PROJ}.alpha"] = alpha
    require_same(flux, saved(tensors), 2)


def test_uso_and_the_names_of_xlabs(flux: Any, saved: Callable, monkeypatch) -> None:
    """ComfyUI reads them where all blocks of a real file are there."""
    import comfy.lora_convert as convert

    given = factors([*XLABS, "single_blocks.3.linear1", "single_blocks.3.linear2"])
    down, up, alpha = given["single_blocks.3.linear1"]
    given["single_blocks.3.linear1"] = down, up[: 3 * H], alpha
    monkeypatch.setattr(convert, "convert_lora", convert.convert_uso_lora)
    require_same(flux, saved(to_xlabs(given)), 6)


def test_biases(flux: Any, saved: Callable) -> None:
    tensors = written(factors([PROJ, QKV]), "diffusion_model.")
    tensors[f"diffusion_model.{QKV}.diff_b"] = random_of(3 * H)
    require_same(flux, saved(tensors), 3)


@pytest.mark.parametrize("prefix", ["lycoris_", "diffusion_model.", "lora_unet_"])
@pytest.mark.parametrize("method", ["loha", "lokr", "lokr of four"])
def test_loha_and_lokr(flux: Any, saved: Callable, prefix: str, method: str) -> None:
    layer = "transformer_blocks.1.attn.to_k" if prefix == "lycoris_" else PROJ
    layer = layer if prefix == "diffusion_model." else layer.replace(".", "_")
    a, b = (256, 3), (3, 256)
    if method == "loha":
        shapes = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
    elif method == "lokr":
        shapes = {"lokr_w1": (8, 16), "lokr_w2_a": (32, 3), "lokr_w2_b": (3, 16)}
    else:
        shapes = {"lokr_w1_a": (16, 2), "lokr_w1_b": (2, 8), "lokr_w2_a": (16, 3),
                  "lokr_w2_b": (3, 32)}  # fmt: skip
    tensors = {f"{prefix}{layer}.{name}": random_of(*shape) for name, shape in shapes.items()}
    tensors[f"{prefix}{layer}.alpha"] = torch.tensor(2.0)
    require_same(flux, saved(tensors), 1)


def test_terms_of_clip(saved: Callable) -> None:
    import comfy.lora

    name = "encoder.layers.1.mlp.fc1"
    shape = CLIP.mlp_width, CLIP.width
    given = {name: (random_of(3, shape[1]), random_of(shape[0], 3), 2.0)}
    path = saved(written(given, "lora_te1_text_model_", DOWN_UP, underscores=True))
    weight = f"clip_l.transformer.text_model.{name}.weight"
    model = torch.nn.Module()
    monkey = {weight: torch.zeros(shape)}
    model.state_dict = lambda: monkey
    keys = comfy.lora.model_lora_keys_clip(model, {})
    ((key, patch),) = comfy.lora.load_lora(load_file(path), keys).items()
    assert key == weight
    expected = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], torch.zeros(shape), key)
    adapter = load_lora(path, DIT, CLIP, torch.float32)
    found = change(adapter.text_encoder["clip.encoders.1.fc1"], shape)
    assert (found - expected).norm() < 1e-5 * expected.norm()
