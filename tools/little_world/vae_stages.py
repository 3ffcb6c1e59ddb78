"""Stages vae and decoder: pictures to latents that are easy to learn, and back sharply."""

import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from .learner import Course, Learner, Loss, bfloat16_on_a_card, log, warm_up, write
from .muon import AdamW
from .sepia import old_photograph
from .sheet import save_sheet, tried
from .supply import Gallery, as_float
from .thin_vae import ThinVAE
from .workshop import Workshop, encoded

VAE_RATE, DECODER_RATE, WEIGHT_DECAY = 1.5e-3, 1.2e-3, 1e-4
AVERAGE_DECAY = 0.998
PIECES_UNTIL = 0.55  # progress, from where on the VAE learns from whole pictures
VAE_NOISE, DECODER_NOISE = 0.4, 0.35  # at most, on the latents: what is painted is not exact
LOW_EVERY = 4  # steps
SEPIA_EVERY = 8  # pictures: one is seen in sepia, for the adapter's sake
MEASURED = 4096  # pictures whose latents' mean and variance are taken
REFILL_EVERY = 8  # steps


def train_vae(shop: Workshop, until: float, result: Path) -> None:
    """Encoder and decoder together."""
    settings, device = shop.settings, shop.device
    vae = ThinVAE().to(device)
    gallery = Gallery(shop.supply, device, lambda pictures: (_some_in_sepia(pictures),))
    gallery.refill_all()
    learner = Learner(vae, [AdamW(vae.parameters(), VAE_RATE, WEIGHT_DECAY)], AVERAGE_DECAY)

    def loss_of(progress: float) -> tuple[Tensor, int]:
        if learner.steps % REFILL_EVERY == 0:
            gallery.refill()
        whole = progress > PIECES_UNTIL
        count = max(1, settings.vae_batch * 3 // 8) if whole else settings.vae_batch
        (pictures,), *_ = gallery.batch(count)
        if not whole:
            pictures = _piece(pictures, settings.crop)
        # A smaller latent shall mean a smaller picture: such latents are easy to learn.
        low = learner.steps % LOW_EVERY == LOW_EVERY - 1
        x = as_float(pictures)
        with bfloat16_on_a_card(device):
            latents = vae.encode(x)
            if low:
                return distance(vae.decoder(F.avg_pool2d(latents, 2)), F.avg_pool2d(x, 2)), count
            return distance(vae.decoder(_blurred(latents, VAE_NOISE)), x), count

    _run("vae", until, learner, loss_of)
    learner.take_average()
    _measure_latents(vae.eval(), gallery)
    write(result, vae.tensors())
    _report(vae, gallery, device, result.with_suffix(".png"))


def train_decoder(shop: Workshop, until: float, result: Path) -> None:
    """The decoder alone, for latents that stay what they are."""
    device = shop.device
    vae = ThinVAE().load(load_file(shop.folder / "first_vae.safetensors")).to(device)
    vae.encoder.requires_grad_(False)

    def derive(pictures: Tensor) -> tuple[Tensor, Tensor]:
        pictures = _some_in_sepia(pictures)
        return pictures, encoded(vae, pictures)

    gallery = Gallery(shop.supply, device, derive)
    gallery.refill_all()
    optimizer = AdamW(vae.decoder.parameters(), DECODER_RATE, WEIGHT_DECAY)
    learner = Learner(vae, [optimizer], AVERAGE_DECAY)

    def loss_of(progress: float) -> tuple[Tensor, int]:
        if learner.steps % REFILL_EVERY == 0:
            gallery.refill()
        (pictures, latents), *_ = gallery.batch(shop.settings.decoder_batch)
        with bfloat16_on_a_card(device):
            found = vae.decoder(_blurred(latents.float(), DECODER_NOISE))
            return distance(found, as_float(pictures)), len(pictures)

    _run("decoder", until, learner, loss_of)
    learner.take_average()
    write(result, vae.tensors())
    _report(vae, gallery, device, result.with_suffix(".png"))


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Of pictures: of their values, and of their edges so that these stay sharp."""
    found, wanted = found.float(), wanted.float()
    loss = (found - wanted).abs().mean() + (found - wanted).square().mean()
    for axis in (-1, -2):
        loss = loss + 0.5 * (found.diff(dim=axis) - wanted.diff(dim=axis)).abs().mean()
    return loss


def _some_in_sepia(pictures: Tensor) -> Tensor:
    found = pictures.clone()
    found[::SEPIA_EVERY] = old_photograph(pictures[::SEPIA_EVERY])
    return found


def _piece(pictures: Tensor, side: int) -> Tensor:
    """The same square of every picture [n, height, width, 3]."""
    top, left = (random.randint(0, pictures.shape[axis] - side) for axis in (1, 2))
    return pictures[:, top : top + side, left : left + side]


def _blurred(latents: Tensor, most: float) -> Tensor:
    """With noise, of another strength for each picture."""
    strength = torch.rand(len(latents), 1, 1, 1, device=latents.device) * most
    return latents + strength * torch.randn_like(latents)


def _run(name: str, until: float, learner: Learner, loss_of: Loss) -> None:
    torch.backends.cudnn.benchmark = True  # few shapes, again and again
    Course(name, until).run(learner, loss_of, warm_up)
    torch.backends.cudnn.benchmark = False


@torch.no_grad()
def _measure_latents(vae: ThinVAE, gallery: Gallery) -> None:
    """Exact mean and variance of each channel, in place of what the steps went through."""
    values, seen = [], 0
    while seen < min(MEASURED, gallery.have):
        (pictures,), *_ = gallery.batch(min(64, gallery.have))
        with bfloat16_on_a_card(pictures.device):
            latents = vae.encoder(as_float(pictures)).float()
        values.append(latents.permute(1, 0, 2, 3).flatten(1))
        seen += len(pictures)
    of_channels = torch.cat(values, 1)
    vae.latent_norm.running_mean.copy_(of_channels.mean(1))
    vae.latent_norm.running_var.copy_(of_channels.var(1))


@torch.no_grad()
def _report(vae: ThinVAE, gallery: Gallery, device: torch.device, path: Path) -> None:
    """The error of a round trip, and what it looks like."""
    (pictures, *_), *_ = gallery.batch(8)
    x = as_float(pictures).to(device)
    back = vae.eval().decoder(vae.encode(x)).clamp(-1, 1)
    error = (back - x).square().mean((1, 2, 3)) / 4  # of 0..1
    log(f"round trip: {(-10 * error.log10()).mean().item():.1f} dB")
    tried(path.name, lambda: save_sheet([*x, *back], path, columns=8))
