"""The card as everybody sees it: its own counter, and second processes that hold its memory."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

GIB = 2**30
HOLD = """
import sys, time, torch
free = torch.cuda.mem_get_info()[0] - int(float(sys.argv[1]) * 2**30)
held = torch.empty(free, dtype=torch.uint8, device="cuda")
print(round(torch.cuda.mem_get_info()[0] / 2**30, 2), flush=True)
time.sleep(3600)
"""
# Piece by piece, so that it takes what there is and then whatever becomes free.
GRAB = """
import sys, time, torch
torch.empty(1, device="cuda")
print("ready", flush=True)
sys.stdin.readline()
taken, end = [], time.monotonic() + float(sys.argv[2])
while len(taken) < 8 * float(sys.argv[1]) and time.monotonic() < end:
    try:
        taken.append(torch.empty(2**27, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        time.sleep(0.01)
print(len(taken) / 8, flush=True)
sys.stdin.readline()
"""

Counter = Callable[[], float]  # GiB in use on the first visible card, by whomever
CARD = int(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])  # a number, not an UUID


def card_counter() -> Counter | None:
    """Of NVIDIA's management library, or of nvidia-smi without its bindings; None: no card."""
    with contextlib.suppress(ImportError):
        import pynvml  # pyright: ignore[reportMissingImports]

        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            card = pynvml.nvmlDeviceGetHandleByIndex(CARD)
            return lambda: pynvml.nvmlDeviceGetMemoryInfo(card).used / GIB
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        _of_nvidia_smi()
        return _of_nvidia_smi
    return None


def _of_nvidia_smi() -> float:
    command = [
        "nvidia-smi",
        f"--id={CARD}",
        "--query-gpu=memory.used",
        "--format=csv,noheader,nounits",
    ]
    return int(subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)) / 1024


@contextlib.contextmanager
def peak_of(counter: Counter | None) -> Iterator[list[float]]:
    """A list that holds, in the end, the highest value that was seen; empty without a counter."""
    highest: list[float] = []
    if counter is None:
        yield highest
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            highest[:] = [max([*highest, counter()])]

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield highest
    finally:
        over.set()
        watching.join()


@contextlib.contextmanager
def leaving_free(gib: float | None) -> Iterator[None]:
    """Another process holds all of the card but so much; None: there is no such process."""
    if gib is None:
        yield
        return
    with _process(HOLD, gib) as (_, answer):
        print(f"free on the card: {answer} GiB", flush=True)
        yield


@contextlib.contextmanager
def grabbing(gib: float, seconds: float) -> Iterator[Callable[[], None]]:
    """A function that makes another process take `gib` of the card, as far as it becomes free.

    It tries for `seconds`, and says how much it took when all is over.
    """
    with _process(GRAB, gib, seconds) as (process, _):
        assert process.stdout is not None
        yield lambda: _line(process)
        with contextlib.suppress(BrokenPipeError):
            _line(process)
            print(f"another process took {process.stdout.readline().strip()} GiB", flush=True)


def _line(process: subprocess.Popen) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@contextlib.contextmanager
def _process(script: str, *arguments: float) -> Iterator[tuple[subprocess.Popen, str]]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    try:
        assert process.stdout is not None
        answer = process.stdout.readline().strip()
        if not answer:
            raise RuntimeError("the process that holds the card's memory has failed")
        yield process, answer
    finally:
        process.kill()
        process.wait()
