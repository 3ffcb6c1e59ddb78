"""Seconds and memory of loading the 23.8 GB transformer as float8, from a cold cache.

A full-size file of random bf16 is written to --file (kept there for the next run). Each reader runs
in a process of its own: a plain read, one by as many threads as ours has, a plain write of what is
kept, DiffSynth's own loader (float8 without scales), ours (one scale a row), ours as it loads by
default, which also keeps prepared weights, and ours from prepared weights. --device converts.
--quick takes a file of two blocks. Linux only: memory is told from RssAnon and RssFile.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from .table import Row, report

READ_BYTES = 16 * 2**20
BAR_OF_PLAIN_READ = 1.3
# Of the parallel read and the plain write, one after the other: what a machine of few cores spends
# on the conversion has to fit into the time that the two share.
BAR_OF_KEEPING = 1.15
BUFFERS_GB = 0.5  # of anonymous memory besides the float8 weights
MAPPED_SECONDS_BAR = 1.0


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] in READERS:
        _measure(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
        return
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a file of two blocks")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--file", type=Path, help="where the full-size file is or shall be")
    parser.add_argument("--device", default="cpu", help="that converts: cpu or cuda:0")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.file.parent if chosen.file else None) as folder:
        source = chosen.file or Path(folder, "majicflus_v134.safetensors")
        if not source.is_file():
            _write_source(source, chosen.quick)
        readers = [r for r in READERS if not (chosen.quick and r == "DiffSynth")]
        prepared = Path(folder, "prepared")
        found = {reader: _run(reader, source, prepared, chosen.device) for reader in readers}
    report(_rows(found), chosen.check)


def _rows(found: dict[str, dict[str, float]]) -> list[Row]:
    plain, ours, keeping = found["plain read"], found["ours"], found["ours, keeping"]
    bytes_alone = found["parallel read"]["seconds"] + found["plain write"]["seconds"]
    weights = ours["weights"] / 1e9
    peer = found.get("DiffSynth", plain)
    peer_name = "DiffSynth" if "DiffSynth" in found else "plain read"
    rows = [
        Row("load", ours["seconds"], "s", plain["seconds"], "plain read",
            bar=BAR_OF_PLAIN_READ * plain["seconds"]),
        Row("load and keep", keeping["seconds"], "s", bytes_alone, "parallel read + plain write",
            bar=BAR_OF_KEEPING * bytes_alone),
        Row("load and keep, time of processors", keeping["processors"], "s"),
        Row("load prepared", found["ours, prepared"]["seconds"], "s", peer["seconds"], peer_name,
            bar=MAPPED_SECONDS_BAR),
    ]  # fmt: skip
    if "DiffSynth" in found:
        rows.append(
            Row("load", ours["seconds"], "s", peer["seconds"], peer_name, bar=peer["seconds"])
        )
    for key, name, bar in (
        ("anonymous", "anonymous peak", weights + BUFFERS_GB),
        ("file", "file pages peak", 0.1),
    ):
        rows.append(Row(name, ours[key] / 1e9, "GB", peer[key] / 1e9, peer_name, bar=bar))
    prepared = found["ours, prepared"]["anonymous"] / 1e9
    rows.append(Row("anonymous peak, prepared", prepared, "GB", weights, "float8 weights", bar=0.1))
    return rows


def _run(reader: str, source: Path, folder: Path, device: str) -> dict[str, float]:
    if reader != "ours, prepared":  # which is measured warm
        with source.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, "-m", "benchmarks.load", reader, str(source), str(folder), device]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    print(reader, result, file=sys.stderr)
    return result


def _measure(reader: str, source: Path, folder: Path, device: str) -> None:
    """Run one reader and print its seconds and its peaks above the start, in bytes."""
    import diffsynth  # noqa: F401  the import is not what is measured
    import torch

    import majicflux.engine.flux.transformer  # noqa: F401

    if device != "cpu":
        torch.empty(1, device=device)
    start, most, over = _resident(), [0, 0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            most[:] = [max(m, now - s) for m, now, s in zip(most, _resident(), start, strict=True)]

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began, worked = time.perf_counter(), time.process_time()
    weights = READERS[reader](source, folder, device)
    seconds, processors = time.perf_counter() - began, time.process_time() - worked
    over.set()
    watcher.join()
    result = {
        "seconds": seconds,
        "processors": processors,
        "anonymous": most[0],
        "file": most[1],
        "weights": weights,
    }
    print(json.dumps(result))


def _resident() -> list[int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return [1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")]


def _plain(source: Path, folder: Path, device: str) -> int:
    buffer = bytearray(READ_BYTES)
    with source.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return 0


def _parallel(source: Path, folder: Path, device: str) -> int:
    """A plain read by as many threads as load, each into a buffer of its own."""
    import torch

    from majicflux.loaders.convert import MOST_WORKERS

    own = threading.local()

    def read(start: int) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = bytearray(READ_BYTES)
        os.preadv(file.fileno(), [own.buffer], start)

    workers = min(MOST_WORKERS, torch.get_num_threads() + 1)
    with source.open("rb", buffering=0) as file, ThreadPoolExecutor(workers) as pool:
        list(pool.map(read, range(0, source.stat().st_size, READ_BYTES)))
    return 0


def _written(source: Path, folder: Path, device: str) -> int:
    """A plain write of as many bytes as are kept, synced."""
    from majicflux.engine.flux.transformer import build_flux_dit
    from majicflux.engine.quant.formats import PRECISIONS
    from majicflux.loaders.flux_dit import inspect_flux_dit, storage_in

    precision = PRECISIONS["float8_e4m3fn"]
    geometry, sources = inspect_flux_dit(source)
    weights = build_flux_dit(geometry, precision, partial(storage_in, precision, sources))
    block, left = memoryview(os.urandom(READ_BYTES)), weights.total_bytes
    folder.mkdir(exist_ok=True)
    path = folder / "plain write"
    with path.open("wb", buffering=0) as file:
        while left > 0:
            left -= file.write(block[:left])
        os.fsync(file.fileno())
    path.unlink()
    return 0


def _diffsynth(source: Path, folder: Path, device: str) -> int:
    import torch
    from diffsynth.models.model_loader import ModelPool

    places = {f"{stage}_device": "cpu" for stage in ("offload", "onload", "preparing")}
    dtypes = {f"{stage}_dtype": torch.float8_e4m3fn for stage in ("offload", "onload", "preparing")}
    compute = {"computation_device": "cpu", "computation_dtype": torch.bfloat16}
    pool = ModelPool()
    pool.auto_load_model(str(source), vram_config={**places, **dtypes, **compute})
    return sum(p.nbytes for p in pool.model[0].parameters())


def _ours(source: Path, cache_folder: Path | None, device: str) -> int:
    import torch

    from majicflux.engine.quant.formats import PRECISIONS
    from majicflux.loaders.flux_dit import load_flux_dit

    weights, _ = load_flux_dit(
        source,
        PRECISIONS["float8_e4m3fn"],
        cache_folder=cache_folder,
        device=torch.device(device),
    )
    return weights.total_bytes


READERS: dict[str, Callable[[Path, Path, str], int]] = {
    "plain read": _plain,
    "parallel read": _parallel,
    "plain write": _written,
    "DiffSynth": _diffsynth,
    "ours": lambda source, folder, device: _ours(source, None, device),
    "ours, keeping": _ours,
    "ours, prepared": _ours,
}


def _write_source(path: Path, quick: bool) -> None:
    """Random bf16 of the size of trained weights: 64 MB of it, over and over."""
    import torch

    from majicflux.engine.flux.geometry import FluxGeometry

    from .full_size import write_majicflus

    geometry = FluxGeometry(double_blocks=1, single_blocks=1) if quick else FluxGeometry()
    values = torch.randn(2**25).mul_(0.02).bfloat16()
    write_majicflus(path, geometry, values.view(torch.uint8).numpy().tobytes())
    os.sync()


if __name__ == "__main__":
    main()
