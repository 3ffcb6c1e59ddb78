"""What the pack costs before it does anything: its imports in ComfyUI, looking at a file, and the
answers of the command line that need no computing.

Needs COMFYUI_PATH for the first two rows; without it they are left out.
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

# Loads the pack as ComfyUI does, in a process where ComfyUI's own nodes and server are loaded; then
# imports what the first picture takes, and builds its models; then DiffSynth and its pipeline.
IMPORT_IN_COMFYUI = """
import asyncio, sys, time
sys.path.insert(0, sys.argv[1])
from comfy.cli_args import args
args.cpu = True
import nodes
import server
import comfy_config.config_parser  # the host's own, which the first pack of any kind makes it load
start = time.perf_counter()
assert asyncio.run(nodes.load_custom_node(sys.argv[2], set(), "custom_nodes"))
ours = time.perf_counter() - start
start = time.perf_counter()
from importlib import import_module
import torch, transformers
pack = nodes.NODE_CLASS_MAPPINGS["MajicFluxSample"].__module__.removesuffix(".nodes.sample")
dit, text, vae, sizes, precision, *_ = (
    import_module(f"{pack}.engine.{name}")
    for name in ("flux.transformer", "flux.text_encoders", "flux.vae", "flux.geometry",
                 "quant.formats", "run.pipeline")
)
dit.build_flux_dit(sizes.FluxGeometry(), precision.PRECISIONS["float8_e4m3fn"])
text.build_text_encoders(sizes.ClipGeometry(), sizes.T5Geometry(), torch.bfloat16)
vae.build_vae(torch.bfloat16)
first = time.perf_counter() - start
start = time.perf_counter()
import diffsynth
peer = time.perf_counter() - start
import diffsynth.pipelines.flux_image
print("RESULT", ours, peer, first, time.perf_counter() - start)
"""


def main() -> None:
    chosen = options(__doc__ or "")
    comfyui = os.environ.get("COMFYUI_PATH")
    rows = _import_rows(comfyui) if comfyui else []
    report([*rows, _header_row(), *_command_rows()], chosen.check)


def _import_rows(comfyui: str) -> list[Row]:
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
    ours, peer, first, pipeline = (1000 * float(value) for value in line.split()[1:])
    return [
        Row("import of the pack in ComfyUI", ours, "ms", peer, "import diffsynth", bar=50),
        Row("imports of the first picture", first, "ms", pipeline, "DiffSynth's pipeline"),
    ]


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


def _command_rows() -> list[Row]:
    commands = {"plan --vram 4": 0, "run --help": 0, "cache list": 0, "run gone.json": 1}

    def seconds(*arguments: str, code: int = 0) -> float:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *arguments], capture_output=True)
        assert done.returncode == code, done.stderr
        return time.perf_counter() - start

    return [
        Row(
            f"majicflux {command}",
            seconds("-m", "majicflux.cli", *command.split(), code=code),
            "s",
            seconds("-c", "import torch"),
            "import torch",
            bar=2,
        )
        for command, code in commands.items()
    ]


if __name__ == "__main__":
    main()
