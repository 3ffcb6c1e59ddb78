"""Stages transformer and guidance: to paint what a prompt says, and to do it in one pass."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .flow import PACK_T5_LENGTH, draw_guidance, guided, mean_square, noisy
from .learner import Course, Learner, bfloat16_on_a_card, compiled, log, warm_up, write
from .models import LittleFlux
from .muon import muon_and_adamw
from .packing import packed
from .sheet import painted_sheet, tried
from .vocabulary import T5_LENGTH
from .workshop import Workshop

MUON_RATE, ADAMW_RATE = 2e-3, 1e-3
AVERAGE_DECAY = 0.9985
EMPTY_PROMPTS = 0.1  # share
SHEET_CFG = 2.5  # of a model that has not learnt guidance
DISTILLED_RATE = 0.4  # of the rates above
DISTILLED_AVERAGE_DECAY = 0.997
UNGUIDED = 0.15  # share of the pictures at guidance 1, the end of the range
REFILL_EVERY = 4  # steps
SO_FAR = "so_far.safetensors"


def train_transformer(shop: Workshop, until: float, result: Path) -> None:
    """Transformer and text encoders learn from pictures what their captions mean."""
    device, batch = shop.device, shop.settings.batch
    gallery = shop.latents
    model = shop.flux()
    learner = _learner(model, 1.0, AVERAGE_DECAY)
    checkpoint = result.with_suffix(".checkpoint")
    begun = learner.resume(checkpoint)
    if begun:
        log(f"transformer: goes on at {begun:.1%}")
    compiled(list(model.blocks()), device)

    def loss_of(progress: float) -> tuple[Tensor, int]:
        if learner.steps % REFILL_EVERY == 0:
            gallery.refill()
        (clean,), *ids = gallery.batch(batch)
        x, sigma, wanted = noisy(clean.float())
        with bfloat16_on_a_card(device):
            found = model(x, sigma, *_some_empty(shop, *ids), draw_guidance(batch, device))
        return mean_square(found, wanted), batch

    def save(progress: float) -> None:
        learner.save(checkpoint, progress)
        pack(shop, learner.averaged(), shop.folder / SO_FAR)

    course = Course("transformer", until, begun)
    course.run(learner, loss_of, warm_up, save, shop.settings.save_every)
    save(1.0)
    _finish(shop, learner, result, cfg=SHEET_CFG)
    checkpoint.unlink()  # if the result is deleted, it is trained anew


def train_guidance(shop: Workshop, until: float, result: Path) -> None:
    """Distillation: what two passes with and without prompt give together, in one pass that is
    told the strength; and as many T5 tokens as the pack gives."""
    device, batch = shop.device, shop.settings.guidance_batch
    gallery = shop.latents
    teacher = shop.flux_of("transformer.safetensors").requires_grad_(False)
    student = shop.flux_of("transformer.safetensors")
    learner = _learner(student, DISTILLED_RATE, DISTILLED_AVERAGE_DECAY)
    compiled([*teacher.blocks(), *student.blocks()], device)

    @torch.no_grad()
    def taught(x: Tensor, sigma: Tensor, ids: list[Tensor], guidance: Tensor) -> Tensor:
        """Guidance g is classifier-free guidance of (1 + g) / 2: 3.5 then looks as in Flux."""
        empty = (own.expand(batch, -1) for own in shop.empty_ids)
        both = [torch.cat(pair) for pair in zip(ids, empty, strict=True)]
        with bfloat16_on_a_card(device):
            given = (x.repeat(2, 1, 1, 1), sigma.repeat(2), *both, guidance.repeat(2))
            conditional, unconditional = teacher(*given).float().chunk(2)
        return guided(conditional, unconditional, (1 + guidance) / 2)

    def loss_of(progress: float) -> tuple[Tensor, int]:
        if learner.steps % REFILL_EVERY == 0:
            gallery.refill()
        (clean,), *ids = gallery.batch(batch)
        x, sigma, _ = noisy(clean.float())
        guidance = draw_guidance(batch, device)
        guidance = torch.where(torch.rand(batch, device=device) < UNGUIDED, 1.0, guidance)
        t5_ids, clip_ids = _some_empty(shop, *ids)
        wanted = taught(x, sigma, [t5_ids, clip_ids], guidance)
        with bfloat16_on_a_card(device):
            found = student(x, sigma, filled(t5_ids), clip_ids, guidance)
        return mean_square(found, wanted), batch

    def factor(steps: int, progress: float) -> float:
        return warm_up(steps, progress, over=50, level_until=0.2)

    def save(progress: float) -> None:
        pack(shop, learner.averaged(), shop.folder / SO_FAR)

    course = Course("guidance", until)
    course.run(learner, loss_of, factor, save, shop.settings.save_every)
    _finish(shop, learner, result)


def pack(shop: Workshop, flux_tensors: dict[str, Tensor], path: Path) -> None:
    """The file that ships: these weights and the VAE's."""
    vae = {f"vae.{name}": tensor for name, tensor in shop.vae().tensors().items()}
    write(path, packed(vae | flux_tensors))


def filled(t5_ids: Tensor) -> Tensor:
    """With T5's filling token, 0, as long as the pack gives them."""
    return F.pad(t5_ids, (0, PACK_T5_LENGTH - T5_LENGTH))


def _learner(model: LittleFlux, rate: float, average_decay: float) -> Learner:
    optimizers = muon_and_adamw(model.blocks(), model, rate * MUON_RATE, rate * ADAMW_RATE)
    return Learner(model, optimizers, average_decay)


def _some_empty(shop: Workshop, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
    """With no prompt for some pictures: what guidance leads away from."""
    empty = (torch.rand(len(t5_ids), device=t5_ids.device) < EMPTY_PROMPTS)[:, None]
    of_t5, of_clip = shop.empty_ids
    return torch.where(empty, of_t5, t5_ids), torch.where(empty, of_clip, clip_ids)


def _finish(shop: Workshop, learner: Learner, result: Path, cfg: float | None = None) -> None:
    """Write the average, and paint with it: by a new model, whose blocks are not compiled."""
    write(result, learner.averaged())
    model, settings = shop.flux(learner.averaged()), shop.settings
    sheet = result.with_suffix(".png")

    def make() -> None:
        given = (model, shop.vae(), shop.words, settings.sizes, sheet, shop.device)
        painted_sheet(*given, steps=settings.sheet_steps, cfg=cfg)

    tried(sheet.name, make)
