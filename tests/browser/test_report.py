"""The report of a comparison, as a browser shows it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from majicflux.lab.comparison import Comparison, Painted, Pair, measured
from majicflux.lab.report_page import page as report_page

pytest.importorskip("flip_evaluator")  # which has no build for Python 3.14
SIZES = [(1366, 768), (390, 844)]  # of a laptop, of a phone


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)
    for name in ("reference", "other"):
        pixels = random.integers(0, 255, (96, 128, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    reference, other = (Painted(folder / f"{n}.png", None, n) for n in ("reference", "other"))
    label = "float8_e4m3fn unscaled, 8-bit"
    files = reference.picture, other.picture, folder / "map.png"
    prompt = "a long prompt " * 30
    pair = measured(Pair("id", label, prompt, 0, *files, {}, (), ()), reference, other, folder)
    comparison = Comparison(
        "text_to_image", ("weight_precision",), ("bfloat16", label), (prompt,), (0,), (pair,),
        {"a_picture_with_a_long_name-p0-s0": "no memory " * 20}, "MajicFlux: 1\n" + "card " * 60,
    )  # fmt: skip
    path = folder / "report.html"
    path.write_text(report_page(comparison), encoding="utf-8")
    return path


@pytest.fixture(params=SIZES, ids=["laptop", "phone"])
def opened(request: pytest.FixtureRequest, browser: Browser, report: Path):
    """The page, and the addresses that it has asked for."""
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(report.as_uri())
    page.wait_for_load_state("networkidle")
    yield page, asked, errors
    page.close()


def test_it_asks_for_nothing_but_itself(opened: tuple[Page, list[str], list[str]]) -> None:
    page, asked, errors = opened
    assert [url for url in asked if not url.startswith("data:")] == [page.url]
    assert errors == []
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    # Nor could it, whatever stood in it.
    page.evaluate("document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.1/' }))")
    page.wait_for_timeout(100)
    assert "Content Security Policy" in errors[0]


def test_nothing_is_wider_than_the_screen(opened: tuple[Page, list[str], list[str]]) -> None:
    page, _, _ = opened
    width = page.evaluate("innerWidth")
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_the_line_between_the_pictures_is_moved(
    opened: tuple[Page, list[str], list[str]],
) -> None:
    page, _, _ = opened
    slider = page.locator(".slider")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] * 0.25, box["y"] + box["height"] / 2)
    edge = page.locator(".slider .edge").bounding_box()
    assert edge is not None
    share = (edge["x"] - box["x"]) / box["width"]
    assert share == pytest.approx(0.25, abs=0.04)
    before = edge["x"]
    page.keyboard.press("ArrowRight")
    moved = page.locator(".slider .edge").bounding_box()
    assert moved is not None
    assert moved["x"] > before
