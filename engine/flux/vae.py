"""Latents -> picture, and back."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..allocator import is_out_of_memory
from ..diffsynth_files import diffsynth_module
from ..offload.chunking import Chunking
from ..offload.offloaded_module import OffloadedModule, onloaded
from ..offload.patcher import Patcher
from ..offload.prefetch import BeforeBlock, PrefetchRing
from . import vae_band_plan, vae_bands


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
        limit_bytes: float = float("inf"),
        ring_bytes: int = 0,
        work: Chunking | None = None,
    ) -> tuple[Tensor, int]:
        """Model-space latents [batch, 16, h, w] -> float32 RGB [batch, 8h, 8w, 3] in 0..1, CPU.

        One picture at a time, in bands of rows that take `limit_bytes` of the device beside the
        weights, or in the smallest ones if it is short of memory. The picture is the same with any,
        up to rounding. Returns it and the bytes of weights that were moved.
        """
        decoder, work = self.weights.module["decoder"], work or Chunking()

        def decoded(latent: Tensor, limit: float) -> Tensor:
            latent = latent[None].to(self.patcher.device, self.dtype)
            rows, columns = latent.shape[2:]
            if limit == float("inf"):
                picture = decoder(latent)
            else:
                beside = 2 * latent.nbytes  # it, and what the decoder makes of it first
                bands = vae_band_plan.plan_decode(rows, columns, latent.itemsize, limit - beside)
                picture = vae_bands.decode(decoder, latent, bands, before_block, work.make_way)
            return (picture.float().cpu() / 2 + 0.5).clamp_(0, 1).movedim(1, -1)

        visits = self.weights.running_on(self.patcher.device, before_block, 0, ring_bytes, work)
        return self._each(decoder, latents, decoded, visits, limit_bytes, work)

    def encode(
        self,
        pictures: Tensor,
        before_block: BeforeBlock | None = None,
        limit_bytes: float = float("inf"),
        ring_bytes: int = 0,
        work: Chunking | None = None,
    ) -> tuple[Tensor, int]:
        """RGB [batch, height, width, 3] in 0..1 -> float32 latents in model space, on the CPU.

        The reverse of `decode`, and in the same way; sides are multiples of 8.
        """
        encoder, work = self.weights.module["encoder"], work or Chunking()

        def encoded(picture: Tensor, limit: float) -> Tensor:
            picture = picture[None].movedim(-1, 1) * 2 - 1
            height, width = picture.shape[2:]
            if limit == float("inf"):
                latent = encoder(picture.to(self.patcher.device, self.dtype))
            else:
                bands = vae_band_plan.plan_encode(height, width, self.dtype.itemsize, limit)
                latent = vae_bands.encode(encoder, picture, bands, before_block, work.make_way)
            return latent.float().cpu()

        visits = self.weights.running_on(self.patcher.device, before_block, 0, ring_bytes, work)
        return self._each(encoder, pictures, encoded, visits, limit_bytes, work)

    @staticmethod
    def _each(
        part: nn.Module,
        batch: Tensor,
        run: Callable[[Tensor, float], Tensor],
        visits: AbstractContextManager[PrefetchRing],
        limit_bytes: float,
        work: Chunking,
    ) -> tuple[Tensor, int]:
        """`run` for each item and the limit, or 0 as the limit once memory was short."""
        done = []
        with visits as stream, onloaded(part):
            for item in batch:
                try:
                    done.append(run(item, limit_bytes))
                    continue
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    limit_bytes = 0
                done.append(work.attempt(partial(run, item, limit_bytes)))
        return torch.cat(done), stream.moved_bytes


def build_vae(dtype: torch.dtype) -> OffloadedModule:
    """Encoder and decoder with uninitialised weights, as one component."""
    theirs = diffsynth_module("models.flux_vae")
    with torch.device("meta"):
        parts = {"encoder": theirs.FluxVAEEncoder(), "decoder": theirs.FluxVAEDecoder()}
    both = nn.ModuleDict(parts).to(dtype)
    return OffloadedModule(both, [[both["decoder"]]], once=[[both["encoder"]]])
