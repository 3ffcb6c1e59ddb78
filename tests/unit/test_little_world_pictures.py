"""The demo models paint what a prompt says, through the whole pack, and every option shows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RecordingPatcher, build_pipeline
from thin_weights import thinned
from torch import Tensor

from majicflux.benchmarks.measuring import relative_error
from majicflux.engine.flux.vae import VAE
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.engine.run.pipeline import Pipeline, denoise, encode_prompts, paint
from majicflux.engine.run.request import GenerationRequest
from majicflux.host.native import pasted
from majicflux.loaders.demo_models import VAE_FILE, write_demo_models
from majicflux.loaders.vae import load_vae
from majicflux.tools.little_world.read_back import read_back

REQUEST = GenerationRequest("", seed=1, steps=8, guidance=3.5, width=256, height=256)
USUAL = "float8_e4m3fn"
EIGHT_BITS = (USUAL, "int8 rotated")
OfPrecision = Callable[[str], Pipeline]
Paint = Callable[..., Tensor]


@dataclass(frozen=True)
class Asked:
    """A prompt, and what is read back from its picture."""

    kind: str
    prompt: str
    shown: dict[str, Any]


HOUSE = Asked(
    "meadow",
    "a red house on the left, a white car, by day, summer, no trees, green hills, clear sky",
    {"house": "red", "place": "left", "car": "white", "time": "day", "season": "summer"},
)
ASKED = {
    "house": HOUSE,
    "winter night": Asked(
        "meadow",
        "一座蓝色的房子在右边,一辆黄色的汽车,没有树,冬天,夜晚,晴朗的天空,月亮",
        {"house": "blue", "place": "right", "car": "yellow", "time": "night", "season": "winter"},
    ),
    "city": Asked(
        "city",
        "a cyberpunk city street, rainy night, green and orange neon signs, two flying cars "
        "overhead",
        {"time": "night", "neon": frozenset({"green", "orange"})},
    ),
    "sea": Asked(
        "sea",
        "大海,两艘红色的帆船,日落,夏天,晴朗的天空",
        {"time": "sunset", "season": "summer", "sails": "red"},
    ),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> OfPrecision:
    """Of the demo models; it computes in float32, which every processor rounds alike, and decodes
    without the empty channels of the VAE, which are most of a processor's time."""
    folder: Path = tmp_path_factory.mktemp("demo")
    write_demo_models(folder)
    thin = thinned(load_vae(folder / VAE_FILE, torch.float32))
    vae = VAE(thin, RecordingPatcher(thin), torch.float32)
    return cache(
        lambda name: replace(build_pipeline(folder, PRECISIONS[name], torch.float32), vae=vae)
    )


@pytest.fixture(scope="module")
def painted(pipeline: OfPrecision) -> Paint:
    """Paints RGB [pictures, height, width, 3] in 0..1, the same ones once for all tests."""

    @cache
    def painted(prompt: str, precision: str, **options: Any) -> Tensor:
        request = replace(REQUEST, prompt=prompt, **options)
        return paint(pipeline(precision), request, lambda _: None, lambda: None)[0]

    return lambda prompt, precision=USUAL, **options: painted(prompt, precision, **options)


def seen(pictures: Tensor, kind: str = "meadow") -> dict[str, Any]:
    """What is read from the first of them."""
    return read_back((pictures[0] * 255).round().numpy().astype(np.uint8), kind)


def psnr(pictures: Tensor, others: Tensor) -> float:
    """In dB, of values in 0..1."""
    return -10 * (pictures - others).square().mean().log10().item()


def test_the_vae_of_the_file_gives_the_same_pictures(pipeline: OfPrecision, tmp_path: Path) -> None:
    write_demo_models(tmp_path)
    full = load_vae(tmp_path / VAE_FILE, torch.float32)
    vae = pipeline(USUAL).vae
    assert vae is not None
    latents = torch.randn(1, 16, 6, 4, generator=torch.Generator().manual_seed(0))
    found, right = (each.decode(latents)[0] for each in (vae, replace(vae, weights=full)))
    torch.testing.assert_close(found, right, rtol=0, atol=1e-4)
    found, right = (each.encode(right)[0] for each in (vae, replace(vae, weights=full)))
    torch.testing.assert_close(found, right, rtol=0, atol=1e-3)


