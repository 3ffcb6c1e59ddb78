"""The LoRA of the demo models, merged by hand into the plain ones: the same scene in sepia."""

import re

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from file_layouts import Tensors
from majicflux.loaders.demo_models import LITTLE_WORLD, LORA, WEIGHTS, unpacked
from majicflux.tools.little_world.flow import paint_latents
from majicflux.tools.little_world.models import LittleFlux
from majicflux.tools.little_world.thin_vae import ThinVAE
from majicflux.tools.little_world.vocabulary import Words

RANK = 8
SIZE = (256, 256)
PROMPT = "a red house, a green car, two pine trees, on a sunny day, green hills, clear sky"
KOHYA = re.compile(
    r"lora_unet_(double_blocks_\d+_(img|txt)_attn_(qkv|proj)|single_blocks_\d+_linear[12])"
    r"\.(lora_down\.weight|lora_up\.weight|alpha)"
)


@pytest.fixture(scope="module")
def lora() -> Tensors:
    return load_file(LITTLE_WORLD / LORA)


@pytest.fixture(scope="module")
def painted(lora: Tensors) -> dict[float, Tensor]:
    """Strength -> picture [3, height, width] in 0..1."""
    tensors = unpacked(load_file(LITTLE_WORLD / WEIGHTS))
    vae = ThinVAE().load(part(tensors, "vae."))
    words, found = Words(LITTLE_WORLD), {}
    for strength in (-1.0, 0.0, 1.0):
        model = LittleFlux()
        model.load_state_dict(
            {name: t for name, t in tensors.items() if not name.startswith("vae.")}
        )
        merge(model, lora, strength)
        latents = paint_latents(model, words, [PROMPT], SIZE, torch.device("cpu"), steps=4)
        with torch.no_grad():
            found[strength] = (vae.decoder(latents)[0].clamp(-1, 1) + 1) / 2
    return found


def part(tensors: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@torch.no_grad()
def merge(model: LittleFlux, lora: Tensors, strength: float) -> None:
    for path, weight in model.dit.named_parameters():
        name = "lora_unet_" + path.removesuffix(".weight").replace(".", "_")
        if f"{name}.alpha" in lora:
            up, down = (lora[f"{name}.lora_{side}.weight"].float() for side in ("up", "down"))
            weight += strength * lora[f"{name}.alpha"].float() / len(down) * up @ down


def warmth(picture: Tensor) -> float:
    """How much more red than blue."""
    red, _, blue = picture.mean((1, 2)).tolist()
    return red - blue


def spread(picture: Tensor) -> float:
    """Of the saturation, between the pixels."""
    return float((picture.amax(0) - picture.amin(0)).std())


def test_the_file_is_small_and_in_kohyas_dialect(lora: Tensors) -> None:
    assert (LITTLE_WORLD / LORA).stat().st_size < 300e3
    assert all(KOHYA.fullmatch(name) for name in lora)
    assert len(lora) == 3 * len({name.partition(".")[0] for name in lora})
    for name, tensor in lora.items():
        assert tensor.isfinite().all()
        if name.endswith("alpha"):
            assert tensor == RANK
        else:
            assert tensor.shape[0 if "down" in name else 1] == RANK


def test_with_it_a_picture_is_brown(painted: dict[float, Tensor]) -> None:
    red, green, blue = painted[1].mean((1, 2)).tolist()
    assert red > green > blue
    assert spread(painted[1]) < 0.6 * spread(painted[0])


def test_without_it_it_is_not(painted: dict[float, Tensor]) -> None:
    red, green, blue = painted[0].mean((1, 2)).tolist()
    assert not red > green > blue


def test_a_strength_moves_the_colour_its_way(painted: dict[float, Tensor]) -> None:
    assert warmth(painted[-1]) < warmth(painted[0]) < warmth(painted[1])
