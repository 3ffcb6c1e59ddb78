"""The set-up script: what it can be tested for without installing anything."""

import importlib.util
import re
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
    monkeypatch.setattr(
        dev, "failing", lambda commands, beside: [dev.run(*c) for c in [*commands, *beside]][:0]
    )
    return ran


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_output_of_what_runs_beside_comes_last(dev, capfd) -> None:
    dev.ROOT.mkdir(parents=True)

    def after(name: str, code: str) -> list[str]:
        waits = f"import pathlib, time\nwhile not pathlib.Path({name!r}).exists(): time.sleep(0.01)"
        return python(f"{waits}\n{code}")

    # The second ends after the third, and that after the first: only if they run at once.
    first = python("open('first', 'w'); print('first')")
    others = [
        after("other", "print('second')"),
        after("first", "open('other', 'w'); print('third')"),
    ]
    fails = python("raise SystemExit(3)")
    assert dev.failing([first, fails], others) == [fails]
    said = capfd.readouterr().out.splitlines()
    assert said.index("first") < said.index("second") < said.index("third")
    assert dev.failing([first], [first, fails]) == [fails]
    assert dev.failing([first], []) == []


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
        assert [c[1:] for c in commands[-2:]] == [["tests/host", "-x"], ["tests/browser", "-x"]]


@pytest.mark.parametrize("torch", ["oldest", "usual", "newest"])
def test_the_unit_tests_run_with_each_pytorch(dev, monkeypatch, commands, torch: str) -> None:
    installed: list[str] = []
    monkeypatch.setattr(dev, "install", lambda *wanted: installed.extend(wanted))
    assert dev.test(["--torch", torch, "-x"]) == 0
    assert [command[1:] for command in commands] == [["tests/unit", "-x"]]
    assert [w for w in installed if w.startswith("torch==")] == [dev.TORCH[torch][0]]


@pytest.mark.parametrize("wrong", [["--torch"], ["--torch", "2.15"]])
def test_another_pytorch_is_refused(dev, commands, capsys, wrong: list[str]) -> None:
    assert dev.test(wrong) == 2
    assert "oldest, usual, newest" in capsys.readouterr().out
    assert not commands


def test_the_versions_that_are_named_are_those_that_are_tested(dev) -> None:
    root = DEV.parent
    workflow = (root / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    tested = re.findall(r'python: "3\.(\d+)", torch: (\w+)', workflow)
    minors = sorted({int(minor) for minor, _ in tested})
    assert minors == [*range(minors[0], minors[-1] + 1)]
    assert {torch for _, torch in tested} == dev.TORCH.keys()
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-python = ">=3.{minors[0]},<3.{minors[-1] + 1}"' in project
    assert re.findall(r'Python :: 3\.(\d+)"', project) == [*map(str, minors)]
    assert f"Needs Python 3.{minors[0]} to 3.{minors[-1]} " in dev.__doc__
    ends = [dev.TORCH[end][0].removeprefix("torch==")[:-2] for end in ("oldest", "newest")]
    for name, to in (("README.md", " to "), ("README.zh-CN.md", " 到 ")):
        readme = (root / name).read_text(encoding="utf-8")
        assert readme.count(f"Python 3.{minors[0]}{to}3.{minors[-1]}") == 2
        assert f"PyTorch {to.join(ends)}" in readme


@pytest.mark.parametrize(
    ("version", "code"), [((3, 9), 2), ((3, 10), 0), ((3, 14), 0), ((3, 15), 2)]
)
def test_a_python_that_is_not_supported_is_told(
    dev, commands, monkeypatch, capsys, version: tuple[int, int], code: int
) -> None:
    monkeypatch.setattr(dev.sys, "argv", ["dev.py", "demo"])
    monkeypatch.setattr(dev.sys, "version_info", version)
    assert dev.main() == code
    assert ("Python 3.10 to 3.14 is needed" in capsys.readouterr().out) == bool(code)
