"""ComfyUI's own canvas in headless Chromium."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from picture_models import write_picture_models
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
def newest(request: pytest.FixtureRequest) -> bool:
    """Whether the canvas is the newest one, or else that which ComfyUI pins."""
    if request.param == "newest" and not NEWEST_CANVAS.is_dir():
        pytest.skip("NOT TESTED ON THE NEWEST CANVAS: `python dev.py test` installs it")
    return request.param == "newest"


@pytest.fixture(scope="session")
def server(
    newest: bool, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A running ComfyUI with the pack and the random models."""
    flags = ["--cpu", *(["--front-end-root", str(NEWEST_CANVAS)] if newest else [])]
    server = Server(Path(os.environ["COMFYUI_PATH"]), tmp_path_factory.mktemp("c"), models, flags)
    write_picture_models(server.base / "models")
    yield server
    server.stop()


def open_workflow(page: Page, workflow: dict) -> None:
    """As the canvas does when a file is dropped on it."""
    page.evaluate("workflow => app.loadGraphData(workflow, true, true, 'test')", workflow)


@contextmanager
def canvas_of(browser: Browser, server: Server, newest: bool) -> Iterator[Callable[..., Page]]:
    """Open a canvas with a workflow, or none.

    nodes2: in Nodes 2.0, which is for most what they see in the newest canvas.
    """
    pages = []

    def open_canvas(
        workflow: dict | None,
        language: str = "en-US",
        nodes2: bool = newest,
        size: tuple[int, int] = (1600, 900),
    ) -> Page:
        server.forget_settings(**{"Comfy.VueNodes.Enabled": nodes2})
        width, height = size
        page = browser.new_page(viewport={"width": width, "height": height}, locale=language)
        pages.append(page)
        page.goto(f"http://{server.address}")
        page.wait_for_function(READY, timeout=60_000)
        if workflow is not None:
            open_workflow(page, workflow)
        return page

    yield open_canvas
    for page in pages:
        page.close()
    server.forget_settings()


@pytest.fixture
def open_canvas(browser: Browser, server: Server, newest: bool) -> Iterator[Callable[..., Page]]:
    with canvas_of(browser, server, newest) as open_one:
        yield open_one
