"""The tests in `inside` run in the process of a server that ComfyUI's own main.py has started."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from comfyui_server import Server
from majicflux.benchmarks.random_models import write_random_models

INSIDE = Path(__file__).parent / "inside"
IN_COMFYUI = "comfy.cli_args" in sys.modules  # this process is such a server
BEGUN = pytest.StashKey[bool]()


def runs_elsewhere(item: pytest.Item) -> bool:
    return not IN_COMFYUI and INSIDE in item.path.parents


@pytest.fixture(scope="session")
def server_inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("inside")
    write_random_models(folder / "models")  # to these tests the fixture `models` is the server's
    comfyui = Path(os.environ["COMFYUI_PATH"])
    server = Server(comfyui, folder / "base", folder / "models", runs_tests=True)
    yield server
    server.stop()


def pytest_itemcollected(item: pytest.Function) -> None:
    if runs_elsewhere(item):
        item.fixturenames = ["server_inside"]  # its own are set up where it runs


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Take the outcome from the server, which runs all chosen ones of them in one go."""
    if not runs_elsewhere(pyfuncitem):
        return None
    server = pyfuncitem.funcargs["server_inside"]
    if BEGUN not in pyfuncitem.session.stash:
        pyfuncitem.session.stash[BEGUN] = True
        chosen = filter(runs_elsewhere, pyfuncitem.session.items)
        server.begin_tests([item.nodeid for item in chosen])
    outcome, said = server.outcome(pyfuncitem.nodeid)
    if outcome == "skipped":
        pytest.skip(said)
    if outcome == "failed":
        pytest.fail(said, pytrace=False)
    return True
