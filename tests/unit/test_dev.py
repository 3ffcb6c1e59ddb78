"""The set-up script: what it can be tested for without installing anything."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

DEV = Path(__file__).parents[2] / "dev.py"


@pytest.fixture
def dev(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    spec = importlib.util.spec_from_file_location("dev", DEV)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(module, "ROOT", tmp_path / "ComfyUI" / "custom_nodes" / "majicflux")
    monkeypatch.setattr(module.Path, "home", lambda: tmp_path / "home")
    return module


def checkout(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comfyui_version.py").touch()
    return folder


def test_a_wrong_call_explains_itself() -> None:
    done = subprocess.run([sys.executable, DEV, "tset"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "python dev.py demo" in done.stdout


def test_what_it_runs_to_write_files_is_there(dev) -> None:
    assert dev.WRITERS.keys() == {"locales", "templates"}
    assert all((DEV.parent / script).is_file() for script in dev.WRITERS.values())


def test_comfyui_is_found_where_people_have_it(dev, tmp_path: Path, monkeypatch) -> None:
    assert dev.find_comfyui() is None
    default = checkout(dev.default_comfyui())
    assert dev.find_comfyui() == default
    around = checkout(tmp_path / "ComfyUI")  # this pack is in its custom_nodes
    assert dev.find_comfyui() == around
    named = checkout(tmp_path / "elsewhere")
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    assert dev.find_comfyui() == named


@pytest.fixture
def commands(dev, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was run; everything passes, and nothing is installed."""
    ran: list[list[str]] = []
    monkeypatch.setattr(dev, "install", lambda *_: None)
    monkeypatch.setattr(dev, "run", lambda *command: ran.append([*map(str, command)]) or 0)
    return ran


@pytest.mark.parametrize("option", [[], ["--in-comfyui"]])
@pytest.mark.parametrize("chromium", [None, "/usr/bin/chromium"])
@pytest.mark.parametrize("comfyui", [False, True])
def test_what_is_absent_is_said_and_fails_where_nothing_may_be_left_out(
    dev, commands, monkeypatch, capsys, option: list[str], chromium: str | None, comfyui: bool
) -> None:
    if comfyui:
        checkout(dev.default_comfyui())
    monkeypatch.setenv("COMFYUI_PATH", "")  # put back afterwards, whatever `test` sets
    monkeypatch.setattr(dev.shutil, "which", lambda name: chromium)
    complete = comfyui and chromium is not None
    assert dev.test([*option, "-x"]) == (1 if option and not complete else 0)
    said = capsys.readouterr().out
    assert ("NOT TESTED IN COMFYUI" in said) != comfyui
    assert ("NOT TESTED ON THE CANVAS" in said) == (chromium is None)
    if complete:
        assert commands[-1][1:] == ["tests/host", "tests/browser", "-x"]
