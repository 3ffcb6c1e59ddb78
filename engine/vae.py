"""Latents -> picture."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .offload import BeforeBlock, OffloadedModule, Patcher

log = logging.getLogger("majicflux")


@dataclass(frozen=True)
class VAE:
    """Flux's autoencoder: one module with children `encoder` and `decoder`."""

    weights: OffloadedModule
    patcher: Patcher
    dtype: torch.dtype

    def decode(self, latents: Tensor, before_block: BeforeBlock | None = None) -> Tensor:
        """Model-space latents [batch, 16, h, w] -> float32 RGB [batch, 8h, 8w, 3] in 0..1, CPU.

        One picture at a time. When the device runs out of memory the picture is decoded in
        overlapping tiles, which changes it slightly.
        """
        with self.weights.running_on(self.patcher.device, before_block) as module:
            pictures = [self._decode_one(module.decoder, latent[None]) for latent in latents]
        return torch.cat(pictures)

    def _decode_one(self, decoder: nn.Module, latent: Tensor) -> Tensor:
        latent = latent.to(self.patcher.device, self.dtype)
        try:
            picture = decoder(latent)
        except torch.OutOfMemoryError:
            picture = None  # retried below, once the traceback has let go of the tensors
        if picture is None:
            log.warning("The VAE did not fit into memory at once; decoding in tiles instead.")
            picture = decoder(latent, tiled=True)
        return (picture.float().cpu() / 2 + 0.5).clamp_(0, 1).movedim(1, -1)


def build_vae(dtype: torch.dtype) -> OffloadedModule:
    """Encoder and decoder with uninitialised weights, as one component."""
    from diffsynth.core.vram.initialization import skip_model_initialization
    from diffsynth.models.flux_vae import FluxVAEDecoder, FluxVAEEncoder

    with skip_model_initialization():
        both = nn.ModuleDict({"encoder": FluxVAEEncoder(), "decoder": FluxVAEDecoder()}).to(dtype)
    return OffloadedModule(both, [both["encoder"], both["decoder"]])
