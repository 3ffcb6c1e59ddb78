"""How far two pictures are apart: what the libraries' makers and plain arithmetic say of them."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import flip_evaluator
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from majicflux.lab import picture_metrics
from majicflux.lab.comparison import latent_errors, worst_places
from majicflux.lab.picture_metrics import (
    METRICS,
    PACKAGES,
    MeasuringError,
    compare_pictures,
    in_colour,
    package_versions,
)
from majicflux.nodes.compare import Compare

SCENE = Path(__file__).parents[2] / "workflows" / "text_to_image.jpg"
# Of C++ ssimulacra2, for grey 128 against grey 128 + shift, 256 x 256:
# github.com/imazen/ssimulacra2, ssimulacra2/src/reference_data.rs
SSIMULACRA2_OF_SHIFT = {1: 96.150, 5: 89.732, 10: 80.291, 20: 59.779}


def grey(level: int, side: int = 256) -> np.ndarray:
    return np.full((side, side, 3), level, np.uint8)


def scene(side: int = 256) -> np.ndarray:
    with Image.open(SCENE) as picture:
        return np.asarray(picture.convert("RGB").resize((side, side)))


def noisy(picture: np.ndarray, amount: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, amount, picture.shape)
    return (picture + noise).round().clip(0, 255).astype(np.uint8)


def test_the_same_picture_has_the_best_value_of_each_metric() -> None:
    difference = compare_pictures(scene(), scene())
    assert difference.values == {
        name: pytest.approx(METRICS[name].best, abs=1e-6)
        for name in METRICS if name not in ("lpips", "latents")
    }  # fmt: skip
    assert not difference.error_map.any()
    assert not difference.changed


@pytest.mark.parametrize("shift", SSIMULACRA2_OF_SHIFT)
def test_a_change_of_brightness_has_the_values_of_the_formulas_and_of_the_makers(
    shift: int,
) -> None:
    values = compare_pictures(grey(128), grey(128 + shift)).values
    assert values["psnr"] == pytest.approx(20 * math.log10(255 / shift), abs=0.01)
    a, b, c = 128 / 255, (128 + shift) / 255, 0.01**2
    assert values["ssim"] == pytest.approx((2 * a * b + c) / (a * a + b * b + c), abs=5e-4)
    # The library treats the edges otherwise than C++ does, and nothing but edges is to be seen.
    assert values["ssimulacra2"] == pytest.approx(SSIMULACRA2_OF_SHIFT[shift], abs=4)


def test_green_and_blue_are_as_far_apart_as_flip_knows() -> None:
    """Its paper scales the difference of colours by that of these two."""
    green, blue = grey(0), grey(0)
    green[..., 1] = blue[..., 2] = 255
    assert compare_pictures(green, blue).values["flip"] == pytest.approx(1, abs=1e-4)


def test_flip_is_what_its_makers_program_says_of_the_files(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("reference.png", "test.png")]
    both = scene(), noisy(scene(), 20)
    for path, pixels in zip(paths, both, strict=True):
        Image.fromarray(pixels).save(path)
    colours, mean, _ = flip_evaluator.evaluate(paths[0], paths[1], "LDR")
    difference = compare_pictures(*both)
    assert difference.values["flip"] == pytest.approx(mean, abs=1e-4)
    ours = in_colour(difference.error_map) / 255
    assert np.abs(ours - colours).max() < 0.1, "the colours that everybody knows"


def test_ssimulacra2_is_what_the_library_says_of_the_files(tmp_path: Path) -> None:
    from ssimulacra2 import compute_ssimulacra2

    both = scene(), noisy(scene(), 5)
    for name, pixels in zip("ab", both, strict=True):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    expected = compute_ssimulacra2(str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    assert compare_pictures(*both).values["ssimulacra2"] == expected
    assert "ssimulacra2" not in compare_pictures(*(p[:255] for p in both)).values


def test_only_another_composition_is_counted_as_one() -> None:
    picture = scene(128)
    blurred = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.5))
    for same in (noisy(picture, 30), np.asarray(blurred), (picture * 0.9).astype(np.uint8)):
        assert not compare_pictures(picture, same).changed
    for other in (picture[:, ::-1], np.roll(picture, 30, axis=1), 255 - picture):
        assert compare_pictures(picture, other.copy()).changed


def test_the_latents_error_is_that_of_float64_at_each_pass(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    steps = {f"{n:03d}": torch.randn(1, 16, 8, 8).half() for n in range(3)}
    others = {name: (step * (1 + int(name) / 8)).half() for name, step in steps.items()}
    one, other, short, small = (tmp_path / f"{n}.safetensors" for n in "abcd")
    save_file(steps, one)
    save_file(others, other)
    save_file({"000": steps["002"]}, short)
    save_file({"000": steps["002"][..., :4].contiguous()}, small)
    expected = [
        (others[name].double() - step.double()).norm().item() / step.double().norm().item()
        for name, step in steps.items()
    ]
    assert latent_errors(one, other) == pytest.approx(expected, rel=1e-12)
    assert latent_errors(one, one) == [0, 0, 0]
    assert latent_errors(one, short) == [0], "the last passes"
    assert latent_errors(one, small) == []
    save_file({**others, "001": others["001"] * torch.inf}, other)
    assert math.isfinite(sum(latent_errors(one, other))), "what left the range of float16"


def test_crops_are_where_the_error_is_largest() -> None:
    error_map = np.zeros((100, 200), np.float32)
    error_map[60:70, 150:160], error_map[10:15, 20:25] = 0.5, 0.9
    (left, top, side), (other_left, other_top, _) = worst_places(error_map)
    assert left <= 150 <= 160 <= left + side
    assert top <= 60 <= 70 <= top + side
    assert other_left <= 20 <= 25 <= other_left + side
    assert other_top <= 10 <= 15 <= other_top + side
    assert worst_places(np.zeros((64, 64))) == []


def test_what_cannot_be_compared_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeasuringError, match="of one size are compared, not of 64x64 and 32x64"):
        compare_pictures(grey(0, 64), grey(0, 64)[:, :32])
    with pytest.raises(MeasuringError, match="a side of 8 pixels is too small"):
        compare_pictures(grey(0, 8), grey(0, 8))
    monkeypatch.setitem(PACKAGES, "no_such_metric", "no-such-metric")
    with pytest.raises(MeasuringError, match="python -m pip install no-such-metric"):
        compare_pictures(grey(0), grey(0))


def test_lpips_is_measured_only_where_nothing_has_to_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Network:
        def __init__(self, net: str, verbose: bool):
            assert net == "alex"

        def __call__(self, ours: torch.Tensor, theirs: torch.Tensor, normalize: bool):
            assert normalize, "they are in 0..1"
            return (ours - theirs).abs().mean()

    lpips = SimpleNamespace(LPIPS=Network, __spec__=object())
    monkeypatch.setitem(sys.modules, "lpips", lpips)
    monkeypatch.setattr(picture_metrics.metadata, "version", lambda name: "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        picture_metrics, "_lpips_network", picture_metrics._lpips_network.__wrapped__
    )
    assert "lpips" not in compare_pictures(grey(0), grey(51)).values
    assert "lpips" not in package_versions()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / picture_metrics.LPIPS_BACKBONE).touch()
    assert compare_pictures(grey(0), grey(51)).values["lpips"] == pytest.approx(0.2)
    assert "lpips" in package_versions()


# The node


def images(*pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).float() / 255


def test_the_node_gives_the_map_and_the_numbers_of_each_pair() -> None:
    batch = images(scene(), noisy(scene(), 20), scene()[:, ::-1])
    difference, text = Compare.execute(images(scene()), batch).args
    assert difference.shape == batch.shape
    assert not difference[0].sum(dim=(0, 1))[0], "black"
    assert difference[1].mean() > 0.02
    mean, same, other, mirrored = text.splitlines()
    assert mean.startswith("mean of 3: FLIP 0.")
    assert mean.endswith("; 1 with another composition")
    assert same.startswith("1: FLIP 0.0000, SSIMULACRA2 100.0, SSIM 1.0000, PSNR 80.0 dB, ")
    assert other.endswith("; the composition is the same")
    assert mirrored.endswith("; the composition is another one")
    one = Compare.execute(images(scene()), images(scene())).args[1]
    assert one == same.removeprefix("1: ")


def test_the_node_looks_at_colours_alone() -> None:
    picture = images(scene(64))
    with_alpha = torch.cat([picture, picture[..., :1]], dim=-1)
    difference, text = Compare.execute(with_alpha, picture).args
    assert difference.shape == picture.shape
    assert text.startswith("FLIP 0.0000, ")


def test_the_node_refuses_batches_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="3 pictures cannot be compared with 2 references"):
        Compare.execute(images(*[grey(0, 32)] * 2), images(*[grey(0, 32)] * 3))
