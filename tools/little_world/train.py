"""Train the little world's models from nothing, on one card in about 22 minutes.

    python -m majicflux.tools.little_world.train OUT

Each stage leaves its result in OUT, and a later call begins at the first whose result is missing;
the transformer goes on from its last checkpoint. What ships is OUT/weights.safetensors with the two
tokenizers beside it, and OUT/sepia_lora.safetensors. So that tokenizers or a VAE are kept, put
them into OUT: OUT/vae.safetensors, or OUT/first_vae.safetensors to train its decoder further.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from .flow_stages import pack, train_guidance, train_transformer
from .learner import log
from .settings import SHARES, Settings
from .style_stage import train_style
from .supply import Supply
from .vae_stages import train_decoder, train_vae
from .vocabulary import write_tokenizers
from .workshop import Workshop

RESERVE = 0.03  # share of the seconds, for what stands between the steps
LONGEST_WAIT = 0.1  # share of the seconds, for the first pictures


@dataclass(frozen=True)
class Stage:
    """run: with the time it has to end, of time.monotonic(), and the file that it shall leave.

    weight: its seconds, relative to the others'.
    """

    name: str
    result: str
    weight: float
    run: Callable[[Workshop, float, Path], None]


def pack_models(shop: Workshop, until: float, result: Path) -> None:
    pack(shop, load_file(shop.folder / "guidance.safetensors"), result)


STAGES = (
    Stage("vae", "first_vae.safetensors", 130, train_vae),
    Stage("decoder", "vae.safetensors", 170, train_decoder),
    Stage("transformer", "transformer.safetensors", 720, train_transformer),
    Stage("guidance", "guidance.safetensors", 180, train_guidance),
    Stage("pack", "weights.safetensors", 0, pack_models),
    Stage("style", "sepia_lora.safetensors", 60, train_style),
)


def stages_to_run(folder: Path) -> tuple[Stage, ...]:
    """From the first whose result is missing on. A finished VAE needs no unfinished one."""
    there = [(folder / stage.result).exists() for stage in STAGES]
    there[0] = there[0] or there[1]
    return STAGES[there.index(False) :] if False in there else ()


def train(folder: Path, settings: Settings, only: str = "") -> None:
    """All stages that are to run, within the seconds of the settings.

    only: a stage that shall have all of them, whatever else is missing.
    """
    deadline = time.monotonic() + settings.seconds * (1 - RESERVE)
    folder.mkdir(parents=True, exist_ok=True)
    todo = tuple(s for s in STAGES if s.name == only) if only else stages_to_run(folder)
    if not todo:
        log("everything is there")
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # whose threads do not survive the fork
    if not (folder / "tokenizer").exists():
        write_tokenizers(folder)
    given = (settings.sizes, SHARES, settings.pictures, settings.workers, folder)
    supply = Supply(*given)
    try:
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        shop = Workshop(folder, settings, supply)
        supply.wait(settings.first, LONGEST_WAIT * settings.seconds)
        for number, stage in enumerate(todo):
            now, weights = time.monotonic(), sum(later.weight for later in todo[number:])
            seconds = max(0.0, deadline - now) * stage.weight / max(weights, 1)
            log(f"stage {stage.name}, {seconds:.0f} s; {supply.ready} pictures are drawn")
            stage.run(shop, now + seconds, folder / stage.result)
    finally:
        supply.stop()
    log("done")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", metavar="OUT", type=Path)
    parser.add_argument("--quick", action="store_true", help="at toy size, on a CPU")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", choices=names, default="", help="this stage alone")
    parser.add_argument("--seconds", type=float, help="for all stages together")
    parser.add_argument("--device")
    parser.add_argument("--workers", type=int, help="processes that draw")
    parser.add_argument("--pictures", type=int, help="drawn in all")
    options = vars(parser.parse_args())
    folder, quick, only = (options.pop(name) for name in ("folder", "quick", "only"))
    if quick:
        torch.set_num_threads(1)  # such small products would mostly wait for each other
    given = {name: value for name, value in options.items() if value is not None}
    train(folder, replace(Settings.quick() if quick else Settings(), **given), only)


if __name__ == "__main__":
    main()
