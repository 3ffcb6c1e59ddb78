"""What the pack costs before it does anything: its import in ComfyUI, and looking at a file.

Needs COMFYUI_PATH for the first row; without it that row is left out.
"""

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from .table import Row, options, report

ROOT = Path(__file__).parents[1]

# Loads the pack as ComfyUI does, in a process where ComfyUI's own nodes are loaded, and the module
# that packs over DiffSynth import at their start.
IMPORT_IN_COMFYUI = """
import asyncio, sys, time
sys.path.insert(0, sys.argv[1])
from comfy.cli_args import args
args.cpu = True
import nodes
import comfy_config.config_parser  # the host's own, which the first pack of any kind makes it load
start = time.perf_counter()
assert asyncio.run(nodes.load_custom_node(sys.argv[2], set(), "custom_nodes"))
ours = time.perf_counter() - start
start = time.perf_counter()
import diffsynth
print("RESULT", ours, time.perf_counter() - start)
"""


def main() -> None:
    chosen = options(__doc__ or "")
    rows = [_header_row()]
    if comfyui := os.environ.get("COMFYUI_PATH"):
        rows.insert(0, _import_row(comfyui))
    report(rows, chosen.check)


def _import_row(comfyui: str) -> Row:
    command = [sys.executable, "-c", IMPORT_IN_COMFYUI, comfyui, str(ROOT)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as cache:
        environment["PYTHONPYCACHEPREFIX"] = cache
        run = partial(
            subprocess.run, command, check=True, capture_output=True, text=True, env=environment
        )
        run()  # compiles the files, which happens once per installation
        done = run()
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    ours, peer = (1000 * float(value) for value in line.split()[1:])
    return Row("import of the pack in ComfyUI", ours, "ms", peer, "import diffsynth", bar=50)


def _header_row() -> Row:
    """A sparse file of majicflus_v134's full size: 23.8 GB, of which only the header is bytes."""
    from diffsynth.core.loader import hash_model_file

    from majicflux.loaders.flux_dit import inspect_flux_dit

    from .full_size import write_majicflus

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "majicflus_v134.safetensors")
        write_majicflus(path)
        start = time.perf_counter()
        inspect_flux_dit(path)
        ours = time.perf_counter() - start
        start = time.perf_counter()
        hash_model_file(str(path))
        peer = time.perf_counter() - start
    return Row(
        "recognise a 23.8 GB file", 1000 * ours, "ms", 1000 * peer, "DiffSynth's hash", bar=1000
    )


if __name__ == "__main__":
    main()
