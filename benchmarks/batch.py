"""Kills workers and drivers of batches at random, and sees that no row is lost or painted twice.

python -m benchmarks.batch [--quick] [--rows N] [--rounds N]

Random small models, on the CPU. Every round paints the same rows into a new folder, in as many runs
as it takes, and compares its pictures with those of one worker that nobody disturbed. Before: what
a batch costs beside a bare loop over the same graphs.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from majicflux.batch import Batch
from majicflux.host.graph import run_graph
from majicflux.host.image_nodes import image_nodes
from majicflux.nodes import NODES

from .random_models import write_random_models

GRAPH = Path(__file__).parents[1] / "workflows" / "api" / "text_to_image.json"
SMALL = {"width": 32, "height": 32, "steps": 1}
WORKERS = 2
KILLS = 4  # in a round
CALM = (3.0, 12.0)  # seconds between two of them, for starts take some


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rows, two rounds")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    rows, rounds = (12, 2) if options.quick else (200, 20)
    rows, rounds = options.rows or rows, options.rounds or rounds
    with TemporaryDirectory() as place:
        folder = Path(place)
        _prepare(folder, rows)
        expected = _undisturbed(folder)
        for number in range(1, rounds + 1):
            began = time.monotonic()
            killed = _disturbed(folder, folder / str(number), random.Random(number))
            _require_whole(folder / str(number), expected, rows)
            said = f"round {number}: {rows} rows whole after kills of {', '.join(killed)}"
            print(f"{said}; {time.monotonic() - began:.0f} s", flush=True)


def _prepare(folder: Path, rows: int) -> None:
    write_random_models(folder / "models")
    graph = json.loads(GRAPH.read_text(encoding="utf-8"))
    graph["5"]["inputs"] |= SMALL
    (folder / "graph.json").write_text(json.dumps(graph))
    (folder / "rows.txt").write_text("".join(f"cat {number}\n" for number in range(rows)))


def _undisturbed(folder: Path) -> dict[str, str]:
    """The pictures of one worker; prints what they took beside a bare loop."""
    given = (folder / "rows.txt", folder / "graph.json", folder / "one")
    for _ in Batch(*given, models=folder / "models", workers=1):  # the weights are prepared
        break
    began = time.monotonic()
    records = [*Batch(*given, models=folder / "models", workers=1)]
    whole = time.monotonic() - began
    in_batch = sum(record["seconds"] for record in records[1:]) / len(records[1:])
    bare = _bare_loop(folder)
    print(f"a picture: {in_batch:.3f} s in a batch, {bare:.3f} s in a bare loop")
    print(f"{len(records)} rows in {whole:.1f} s, the start of the worker included")
    return pictures_in(folder / "one")


def _bare_loop(folder: Path) -> float:
    """Seconds a picture, without the first."""
    graph, kept = json.loads((folder / "graph.json").read_text()), {}
    classes = {node.define_schema().node_id: node for node in NODES}
    classes |= image_nodes(folder / "bare", folder, {})
    times = []
    for number, prompt in enumerate((folder / "rows.txt").read_text().splitlines()):
        graph["5"]["inputs"] |= {"prompt": prompt, "seed": 1000 * number}
        began = time.monotonic()
        run_graph(graph, classes, kept)
        times.append(time.monotonic() - began)
    return sum(times[1:]) / len(times[1:])


def _disturbed(folder: Path, output: Path, chance: random.Random) -> list[str]:
    """Run batches until one ends by itself; returns who was killed."""
    killed: list[str] = []
    command = [sys.executable, "-m", "majicflux.cli", "batch", folder / "rows.txt",
               "--graph", folder / "graph.json", "--out", output,
               "--models", folder / "models", "--workers", WORKERS]  # fmt: skip
    while True:
        nowhere = subprocess.DEVNULL
        driver = subprocess.Popen([*map(str, command)], stdout=nowhere, stderr=nowhere)
        while driver.poll() is None:
            try:
                driver.wait(chance.uniform(*CALM) if len(killed) < KILLS else None)
            except subprocess.TimeoutExpired:
                killed += _kill_one(driver, chance)
        if driver.returncode == 0:
            return killed
        if driver.returncode > 0:
            raise SystemExit(f"the batch ended with {driver.returncode}")


def _kill_one(driver: subprocess.Popen[bytes], chance: random.Random) -> list[str]:
    workers = psutil.Process(driver.pid).children()
    victim = chance.choice(["driver", *(["a worker"] if workers else [])])
    (driver if victim == "driver" else chance.choice(workers)).kill()
    if victim == "driver":
        driver.wait()
    return [str(victim)]


def _require_whole(output: Path, expected: dict[str, str], rows: int) -> None:
    lines = (output / "manifest.jsonl").read_text().splitlines()
    painted = [record["key"] for record in map(json.loads, lines) if record["error"] is None]
    if len(painted) != rows or len({*painted}) != rows:
        raise SystemExit(f"{len(painted)} records for {rows} rows")
    if pictures_in(output) != expected:
        raise SystemExit("the pictures are not those of one worker")


def pictures_in(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.name != "manifest.jsonl"]
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    main()
