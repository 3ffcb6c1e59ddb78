"""Reading ahead, and what loading holds in memory."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from file_layouts import sparse_file
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.loaders import demo_models
from majicflux.loaders.convert import READING
from majicflux.loaders.flux_dit import load_flux_dit
from majicflux.loaders.read_ahead import JUDGED_BYTES, FileSpan, Reader, read_ahead
from majicflux.loaders.safetensors_file import ModelFileError

# Loads a sparse file of majicflus_v134's full size but for the number of blocks, in a process of
# its own, and prints the weights' bytes and the largest RssAnon and RssFile above the start, in kB.
MEASURE = """
import json, sys, threading, time
from pathlib import Path
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.loaders.convert import MOST_WORKERS, READING
from majicflux.loaders.flux_dit import load_flux_dit
from majicflux.loaders import demo_models
import torch
def now():
    lines = dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[key].split()[0]) for key in ("RssAnon", "RssFile")]
load_flux_dit(Path(sys.argv[2]), PRECISIONS["float8_e4m3fn"])  # everything is imported now
start, most, over = now(), [0, 0], threading.Event()
def watch():
    while not over.is_set():
        most[:] = [max(m, n - s) for m, n, s in zip(most, now(), start)]
        time.sleep(0.002)
watcher = threading.Thread(target=watch); watcher.start()
weights, _ = load_flux_dit(Path(sys.argv[1]), PRECISIONS["float8_e4m3fn"])
over.set(); watcher.join()
print(json.dumps([weights.total_bytes, *most]))
"""


def test_stretches_come_in_order_from_several_files(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(range(256)))
    other.write_bytes(bytes(reversed(range(256))))
    spans = [FileSpan(one, 3, 4), FileSpan(other, 0, 2), FileSpan(one, 250, 6)]
    found = [data.tolist() for data in read_ahead(spans)]
    assert found == [[3, 4, 5, 6], [255, 254], [250, 251, 252, 253, 254, 255]]


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(bytes(10))
    with pytest.raises(ModelFileError, match=r"short\.safetensors became shorter"):
        list(read_ahead([FileSpan(path, 0, 5), FileSpan(path, 5, 6)]))
    with pytest.raises(ModelFileError, match=r"cannot be read: No such file"):
        list(read_ahead([FileSpan(tmp_path / "gone", 0, 1)]))


def test_the_reader_ends_with_its_consumer(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    before = threading.active_count()
    for _ in read_ahead([FileSpan(path, i, 1) for i in range(1000)]):
        break
    assert threading.active_count() == before


@pytest.mark.parametrize("slow", [True, False])
def test_a_slow_disk_is_read_at_one_place_and_a_fast_one_at_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(20 * JUDGED_BYTES))
    if not slow:
        monkeypatch.setattr("majicflux.loaders.read_ahead.FAST", 1e6)
    together, most, lock = 0, 0, threading.Lock()
    read_at = Reader._read_at

    def watched(*arguments) -> int | None:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        time.sleep(0.01)  # for 1 MB: 0.1 GB/s
        count = read_at(*arguments)
        with lock:
            together -= 1
        return count

    monkeypatch.setattr(Reader, "_read_at", watched)

    def read(index: int) -> None:
        buffer = torch.empty(JUDGED_BYTES, dtype=torch.uint8)
        reader.read(FileSpan(path, index * JUDGED_BYTES, JUDGED_BYTES), buffer)

    with Reader() as reader, ThreadPoolExecutor(4) as pool:
        read(0)
        list(pool.map(read, range(20)))
    assert (most == 1) == slow


def test_loading_can_be_cancelled_and_tells_how_far_it_is(models: Path, monkeypatch) -> None:
    path = models / demo_models.DIT_FILE
    seen: list[tuple[int, int, str]] = []
    load_flux_dit(path, PRECISIONS["float8_e4m3fn"], lambda *told: seen.append(told))
    total = sum(t.nbytes for t in load_file(path).values())
    assert seen[0] == (0, total, READING), "before the first byte has come"
    assert seen[-1] == (total, total, READING)
    assert [done for done, *_ in seen] == sorted({done for done, *_ in seen})

    class Cancelled(BaseException):
        pass

    begun: list[FileSpan] = []
    read = Reader.read

    def read_slowly(reader: Reader, span: FileSpan, buffer: torch.Tensor) -> torch.Tensor:
        begun.append(span)
        time.sleep(0.005)
        return read(reader, span, buffer)

    monkeypatch.setattr(Reader, "read", read_slowly)
    before = threading.active_count(), torch.get_num_threads()
    for last in (0, 1, total // 2):  # as it begins, and on the way

        def cancel(done: int, *_: object, last: int = last) -> None:
            if done >= last:
                raise Cancelled

        begun.clear()
        with pytest.raises(Cancelled):
            load_flux_dit(path, PRECISIONS["float8_e4m3fn"], cancel)
        assert (threading.active_count(), torch.get_num_threads()) == before
        assert len(begun) < 0.9 * len(seen), "the rest is not read"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit_and_is_put_back(models: Path, threads: int) -> None:
    path = models / demo_models.DIT_FILE
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():  # as in ComfyUI
            found = load_flux_dit(path, PRECISIONS["float8_e4m3fn"])[0]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    expected = dict(load_flux_dit(path, PRECISIONS["float8_e4m3fn"])[0].module.named_parameters())
    for name, parameter in found.module.named_parameters():
        theirs = expected[name]
        assert torch.equal(parameter.view(torch.uint8), theirs.view(torch.uint8)), name


def test_tensors_larger_than_the_buffer_are_read_in_pieces(models, monkeypatch) -> None:
    path = models / demo_models.DIT_FILE
    expected = load_flux_dit(path, PRECISIONS["float8_e4m3fn"])[0]
    monkeypatch.setattr("majicflux.loaders.convert.BUFFER_BYTES", 10_000)
    monkeypatch.setattr("majicflux.loaders.read_ahead.BUFFER_BYTES", 10_000)
    found = dict(load_flux_dit(path, PRECISIONS["float8_e4m3fn"])[0].module.named_parameters())
    for name, parameter in expected.module.named_parameters():
        assert torch.equal(parameter.view(torch.uint8), found[name].view(torch.uint8)), name


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_loading_holds_little_more_than_the_weights(models: Path, tmp_path: Path) -> None:
    from majicflux.engine.flux.geometry import FluxGeometry
    from majicflux.loaders.layouts import flux_dit_layout

    layout = flux_dit_layout(FluxGeometry(double_blocks=2, single_blocks=3))
    path = sparse_file(tmp_path / "wide.safetensors", layout)
    command = [sys.executable, "-c", MEASURE, str(path), str(models / demo_models.DIT_FILE)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    weights, anonymous, file = json.loads(done.stdout)
    # Fixed: buffers to read into, and what each thread converts in.
    buffers = (60 + 16 * torch.get_num_threads()) * 2**20
    assert anonymous * 1024 < 1.01 * weights + buffers
    assert file * 1024 < 20 * 2**20
