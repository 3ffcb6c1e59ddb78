"""Memory of the machine that the documented 1024x1024 graph takes, from files to picture.

Full-size files without content are made in --folder (26 GB of disk for the prepared weights, which
stay there). The graph runs in a process of its own, twice: the first converts the weights and
keeps them, the second maps them. --quick takes small random models. Linux only: told from RssAnon
and RssShmem of /proc.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from majicflux.loaders import demo_models, tokenizers

from . import random_models
from .budget import Letters
from .full_size import write_models
from .table import Row, report

GRAPH = Path(__file__).parents[1] / "workflows" / "api" / "text_to_image.json"
BAR_GB = 4.0
STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small random models, for any CPU")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    parser.add_argument("--budget", type=float, default=6.0, help="vram_budget_gb")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.run:
        _paint(chosen.folder, chosen.quick, chosen.budget)
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = chosen.folder or Path(name)
        if not chosen.quick:
            write_models(folder, sparse=True)
        elif not (folder / demo_models.DIT_FILE).exists():
            random_models.write_random_models(folder)
        first, second = (_measured(folder, chosen.quick, chosen.budget) for _ in range(2))
    rows = [
        Row("anonymous memory, first run", first["anonymous"] / 1e9, "GB"),
        Row("anonymous memory, prepared", second["anonymous"] / 1e9, "GB", bar=BAR_GB),
        Row("of it before a model is loaded", second["begun"] / 1e9, "GB"),
        Row("seconds of the process, first run", first["seconds"], "s"),
        Row("seconds of the process, prepared", second["seconds"], "s"),
    ]
    report(rows, chosen.check)


def _measured(folder: Path, quick: bool, budget: float) -> dict[str, float]:
    """The most that the process held, and what it held before it loaded a model."""
    command = [sys.executable, "-m", "benchmarks.memory", "--run", "--folder", str(folder)]
    command += ["--budget", str(budget), *(["--quick"] if quick else [])]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    found = {"anonymous": 0.0, "begun": 0.0}
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    while process.poll() is None:
        found["anonymous"] = max(found["anonymous"], _anonymous(process.pid))
        if process.stdout.readline():  # the first line: everything is imported
            found["begun"] = found["begun"] or _anonymous(process.pid)
        time.sleep(0.01)
    if process.returncode:
        sys.exit(f"The graph failed with {process.returncode}.")
    return {**found, "seconds": time.perf_counter() - begin}


def _anonymous(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0.0
    fields: dict[str, Any] = dict(line.split(":", 1) for line in lines)
    return sum(1024 * int(fields.get(name, "0").split()[0]) for name in ("RssAnon", "RssShmem"))


def _paint(folder: Path, quick: bool, budget: float) -> None:
    import diffsynth.models.flux_dit  # noqa: F401
    import torch

    from majicflux.cli import main as majicflux

    if not quick:  # the real vocabularies are not needed for it
        tokenizers.load_tokenizer = lambda *_: Letters()
    if torch.cuda.is_available():
        torch.empty(1, device="cuda")
    print("begun", flush=True)
    size, steps = (64, 1) if quick else (1024, STEPS)
    values = {"4.vram_budget_gb": budget, "5.width": size, "5.height": size, "5.steps": steps}
    settings = [f"--set={name}={value}" for name, value in values.items()]
    output = folder / "output"
    majicflux(["run", str(GRAPH), "--models", str(folder), "--output", str(output), *settings])


if __name__ == "__main__":
    main()