@pytest.mark.parametrize("precision", EIGHT_BITS)
@pytest.mark.parametrize("name", ASKED)
def test_a_picture_shows_what_the_prompt_says(painted: Paint, name: str, precision: str) -> None:
    asked = ASKED[name]
    found = seen(painted(asked.prompt, precision), asked.kind)
    assert {name: found[name] for name in asked.shown} == asked.shown


@pytest.mark.parametrize("name", ["house", "city", "sea"])  # the night's moon changes its side
def test_eight_bits_paint_nearly_the_picture_of_bfloat16(painted: Paint, name: str) -> None:
    pictures = [painted(ASKED[name].prompt, each) for each in (*EIGHT_BITS, "bfloat16")]
    float8, int8 = (psnr(picture, pictures[2]) for picture in pictures[:2])
    assert float8 > 30
    assert int8 > float8 + 4


@pytest.mark.parametrize("name", ASKED)
def test_our_float8_is_ahead_of_the_plain_cast(pipeline: OfPrecision, name: str) -> None:
    """Before a picture has taken one of several ways, which a small error can decide."""
    (prompt,), _ = encode_prompts(pipeline("bfloat16"), [ASKED[name].prompt], lambda: None)
    request = replace(REQUEST, prompt=prompt, steps=2)
    exact, cast, float8, int8 = (
        denoise(pipeline(precision), request, lambda _: None, lambda: None)[0]
        for precision in ("bfloat16", "float8_e4m3fn unscaled", *EIGHT_BITS)
    )
    assert relative_error(float8, exact) < 0.7 * relative_error(cast, exact)
    assert relative_error(int8, exact) < 0.4 * relative_error(float8, exact)


def test_image_to_image_keeps_the_scene_or_takes_the_prompt(painted: Paint) -> None:
    picture = painted(HOUSE.prompt)
    other = "a blue house on the left, a yellow car, by day, winter, no trees, snowy hills"
    little, much = (painted(other, picture=picture, strength=s) for s in (0.3, 0.9))
    names = ("house", "car", "season")
    assert [seen(little)[name] for name in names] == ["red", "white", "summer"]
    assert [seen(much)[name] for name in names] == ["blue", "yellow", "winter"]


def test_inpainting_paints_the_prompt_inside_and_nothing_outside(painted: Paint) -> None:
    picture = painted(HOUSE.prompt)
    mask = torch.zeros(1, 256, 256)
    mask[:, 90:200, :150] = 1
    blue = painted(HOUSE.prompt.replace("red", "blue"), picture=picture, mask=mask)
    whole = pasted(blue, picture, mask)
    assert seen(whole) == seen(picture) | {"house": "blue"}
    outside = mask[0] == 0
    assert torch.equal(whole[:, outside], picture[:, outside])
    assert psnr(blue[:, outside], picture[:, outside]) > 25, "before anything is pasted"


def test_a_negative_prompt_removes_what_it_names(painted: Paint) -> None:
    prompt = "a house on the left, by day, summer, no trees, no car"
    colour = seen(painted(prompt))["house"]
    assert colour
    negative = prompt.replace("a house", f"a {colour} house")
    without = seen(painted(prompt, negative=negative, cfg=2.0))
    assert without["house"] not in ("", colour)


def test_guidance_changes_the_picture_and_not_what_it_shows(painted: Paint) -> None:
    low, usual, high = (
        painted(HOUSE.prompt, **g) for g in ({"guidance": 1.0}, {}, {"guidance": 6.0})
    )
    for picture in (low, usual, high):
        assert HOUSE.shown.items() <= seen(picture).items()
    assert psnr(low, high) < min(psnr(low, usual), psnr(usual, high)) < 45


def test_a_batch_is_its_single_pictures(painted: Paint) -> None:
    batch = painted(HOUSE.prompt, steps=3, batch_size=2)
    single = painted(HOUSE.prompt, steps=3)
    assert torch.allclose(batch[:1], single, atol=1e-3)
    assert psnr(batch[1:], single) < 25, "each has noise of its own"
