"""Latents -> picture."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from . import vae_bands
from .offload import BeforeBlock, OffloadedModule, Patcher, at_hand
from .work import Work


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
        work: Work | None = None,
    ) -> tuple[Tensor, int]:
        """Model-space latents [batch, 16, h, w] -> float32 RGB [batch, 8h, 8w, 3] in 0..1, CPU.

        One picture at a time, in bands of rows that take `limit_bytes` of the device beside the
        weights, or in the smallest ones if it is short of memory. The picture is the same with any,
        up to rounding. Returns it and the bytes of weights that were moved.
        """
        work = work or Work()
        rows, columns = latents.shape[2:]

        def bands_in(limit: float) -> vae_bands.Bands:
            return vae_bands.plan_decode(rows, columns, self.dtype.itemsize, limit)

        visits = self.weights.running_on(self.patcher.device, before_block, 1, ring_bytes, work)
        with visits as stream:
            decoder = self.weights.module["decoder"]

            def decoded(latent: Tensor, bands: vae_bands.Bands) -> Tensor:
                latent = latent[None].to(self.patcher.device, self.dtype)
                with at_hand(decoder):
                    if limit_bytes == float("inf"):
                        picture = decoder(latent)
                    else:
                        picture = vae_bands.decode(decoder, latent, bands, before_block)
                return (picture.float().cpu() / 2 + 0.5).clamp_(0, 1).movedim(1, -1)

            bands = bands_in(limit_bytes)
            pictures = []
            for latent in latents:
                try:
                    pictures.append(decoded(latent, bands))
                    continue
                except torch.OutOfMemoryError:
                    bands = bands_in(0)
                pictures.append(work.attempt(partial(decoded, latent, bands)))
        return torch.cat(pictures), stream.moved_bytes


def build_vae(dtype: torch.dtype) -> OffloadedModule:
    """Encoder and decoder with uninitialised weights, as one component."""
    from diffsynth.core.vram.initialization import skip_model_initialization
    from diffsynth.models.flux_vae import FluxVAEDecoder, FluxVAEEncoder

    with skip_model_initialization():
        both = nn.ModuleDict({"encoder": FluxVAEEncoder(), "decoder": FluxVAEDecoder()}).to(dtype)
    return OffloadedModule(both, [[both["decoder"]]], once=[[both["encoder"]]])
