"""Train little models that see pictures, from the one that ships, on one card in ten minutes.

    python -m majicflux.tools.little_world.train_conditions OUT

Each kind leaves OUT/KIND.safetensors, in the layout of its real model, and a sheet in
OUT/KIND.png: in each row the picture that was wanted, what the model saw, and what it painted.
"""

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...loaders.demo_models import LITTLE_WORLD, WEIGHTS, unpacked
from ...loaders.tokenizers import CLIP_TOKENIZER, T5_TOKENIZER
from .flow import descend, draw_guidance, mean_square, noisy
from .flow_stages import filled
from .learner import Course, Learner, bfloat16_on_a_card, log, warm_up, write
from .lessons import BASE, LESSONS, Lesson
from .models import LittleFlux
from .settings import SHARES, Settings
from .sheet import save_sheet, tried
from .supply import CAPTIONS, Gallery, Shelf, Supply
from .workshop import Workshop

WEIGHT = {"kontext": 1.5}  # of the time; others have 1
RESERVE = 0.03  # share of the seconds, for what stands between the steps
LONGEST_WAIT = 0.1  # share of the seconds, for the first pictures
AVERAGE_DECAY = 0.99
SHORT_UNTIL = 0.5  # progress, up to which prompts are not filled up: that is twice as fast
REFILL_EVERY = 4  # steps
SHOWN = 8  # scenes of a sheet
SHOWN_GUIDANCE = 3.5


def train_conditions(
    folder: Path, settings: Settings, kinds: Sequence[str], source: Path = LITTLE_WORLD
) -> None:
    """Those kinds, within the seconds of the settings. source: the models that ship."""
    deadline = time.monotonic() + settings.seconds * (1 - RESERVE)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # whose threads do not survive the fork
    with ExitStack() as stack:
        base = Path(stack.enter_context(TemporaryDirectory()))
        supplies = _supplies(settings, kinds, source, stack)
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        unfold(source, base)
        for number, kind in enumerate(kinds):
            supply = supplies[LESSONS[kind].shelf]
            supply.wait(settings.condition_first, LONGEST_WAIT * settings.seconds)
            now, weights = time.monotonic(), [WEIGHT.get(name, 1.0) for name in kinds[number:]]
            seconds = max(0.0, deadline - now) * weights[0] / sum(weights)
            log(f"{kind}, {seconds:.0f} s; {supply.ready} pictures are drawn")
            shop = Workshop(base, settings, supply)
            teach(kind, shop, now + seconds, folder / f"{kind}.safetensors")
    log("done")


def unfold(source: Path, folder: Path) -> None:
    """What ships, as the files that a training leaves."""
    tensors = unpacked(load_file(source / WEIGHTS))
    vae = {name.removeprefix("vae."): t for name, t in tensors.items() if name.startswith("vae.")}
    write(folder / "vae.safetensors", vae)
    write(folder / BASE, {n: t for n, t in tensors.items() if not n.startswith("vae.")})
    for tokenizer in (CLIP_TOKENIZER, T5_TOKENIZER):
        shutil.copytree(source / tokenizer.folder, folder / tokenizer.folder)


def teach(kind: str, shop: Workshop, until: float, result: Path) -> None:
    """One kind, and a sheet that shows what it has learnt."""
    settings, device = shop.settings, shop.device
    lesson = LESSONS[kind](shop)
    base = shop.flux_of(BASE).requires_grad_(False)
    learner = Learner(lesson.model, list(lesson.optimizers()), AVERAGE_DECAY)
    gallery = Gallery(shop.supply, device, lesson.derive)
    gallery.refill_all()

    def loss_of(progress: float) -> tuple[Tensor, int]:
        if learner.steps % REFILL_EVERY == 0:
            gallery.refill()
        (clean, *seen), t5_ids, clip_ids = gallery.batch(settings.condition_batch)
        if progress > SHORT_UNTIL:
            t5_ids = filled(t5_ids)
        x, sigma, wanted = noisy(clean.float())
        ids, guidance = (t5_ids, clip_ids), draw_guidance(len(x), device)
        with bfloat16_on_a_card(device):
            if lesson.guided:
                more = added_by_guidance(base, x, sigma, ids, guidance)
                wanted = wanted + lesson.where_guided(*seen) * more
            found = lesson.model(x, sigma, *ids, guidance, **lesson.conditions(*seen))
        return mean_square(found, wanted), len(x)

    def factor(steps: int, progress: float) -> float:
        return warm_up(steps, progress, over=50, level_until=0.4)

    Course(kind, until).run(learner, loss_of, factor)
    learner.take_average()
    write(result, {n: t.to("cpu", torch.bfloat16) for n, t in lesson.tensors().items()})
    tried(result.name, lambda: show(lesson, shop, result.with_suffix(".png")))


@torch.no_grad()
def added_by_guidance(
    base: LittleFlux, x: Tensor, sigma: Tensor, ids: Sequence[Tensor], guidance: Tensor
) -> Tensor:
    """To the velocity, by the model that ships: pictures alone would teach to do without it."""
    strong, plain = (base(x, sigma, *ids, g).float() for g in (guidance, torch.ones_like(guidance)))
    return strong - plain


@torch.no_grad()
def show(lesson: Lesson, shop: Workshop, path: Path) -> None:
    """Scenes that no training has seen."""
    device, size = shop.device, shop.settings.sizes[0]
    shelf = lesson.shelf(size, range(SHOWN))
    for slot in range(SHOWN):
        shelf.draw(slot, shop.words)
    which = torch.arange(SHOWN), CAPTIONS - 2 + torch.arange(SHOWN) % 2  # in either language
    ids = [torch.from_numpy(x)[which].long().to(device) for x in (shelf.t5_ids, shelf.clip_ids)]
    wanted, *seen = lesson.derive(torch.from_numpy(shelf.pictures).to(device))
    conditions = lesson.conditions(*seen)
    guidance = torch.full((SHOWN,), SHOWN_GUIDANCE, device=device)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return lesson.model(x, sigma, filled(ids[0]), ids[1], guidance, **conditions)

    found = descend(velocity, SHOWN, size, device, shop.settings.sheet_steps)
    columns = [lesson.vae.decoder(x.float()) for x in (wanted, seen[0], found)]
    save_sheet([picture for row in zip(*columns, strict=True) for picture in row], path, columns=3)


def _supplies(
    settings: Settings, kinds: Sequence[str], words: Path, stack: ExitStack
) -> dict[type[Shelf], Supply]:
    """Of each sort of pictures that is needed; they share the workers and stop with the stack."""
    shelves = list(dict.fromkeys(LESSONS[kind].shelf for kind in kinds))
    workers = max(1, settings.workers // len(shelves))
    supplies = {}
    for shelf in shelves:
        given = (settings.sizes, SHARES, settings.condition_pictures, workers, words, shelf)
        supplies[shelf] = Supply(*given)
        stack.callback(supplies[shelf].stop)
    return supplies


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", metavar="OUT", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=list(LESSONS), default=list(LESSONS))
    parser.add_argument("--seconds", type=float, default=600, help="for all kinds together")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, help="processes that draw")
    options = vars(parser.parse_args())
    folder, kinds = options.pop("folder"), options.pop("kinds")
    given = {name: value for name, value in options.items() if value is not None}
    train_conditions(folder, replace(Settings(), **given), kinds)


if __name__ == "__main__":
    main()
