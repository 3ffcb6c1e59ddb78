"""The benchmarks of ComfyUI: of a whole server in its small version, and of what it imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

from majicflux.benchmarks import startup

ROOT = Path(__file__).parents[2]


def test_it_paints_with_both_sides_and_says_what_it_found(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "benchmarks.server", "--quick", "--check", "--speeds", "--loras",
        "--budgets=0.5", "--peers=fp8_e4m3fn", "--scratch", tmp_path, "--out", tmp_path / "o.json",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    painted = json.loads((tmp_path / "o.json").read_text())
    assert [(p["what"], p["number"], p["status"]) for p in painted] == [
        (f"{part}{what}", number, "success")
        for part, numbers in (("", 2), ("loras: ", 5))
        for what in ("ours", "fp8_e4m3fn")
        for number in range(1, numbers + 1)
    ]
    assert len({p["picture"] for p in painted if Path(p["picture"]).is_file()}) == 14
    assert "| prompts of ours without a picture | 0 of 2 |" in done.stdout


def test_imports_in_comfyui_are_timed() -> None:
    rows = startup._import_rows(os.environ["COMFYUI_PATH"])
    assert [row.name for row in rows] == [
        "import of the pack in ComfyUI",
        "imports of the first picture",
    ]
    assert all(row.value > 0 and row.peer > 0 for row in rows)
