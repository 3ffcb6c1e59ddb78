"""ComfyUI's own canvas in headless Chromium."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from comfyui_server import Server
from majicflux.dev import NEWEST_CANVAS, find_chromium

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
# The canvas begins with a workflow of its own, which would replace one that is opened before it.
READY = (
    "!!(window.app?.rootGraph?.nodes.length"
    " && window.LiteGraph?.registered_node_types?.MajicFluxSample)"
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("NOT TESTED ON THE CANVAS: no Chromium was found; install it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session", params=["newest", "pinned"])
def server(
    request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A running ComfyUI with the newest canvas, then with the one that it pins."""
    flags = ["--cpu"]
    if request.param == "newest":
        if not NEWEST_CANVAS.is_dir():
            pytest.skip("NOT TESTED ON THE NEWEST CANVAS: `python dev.py test` installs it")
        flags += ["--front-end-root", str(NEWEST_CANVAS)]
    server = Server(Path(os.environ["COMFYUI_PATH"]), tmp_path_factory.mktemp("c"), models, flags)
    yield server
    server.stop()


@pytest.fixture
def open_canvas(browser: Browser, server: Server) -> Iterator[Callable[..., Page]]:
    """Open a workflow as the canvas does when a file is dropped on it."""
    pages = []

    def open_workflow(workflow: dict, language: str = "en-US") -> Page:
        page = browser.new_page(viewport={"width": 1600, "height": 900}, locale=language)
        pages.append(page)
        page.goto(f"http://{server.address}")
        page.wait_for_function(READY, timeout=60_000)
        page.evaluate("workflow => app.loadGraphData(workflow, true, true, 'test')", workflow)
        return page

    yield open_workflow
    for page in pages:
        page.close()
    server.forget_settings()
