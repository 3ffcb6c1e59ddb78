"""Latents -> picture, and back."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..diffsynth_files import diffsynth_module
from ..offload.chunking import Chunking
from ..offload.offloaded_module import OffloadedModule, onloaded
from ..offload.patcher import Patcher
from ..offload.prefetch import BeforeBlock, PrefetchRing
from . import vae_bands
from .vae_band_plan import BandPlan, plan_decode, plan_encode


@dataclass(frozen=True)
class VAE:
    """Flux's autoencoder: one module with children `encoder` and `decoder`."""

    weights: OffloadedModule
    patcher: Patcher
    dtype: torch.dtype

    def decode(
        self,
        latents: Tensor,
        before_block: BeforeBlock | None = None,
        bands: BandPlan | None = None,
        ring_bytes: int = 0,
        chunking: Chunking | None = None,
    ) -> tuple[Tensor, int]:
        """Model-space latents [batch, 16, h, w] -> float32 RGB [batch, 8h, 8w, 3] in 0..1, CPU.

        One picture at a time, in `bands` of rows, or at once where there are none; in the smallest
        bands once the device lacks memory. The picture is the same with any, up to rounding.
        Returns it and the bytes of weights that were moved.
        """
        decoder, chunking = self.weights.module["decoder"], chunking or Chunking()

        def decoded(latent: Tensor, bands: BandPlan | None) -> Tensor:
            latent = latent[None].to(self.patcher.device, self.dtype)
            if bands is None:
                picture = decoder(latent)
            else:
                way = (before_block, chunking.make_way)
                picture = vae_bands.decode(decoder, latent, bands, *way)
            return (picture.float().cpu() / 2 + 0.5).clamp_(0, 1).movedim(1, -1)

        smallest = partial(plan_decode, *latents.shape[2:], self.dtype.itemsize, 0)
        visits = self.weights.running_on(self.patcher.device, before_block, 0, ring_bytes, chunking)
        return _each(decoder, latents, decoded, visits, bands, smallest, chunking)

    def encode(
        self,
        pictures: Tensor,
        before_block: BeforeBlock | None = None,
        bands: BandPlan | None = None,
        ring_bytes: int = 0,
        chunking: Chunking | None = None,
    ) -> tuple[Tensor, int]:
        """RGB [batch, height, width, 3] in 0..1 -> float32 latents in model space, on the CPU.

        The reverse of `decode`, and in the same way; sides are multiples of 8.
        """
        encoder, chunking = self.weights.module["encoder"], chunking or Chunking()

        def encoded(picture: Tensor, bands: BandPlan | None) -> Tensor:
            picture = picture[None].movedim(-1, 1) * 2 - 1
            if bands is None:
                return encoder(picture.to(self.patcher.device, self.dtype)).float().cpu()
            way = (before_block, chunking.make_way)
            return vae_bands.encode(encoder, picture, bands, *way).float().cpu()

        smallest = partial(plan_encode, *pictures.shape[1:3], self.dtype.itemsize, 0)
        visits = self.weights.running_on(self.patcher.device, before_block, 0, ring_bytes, chunking)
        return _each(encoder, pictures, encoded, visits, bands, smallest, chunking)


def _each(
    part: nn.Module,
    batch: Tensor,
    run: Callable[[Tensor, BandPlan | None], Tensor],
    visits: AbstractContextManager[PrefetchRing],
    bands: BandPlan | None,
    smallest: Callable[[], BandPlan],
    chunking: Chunking,
) -> tuple[Tensor, int]:
    """`run` for each item and its bands, which are the smallest once no memory can be freed."""
    done = []

    def smaller() -> bool:
        nonlocal bands
        found, bands = bands, smallest()
        return found != bands

    with visits as ring, onloaded(part):
        for item in batch:
            # With the same bands again where others leave the card for it: the same picture.
            done.append(chunking.retry(lambda item=item: run(item, bands), smaller))
    return torch.cat(done), ring.moved_bytes


def build_vae(dtype: torch.dtype) -> OffloadedModule:
    """Encoder and decoder with uninitialised weights, as one component."""
    theirs = diffsynth_module("models.flux_vae")
    with torch.device("meta"):
        parts = {"encoder": theirs.FluxVAEEncoder(), "decoder": theirs.FluxVAEDecoder()}
    both = nn.ModuleDict(parts).to(dtype)
    return OffloadedModule(both, [[both["decoder"]]], once=[[both["encoder"]]])
