"""What a batch costs on cards, beside a bare loop over the same nodes and one card.

python -m benchmarks.batch_cards [--quick] [--rows N] [--models FOLDER] [--ways WAY,WAY...]

Random models of full size (34 GB), 1024x1024, 20 steps. Every way of painting gives the same files,
or the run ends: a batch on one card, which comes first, a bare loop, all cards, all with a worker
killed in the middle, and a Ray cluster with a node for each card, if Ray is there. --quick: small
models and pictures, on the CPU, as if it were two cards.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch

from majicflux.batch import Batch
from majicflux.host import standalone
from majicflux.host.graph import run_graph
from majicflux.host.image_nodes import image_nodes
from majicflux.nodes import NODES

from .batch import GRAPH, pictures_in
from .full_size import write_models

SIZE = {"width": 1024, "height": 1024, "steps": 20}
SMALL = {"width": 32, "height": 32, "steps": 1}
OVERHEAD = 0.02  # at most, of a picture in a batch beside one in a bare loop
GAIN = 0.95  # at least, of each card that comes
WAYS = ("bare", "all", "killed", "ray")  # beside one card

Options = dict[str, Any]  # of a batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--models", type=Path, help="where the models are, or are to be written")
    parser.add_argument("--ways", default=",".join(WAYS), help="of painting; default: %(default)s")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)  # a process of its own
    options = parser.parse_args()
    ways = options.ways.split(",")
    if unknown := {*ways} - {*WAYS}:
        parser.error(f"unknown ways: {', '.join(sorted(unknown))}")
    if options.bare is not None:
        print(_bare_loop(options.bare, options.models))
        return
    with TemporaryDirectory() as place:
        folder = Path(place)
        measure(folder, options.models or folder / "models", options.rows, options.quick, ways)


def measure(folder: Path, models: Path, rows: int, quick: bool, ways: Sequence[str]) -> None:
    write_models(models, small=quick, tokenizers=True)
    graph = json.loads(GRAPH.read_text(encoding="utf-8"))
    graph["5"]["inputs"] |= SMALL if quick else SIZE
    (folder / "graph.json").write_text(json.dumps(graph))
    (folder / "rows.txt").write_text("".join(f"cat {number}\n" for number in range(rows)))
    cards = 2 if quick else torch.cuda.device_count()
    all_cards: Options = {"workers": 2} if quick else {"gpus": range(cards)}
    one_card: Options = {"workers": 1} if quick else {"gpus": [0]}
    memory = psutil.virtual_memory().total / 2**30
    print(f"{cards} cards, {memory:.0f} GiB of memory, {rows} rows", flush=True)

    def painted(name: str, where: Options, on_record: Callable[[int], None] = ignore) -> float:
        """Seconds a picture, once the first is there."""
        given = (folder / "rows.txt", folder / "graph.json", folder / name)
        times = []
        for number, record in enumerate(Batch(*given, models=models, **where)):
            if record["error"] is not None:
                raise SystemExit(record["error"])
            times.append(time.monotonic())
            on_record(number)
        if pictures_in(folder / name) != pictures_in(folder / "one") or len(times) != rows:
            raise SystemExit(f"{name}: the pictures are not those of one card")
        seconds = (times[-1] - times[0]) / (rows - 1)
        print(f"{name}: {seconds:.3f} s a picture", flush=True)
        return seconds

    for _ in Batch(folder / "rows.txt", folder / "graph.json", folder / "first", models=models,
                   **one_card):  # fmt: skip
        break  # the weights are prepared
    one = painted("one", one_card)
    if "bare" in ways:
        bare = float(_said_by("--bare", folder, "--models", models))
        over = one / bare - 1
        print(f"bare loop: {bare:.3f} s a picture, batch {over:+.1%} (bar {OVERHEAD:.0%})")
    if cards == 1:
        return
    if "all" in ways:
        _print_gain("all cards", one / painted("all", all_cards), cards)

    def kill(number: int) -> None:
        if number == rows // 2:
            workers = psutil.Process().children()
            next(each for each in workers if "majicflux.batch.worker" in each.cmdline()).kill()

    if "killed" in ways:
        _print_gain("one worker killed", one / painted("killed", all_cards, kill), cards, bar=False)
    if "ray" not in ways:
        return
    if find_spec("ray") is None:
        print("Ray is not installed: not measured")
        return
    with _ray_nodes(cards) as address:
        _print_gain("Ray, a node for each card", one / painted("ray", {"ray": address}), cards)


def ignore(number: int) -> None: ...


def _print_gain(name: str, gain: float, cards: int, bar: bool = True) -> None:
    wanted = f" (bar {GAIN * cards:.2f})" if bar else ""
    print(f"{name}: {gain:.2f} times one card{wanted}", flush=True)


@contextmanager
def _ray_nodes(cards: int) -> Iterator[str]:
    """The address of a cluster on this machine."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for card in range(cards):
            os.environ["CUDA_VISIBLE_DEVICES"] = str(card)
            cluster.add_node(num_cpus=0, num_gpus=1)
        yield str(cluster.address)
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        cluster.shutdown()


def _said_by(*arguments: object) -> str:
    command = [sys.executable, "-m", f"{__package__}.batch_cards", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def _bare_loop(folder: Path, models: Path) -> float:
    """Seconds a picture, without the first."""
    standalone.models_folder = models
    graph, kept = json.loads((folder / "graph.json").read_text()), {}
    classes = {node.define_schema().node_id: node for node in NODES}
    classes |= image_nodes(folder / "bare", folder, {})
    times = []
    for number, prompt in enumerate((folder / "rows.txt").read_text().splitlines()):
        graph["5"]["inputs"] |= {"prompt": prompt, "seed": 1000 * number}
        run_graph(graph, classes, kept)
        times.append(time.monotonic())
    return (times[-1] - times[0]) / (len(times) - 1)


if __name__ == "__main__":
    main()
