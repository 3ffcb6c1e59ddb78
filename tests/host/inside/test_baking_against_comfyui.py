"""Weights with a LoRA baked in, beside those that ComfyUI's own code patches, in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from file_layouts import Tensors
from lora_kinds import KINDS, WEIGHT
from majicflux.engine.diffsynth_files import diffsynth_module
from majicflux.engine.quant.formats import FLOAT32, PRECISIONS, uniform
from majicflux.loaders import demo_models
from majicflux.loaders.flux_dit import load_flux_dit

EXACT = uniform(FLOAT32)
pytestmark = pytest.mark.usefixtures("comfy")
# For DoRA on the output axis ComfyUI takes the norms of the weight without the change, where those
# who train it, and we, take those of both together.
READ = [kind for kind in KINDS if kind != "DoRA of rows"]


@pytest.fixture(scope="module")
def flux(models: Path) -> Any:
    """ComfyUI's own model of the demo file, in float32."""
    import comfy.model_detection

    state = load_file(models / demo_models.DIT_FILE)
    config = comfy.model_detection.model_config_from_unet(state, "model.diffusion_model.")
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(state, "model.diffusion_model.", "cpu")
    model.load_model_weights(dict(state), "model.diffusion_model.")
    return model


def theirs(flux: Any, *loras: tuple[Path, float]) -> Tensors:
    """ComfyUI's weights with these patches, by its names."""
    import comfy.lora
    import comfy.lora_convert
    import comfy.utils

    weights = {name: w.detach().float().clone() for name, w in flux.state_dict().items()}
    keys = comfy.lora.model_lora_keys_unet(flux, {})
    for path, strength in loras:
        found = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(str(path)))
        patches = comfy.lora.load_lora(found, keys)
        assert patches
        for key, patch in patches.items():
            name, *rest = key if isinstance(key, tuple) else (key,)
            offset, function = (*rest, None, None)[:2]
            given = [(strength, patch, 1.0, offset, function)]
            weights[name] = comfy.lora.calculate_weight(given, weights[name], name)
    plain = {name.removeprefix("diffusion_model."): w for name, w in weights.items()}
    return diffsynth_module("utils.state_dict_converters.flux_dit").FluxDiTStateDictConverter(
        {name.replace("_norm.weight", "_norm.scale"): w for name, w in plain.items()}
    )


def ours(models: Path, *loras: tuple[Path, float], precision=EXACT) -> Tensors:
    weights, _ = load_flux_dit(models / demo_models.DIT_FILE, precision, baked=loras)
    return {name: p.detach() for name, p in weights.module.named_parameters()}


def named(kind: str) -> Tensors:
    """The file with the prefixes by which ComfyUI knows the names."""
    ours_first = ("double_blocks", "single_blocks", "final_layer")
    return {
        f"{'diffusion_model.' if name.startswith(ours_first) else 'transformer.'}{name}": tensor
        for name, tensor in KINDS[kind][0].items()
    }


def require_same(found: Tensors, expected: Tensors, most: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert (weight.float() - expected[name]).norm() <= most * expected[name].norm(), name


@pytest.mark.parametrize("strength", [1.0, 0.3, -1.0])
@pytest.mark.parametrize("kind", READ)
def test_each_kind(flux, models: Path, saved: Callable, kind: str, strength: float) -> None:
    lora = saved(named(kind)), strength
    expected = theirs(flux, lora)
    require_same(ours(models, lora), expected)
    changed = KINDS[kind][1]
    assert not torch.equal(theirs(flux)[changed], expected[changed])


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_dora_of_rows_but_for_its_norms(flux, models, saved: Callable, strength: float) -> None:
    """ComfyUI is given magnitudes by which its norms become ours."""
    tensors = named("DoRA of rows")
    ours_is = ours(models, (saved(tensors), strength))
    magnitude = next(name for name in tensors if name.endswith("dora_scale"))
    before = theirs(flux)[WEIGHT]
    plain = {name: tensor for name, tensor in tensors.items() if name != magnitude}
    after = theirs(flux, (saved(plain), 1.0))[WEIGHT]
    ratio = before.norm(dim=1, keepdim=True) / after.norm(dim=1, keepdim=True)
    tensors[magnitude] = tensors[magnitude] * ratio
    require_same(ours_is, theirs(flux, (saved(tensors), strength)), 1e-5)


def test_a_chain(flux, models: Path, saved: Callable) -> None:
    kinds = ("full LoKr", "DoRA of columns", "of a part", "diff", "LoHa")
    loras = [(saved(named(kind), f"{kind}.safetensors"), 0.5 - i) for i, kind in enumerate(kinds)]
    require_same(ours(models, *loras), theirs(flux, *loras))


def test_bfloat16(flux, models: Path, saved: Callable) -> None:
    """Rounded once, to the nearest."""
    lora = saved(named("full LoKr")), 0.7
    found, expected = ours(models, lora, precision=PRECISIONS["bfloat16"]), theirs(flux, lora)
    name = KINDS["full LoKr"][1]
    assert (found[name].float() - expected[name]).abs().max() <= 2**-8 * expected[name].abs().max()
    require_same(found, expected, 2**-8)
