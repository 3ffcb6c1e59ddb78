"""The sums and pages of `majicflux compare`."""

import json
import re
from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from statistics import stdev

import numpy as np
import psutil
import pytest
from PIL import Image

from majicflux.lab import comparison as lab
from majicflux.lab import report_page
from majicflux.lab.comparison import Comparison, Painted, Pair, as_dict, measured, spread
from majicflux.lab.report_page import MOST_SHOWN, page
from majicflux.lab.report_text import markdown

pytest.importorskip("flip_evaluator")  # which has no build for Python 3.14
API = Path(__file__).parents[2] / "workflows" / "api"
SMALL = {"width": 64, "height": 64, "steps": 2}
SOUND, ROUNDED, WRONG = "sound", "rounded", "wrong"  # transformers, the last with a defect
DEFECT = "double_blocks.1.img_mlp.0.weight_scale"
TIMES = 2.0  # of what it should be


@pytest.fixture
def pairs(tmp_path: Path) -> Callable[[int, int], Comparison]:
    """A function that makes a comparison of so many pairs, each more distorted than the last."""

    def make(count: int, side: int = 64) -> Comparison:
        (tmp_path / "pairs").mkdir(exist_ok=True)
        random = np.random.default_rng(0)
        clean = random.integers(60, 190, (4, 4, 3), np.uint8).repeat(side // 4, 0)
        clean = clean.repeat(side // 4, 1)
        reference = tmp_path / "reference.png"
        Image.fromarray(clean).save(reference)
        found = []
        for n in range(count):
            noise = random.normal(0, 2 * n % 40, clean.shape)
            path = tmp_path / f"{n}.png"
            Image.fromarray((clean + noise).clip(0, 255).astype(np.uint8)).save(path)
            files = reference, path, tmp_path / "pairs" / path.name
            pair = Pair(f"{n}", "b<i>" if n % 2 else "c", "a & b", n, *files, {}, (), ())
            given = Painted(reference, None, "0"), Painted(path, None, str(n))
            pair = measured(pair, *given, tmp_path / "pairs")
            found.append(replace(pair, steps=(0.1, 0.2 + n / 10)))
        return Comparison(
            "graph", ("5.cfg",), ("a", "b<i>", "c"), ("a & b",), (*range(count),), tuple(found),
            {"x": "no memory"}, "MajicFlux: 1",
        )  # fmt: skip

    return make


def test_mean_spread_and_worst_case_are_those_of_the_pairs(pairs) -> None:
    found = pairs(6)
    for metric, worst in (("flip", max), ("ssim", min), ("psnr", min)):
        values = [pair.values[metric] for pair in found.of("c")]
        got = found.spread("c", metric)
        assert got.mean == pytest.approx(sum(values) / 3)
        assert got.deviation == pytest.approx(stdev(values))
        assert (got.worst, got.worst_id) == (worst(values), "4")
    assert found.spread("c", "lpips") is None
    assert spread(found.pairs[:1], "flip").deviation == 0
    assert found.steps("c") == pytest.approx([0.1, 0.4])
    changed = replace(found.pairs[1], values={**found.pairs[1].values, "layout": 0.2})
    with_changed = replace(found, pairs=(changed, *found.pairs[2:]))
    assert [pair.id for pair in with_changed.worst()] == ["1", "5", "4", "3", "2"]
    assert [with_changed.changed(label) for label in ("b<i>", "c")] == [1, 0]


def test_the_page_asks_for_nothing_and_holds_no_more_pictures_for_more_pairs(pairs) -> None:
    found = pairs(2 * MOST_SHOWN)
    html = page(found)
    sources = re.findall(r'(?:src|href|action|poster|srcset)="([^"]*)"', html)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?:|url\(|@import|//\w+\.", re.sub(r"base64,[\w+/=]+", "", html))
    assert html.count("<article") == MOST_SHOWN
    assert "b<i>" not in html
    assert "b&lt;i&gt; against" not in html, "there are two"
    assert "b&lt;i&gt;, c against a" in html
    assert "a &amp; b" in html
    assert "no memory" in html


def test_json_and_markdown_have_the_same_numbers(pairs) -> None:
    found = replace(pairs(4), failures={"x": "no\n\nmemory"})
    numbers = json.loads(json.dumps(as_dict(found), allow_nan=False))
    text = markdown(found)
    for label, settings in numbers["settings"].items():
        flip = settings["flip"]
        row = f"| {label} | {flip['mean']:.4f} ± {flip['deviation']:.4f}, worst {flip['worst']:.4f}"
        assert row in text
    assert numbers["worst"][0] == "3"
    assert re.search(r"\| 3 \| 0\.\d{4} \|", text)
    assert "- x: no memory" in text
    assert set(numbers["packages"]) == {"flip-evaluator", "piq", "ssimulacra2"}


@pytest.mark.parametrize("steps", [2, 4, 8, 20, 26, 50, 100, 1000])
def test_the_numbers_of_steps_have_room_below_the_chart(steps: int) -> None:
    drawn = report_page._axes([[0.1] * steps])
    told = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">(\d+)<', drawn)
    places = [float(x) for x, _ in told]
    assert (told[0][1], told[-1][1]) == ("1", str(steps))
    assert min(b - a for a, b in pairwise(places)) > 25


def test_a_picture_of_noise_is_embedded_as_any_other() -> None:
    """What a broken setting paints: it takes more bytes than Pillow makes room for to optimize."""
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
    head, _, data = report_page._jpeg(Image.fromarray(noise), 1024).partition(",")
    assert head == "data:image/jpeg;base64"
    found = np.asarray(Image.open(BytesIO(b64decode(data))), np.float32)
    assert np.abs(found - noise).mean() < 20


def test_a_report_is_in_the_users_language(pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    found = pairs(2)
    html = page(found)
    assert '<html lang="zh">' in html
    shown = re.sub(r"<style>.*?</style>|<script>.*?</script>|<[^>]*>", " ", html, flags=re.DOTALL)
    known = (
        "FLIP SSIM PSNR L MajicFlux latent Transformer dB piq flip evaluator graph no memory cfg"
    )
    left = {*re.findall(r"[A-Za-z]{3,}", shown)} - {*known.split()}
    assert left <= {"amp", "ssimulacra", "SSIMULACRA"}, "all else is Chinese"
    assert "构图变了" in markdown(found)


def test_a_hundred_pairs_take_no_more_memory_than_ten(pairs) -> None:
    pairs(10)
    before = psutil.Process().memory_info().rss
    page(pairs(100))
    assert psutil.Process().memory_info().rss - before < 100e6


def test_a_pair_is_measured_anew_when_its_picture_or_a_package_is_another(
    pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pairs(2).pairs[1]
    times = []
    original = lab.compare_pictures
    monkeypatch.setattr(lab, "compare_pictures", lambda *g: times.append(1) or original(*g))

    def again(digest: str) -> int:
        given = Painted(pair.reference, None, "0"), Painted(pair.picture, None, digest)
        measured(pair, *given, tmp_path / "pairs")
        return len(times)

    assert again("1") == 0
    assert again("other") == 1
    monkeypatch.setattr(lab, "package_versions", lambda: {"piq": "9"})
    assert again("other") == 2
    pair.error_map.unlink()
    assert again("other") == 3
