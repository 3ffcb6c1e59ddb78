"""A model that learns: its optimizers, the average of its weights, steps that went wrong."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .muon import AdamW, Muon, of_lists

LOG_EVERY = 10.0  # seconds
LARGEST_NORM = 1.0  # of all gradients together
Loss = Callable[[float], tuple[Tensor, int]]  # progress 0..1 -> loss of a batch, its pictures
_start = time.monotonic()


def log(text: str) -> None:
    print(f"[{time.monotonic() - _start:6.1f} s] {text}", flush=True)


def bfloat16_on_a_card(device: torch.device) -> AbstractContextManager[Any]:
    """Products in bfloat16 where that is faster; on a CPU it is not."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def compiled(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Compile each block by itself on a card: whole models take minutes.

    A block that does not compile, or comes in too many shapes, runs as it is.
    """
    if device.type != "cuda":
        return
    import torch._dynamo as dynamo

    dynamo.config.suppress_errors = True
    dynamo.config.cache_size_limit = 256
    dynamo.config.accumulated_cache_size_limit = 1024
    for block in blocks:
        block.compile(dynamic=False)


class Learner:
    """Gradient steps on what `parameters` asks for, and the moving average that is kept of it."""

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Muon | AdamW], average_decay: float
    ) -> None:
        self.model, self.optimizers, self.average_decay = model, optimizers, average_decay
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.steps = 0
        self.keep()

    def step(self, loss: Tensor, factor: float) -> None:
        """factor: of the optimizers' rates."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, LARGEST_NORM)
        for optimizer in self.optimizers:
            optimizer.step(factor)
        self.steps += 1
        decay = min(self.average_decay, self.steps / (self.steps + 9))  # forgets the beginning
        with torch.no_grad():
            of_lists._foreach_lerp_(self.average, self.parameters, 1 - decay)

    def averaged(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.average, strict=True))

    @torch.no_grad()
    def take_average(self) -> None:
        """Go on with the averaged weights, at the end."""
        of_lists._foreach_copy_(self.parameters, self.average)

    @torch.no_grad()
    def healthy(self) -> bool:
        """Whether all weights are numbers."""
        return bool(torch.stack(of_lists._foreach_norm(self.average)).isfinite().all())

    @torch.no_grad()
    def keep(self) -> None:
        """Remember this state as a good one."""
        self._kept = [tensor.detach().clone() for tensor in [*self.parameters, *self.average]]

    @torch.no_grad()
    def take_back(self) -> None:
        """Return to the last good state."""
        of_lists._foreach_copy_([*self.parameters, *self.average], self._kept)
        for optimizer in self.optimizers:
            optimizer.forget()

    def save(self, path: Path, progress: float) -> None:
        """progress: of the stage, 0..1. The optimizers' state is not kept, it is found anew."""
        weights = dict(zip(self.names, self.parameters, strict=True))
        tensors = {f"weights.{name}": tensor.detach() for name, tensor in weights.items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.averaged().items()}
        write(path, tensors, {"progress": str(progress), "steps": str(self.steps)})

    @torch.no_grad()
    def resume(self, path: Path) -> float:
        """Returns the progress that was saved, 0 where nothing was."""
        if not path.exists():
            return 0.0
        tensors, about = load_file(path), metadata(path)
        for kind, own in (("weights", self.parameters), ("average", self.average)):
            for name, tensor in zip(self.names, own, strict=True):
                tensor.copy_(tensors[f"{kind}.{name}"])
        self.steps = int(about["steps"])
        self.keep()
        return float(about["progress"])


class Course:
    """The steps of one stage, until its time is over.

    until: on the clock of time.monotonic(); begun: the share that an earlier run has made.
    """

    def __init__(self, name: str, until: float, begun: float = 0.0) -> None:
        self.name, self.until, self.begun = name, until, begun

    def run(
        self,
        learner: Learner,
        loss_of: Loss,
        factor: Callable[[int, float], float],
        save: Callable[[float], None] = lambda progress: None,
        save_every: float = math.inf,
    ) -> None:
        """One step at least.

        factor: steps made and progress -> factor of the rates; save: is called with the progress.
        """
        began = logged = saved = time.monotonic()
        seconds = max(self.until - began, 1e-3)
        total, count, pictures, seen, steps, progress = None, 0, 0, 0, 0, self.begun
        while progress < 1:
            loss, size = loss_of(progress)
            learner.step(loss, factor(steps, progress))
            total = loss.detach() if total is None else total + loss.detach()
            count, pictures, seen, steps = count + 1, pictures + size, seen + size, steps + 1
            now = time.monotonic()
            progress = self.begun + (1 - self.begun) * (now - began) / seconds
            if steps != 5 and now - logged < LOG_EVERY and progress < 1:
                continue
            mean = total.item() / count
            speed = pictures / max(time.monotonic() - logged, 1e-9)
            log(
                f"{self.name}: step {steps}, {min(progress, 1):.1%}, loss {mean:.4f}, "
                f"{speed:.0f} pictures/s, {seen} seen"
            )
            if math.isfinite(mean) and learner.healthy():
                learner.keep()
            else:
                log(f"{self.name}: no number any more; back to the last good weights")
                learner.take_back()
            total, count, pictures, logged = None, 0, 0, time.monotonic()
            if now - saved > save_every:
                save(min(progress, 1.0))
                saved = time.monotonic()


def warm_up(steps: int, progress: float, over: int = 150, level_until: float = 0.5) -> float:
    """Factor of the rates: rises over some steps, stays, and falls to almost nothing in a line."""
    falling = (1 - min(progress, 1.0)) / (1 - level_until)
    return min(1.0, (steps + 1) / over) * min(1.0, falling + 0.02)


def write(path: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None) -> None:
    partial = path.with_name(path.name + ".part")
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial, about)
    partial.replace(path)  # so that a name never stands for half a file


def metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}
