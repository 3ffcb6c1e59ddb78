"""How the tests in `inside` are run, with made-up ones."""

import sys
from pathlib import Path

import pytest

from comfyui_server import Server

MADE_UP = '''
import asyncio, sys
import pytest, torch

@pytest.mark.parametrize("name", ["a b", "[x]::y"])
def test_that_passes(name):
    """With nothing around it that a test of ComfyUI's executor could not bear."""
    assert asyncio.run(asyncio.sleep(0, "no loop runs here"))
    assert not torch.is_inference_mode_enabled()
    arguments = sys.modules["comfy.cli_args"].args
    assert arguments.cpu and arguments.base_directory, "the command line was read"

def test_that_fails():
    print("said before")
    assert 1 == 2, "what is wrong"

def test_that_is_skipped():
    pytest.skip("not here")

@pytest.fixture
def broken():
    yield
    raise ValueError("left broken")

def test_that_leaves_something_broken(broken):
    pass
'''  # fmt: skip


@pytest.fixture
def made_up(tmp_path: Path) -> str:
    path = tmp_path / "test_made_up.py"
    path.write_text(MADE_UP)
    return str(path)


def test_outcomes_come_back_with_what_was_said(server_inside: Server, made_up: str) -> None:
    server_inside.begin_tests([made_up])  # it is in no folder of ours, and no part of the ids
    for name in ("a b", "[x]::y"):
        assert server_inside.outcome(f"::test_that_passes[{name}]") == ("passed", "")
    outcome, said = server_inside.outcome("::test_that_fails")
    assert outcome == "failed"
    assert "what is wrong" in said
    assert "said before" in said
    skipped = server_inside.outcome("::test_that_is_skipped")
    assert skipped == ("skipped", "Skipped: not here")
    outcome, said = server_inside.outcome("::test_that_leaves_something_broken")
    assert outcome == "failed"
    assert "left broken" in said


def test_one_that_does_not_run_has_failed(server_inside: Server, made_up: str) -> None:
    server_inside.begin_tests([f"{made_up}::test_that_fails"])
    outcome, said = server_inside.outcome("::test_that_is_not_there")
    assert (outcome, said.splitlines()[0]) == ("failed", "It did not run.")


def test_comfyui_is_in_no_process_of_ours() -> None:
    assert "comfy" not in sys.modules
