"""Set-up and tests on a bare machine: `python dev.py demo` or `python dev.py test`.

`python dev.py test --in-comfyui` fails where ComfyUI or Chromium is absent, instead of leaving out
what needs them. `python dev.py locales` writes the English texts of the canvas anew, from the
nodes, and `python dev.py templates` the workflows. `python dev.py test --torch oldest` or `newest`
runs the unit tests alone, with the oldest or newest PyTorch that is supported.
Needs Python 3.10 to 3.14 and a package registry. Everything goes into `.venv` beside this file.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
# Not `python -m pytest`, which would let ComfyUI's `import nodes` find this folder's.
PYTEST = BIN / ("pytest.exe" if os.name == "nt" else "pytest")
# Builds that belong together; another set may not import. ComfyUI wants torchaudio as well, which
# ends at 2.11.
TORCH = {
    "oldest": ["torch==2.7.1", "torchvision==0.22.1"],  # as ComfyUI's oldest
    "usual": ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"],
    "newest": ["torch==2.15.0", "torchvision==0.29.2"],
}
# What writes files of the repository anew, from the node definitions.
WRITERS = {"locales": "locales/english.py", "templates": "workflows/build.py"}
# The newest canvas, beside the one that ComfyUI pins: people have either.
NEWEST_CANVAS = VENV / "frontend" / "comfyui_frontend_package" / "static"
CANVAS = "comfyui-frontend-package==1.58.1"
IN_COMFYUI = "--in-comfyui"  # what `test` is called with where nothing may be left out
TOOLS = [
    "ruff", "basedpyright", "pytest", "playwright", "websocket-client", "diffusers",
    "ray>=2.60,<3; sys_platform == 'linux'",
]  # fmt: skip
TOOLS += ["flip-evaluator; python_version < '3.14'", "piq", "ssimulacra2"]  # of the extra `lab`


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in ("demo", "test", *WRITERS):
        print(__doc__)
        return 2
    if not (3, 10) <= sys.version_info < (3, 15):
        print(f"Python 3.10 to 3.14 is needed; this is {sys.version.split()[0]}.")
        return 2
    if sys.argv[1] == "demo":
        install(*TORCH["usual"], "-e", str(ROOT))
        return run(PYTHON, "-m", "majicflux.cli", "demo", *sys.argv[2:])
    if sys.argv[1] in WRITERS:
        install(*TORCH["usual"], "-e", str(ROOT))
        return run(PYTHON, WRITERS[sys.argv[1]])
    return test(sys.argv[2:])


def test(arguments: list[str]) -> int:
    if arguments[:1] == ["--torch"]:
        return with_torch(*arguments[1:])
    pytest_arguments = [argument for argument in arguments if argument != IN_COMFYUI]
    comfyui = find_comfyui()
    absent = []
    if comfyui is None:
        absent.append(
            "NOT TESTED IN COMFYUI: no checkout was found. Set COMFYUI_PATH to one, "
            f"or put one at {default_comfyui()}."
        )
    if find_chromium() is None:
        absent.append("NOT TESTED ON THE CANVAS: no Chromium was found; install it.")
    if absent and IN_COMFYUI in arguments:
        print(*absent, sep="\n")
        return 1
    host = ["-r", str(comfyui / "requirements.txt")] if comfyui else []
    install(*TORCH["usual"], "-e", str(ROOT), *TOOLS, *host)
    checks = [
        [PYTHON, "-m", "ruff", "check", "."],
        [PYTHON, "-m", "ruff", "format", "--check", "."],
        [PYTHON, "-m", "basedpyright"],
        [PYTEST, "tests/unit", *pytest_arguments],
    ]
    beside = []
    if comfyui:
        install_canvas()
        # Processes of their own: what is in a process with ComfyUI talks to ComfyUI. And those of
        # the canvas mostly wait.
        beside = [[PYTEST, f"tests/{name}", *pytest_arguments] for name in ("host", "browser")]
        os.environ["COMFYUI_PATH"] = str(comfyui)
    failed = failing(checks, beside)
    for command in failed:
        print("FAILED:", *command)
    print(*absent, sep="\n")
    return 1 if failed else 0


def failing(commands: list[list[Any]], beside: list[list[Any]]) -> list[list[Any]]:
    """Run the commands one after the other and, all at once, the others beside them, whose output
    comes last. Returns those that failed."""
    # Small products on several threads mostly wait, and more so where others run too.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))
    with ExitStack() as stack:
        others = []
        for command in beside:
            output = stack.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
            others.append((command, process, output))
        failed = [command for command in commands if run(*command) != 0]
        for command, process, output in others:
            failed += [command] * (process.wait() != 0)
            output.seek(0)
            print(">", *command, flush=True)
            shutil.copyfileobj(output, sys.stdout.buffer)
            sys.stdout.flush()
    return failed


def with_torch(torch: str = "", *pytest_arguments: str) -> int:
    if torch not in TORCH:
        print(f"--torch takes one of: {', '.join(TORCH)}.")
        return 2
    install(*TORCH[torch], "-e", str(ROOT), *TOOLS)
    return run(PYTEST, "tests/unit", *pytest_arguments)


def find_comfyui() -> Path | None:
    """COMFYUI_PATH, the ComfyUI that this folder is installed in, or comfy-cli's default place."""
    places = [os.environ.get("COMFYUI_PATH"), ROOT.parent.parent, default_comfyui()]
    for place in filter(None, places):
        if (Path(place) / "comfyui_version.py").is_file():
            return Path(place).resolve()
    return None


def find_chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("google-chrome")


def default_comfyui() -> Path:
    documents = Path.home() if sys.platform == "linux" else Path.home() / "Documents"
    return documents / "comfy" / "ComfyUI"


def install(*wanted: str) -> None:
    """Bring .venv up to date, unless the same has been installed before.

    The versions of torch stand in every call, so that nothing else chooses another build.
    """
    lists = [ROOT / "pyproject.toml", ROOT / "requirements.txt"]
    lists += [Path(name) for name in wanted if name.endswith(".txt")]
    state = "\n".join([*wanted, *(path.read_text(encoding="utf-8") for path in lists)])
    stamp = VENV / "installed.txt"
    if PYTHON.exists() and stamp.is_file() and stamp.read_text(encoding="utf-8") == state:
        return
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    print("Installing into .venv; the first time this takes some minutes ...", flush=True)
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *wanted], check=True)
    stamp.write_text(state, encoding="utf-8")


def install_canvas() -> None:
    folder = VENV / "frontend"
    if not (folder / f"{CANVAS.replace('-', '_').replace('==', '-')}.dist-info").is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--target", str(folder), CANVAS], check=True)


def run(*command: str | Path) -> int:
    print(">", *command, flush=True)
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
