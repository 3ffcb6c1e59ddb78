"""The forward of the Flux transformer, as a velocity for solvers."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .offload import CPU, at_hand
from .rows import residual_dtype
from .solvers import Velocity
from .text_encoders import TextEmbedding
from .work import Work

# The first and the last layer take as many tokens at once whatever the memory: one of their sides
# is so narrow that a card adds up in another order for fewer of them, and the picture would differ.
ENDS = Work(1024)


@dataclass
class Conditions:
    """What the transformer is told besides the latents, computed once for a whole run.

    text: [1, words, width]; modulation: by sigma, what each modulation layer of each block gives,
    [1, 1, n * width], the final norm's last.
    """

    text: Tensor
    modulation: dict[float, list[list[Tensor]]] = field(default_factory=dict)


def conditions_of(
    dit: Any,
    text: TextEmbedding,
    guidance: float,
    compute_dtype: torch.dtype,
    device: torch.device,
    dtype: torch.dtype,
    sigmas: Tensor,
) -> Conditions:
    """The conditions for every sigma but 0, with one call of each layer.

    Modulation depends on the step, the guidance and the pooled text alone, while its layers are a
    quarter of the parameters: computed before the first step, they need not travel at every step.
    The timestep and the guidance take `dtype`, that of the latents, as in DiffSynth, where bfloat16
    latents therefore mean a guidance of 3504 instead of 3500; float32 latents keep both exact.
    """
    sigmas = sigmas[sigmas > 0]
    own = guidance if text.guidance is None else text.guidance
    strength = torch.full((1,), own, device=device, dtype=dtype) * 1000
    with at_hand(dit.context_embedder):
        tokens = dit.context_embedder(text.tokens.to(device, compute_dtype))
        pooled = dit.pooled_text_embedder(text.pooled.to(device, compute_dtype))

        def conditioning(sigma: Tensor) -> Tensor:  # in DiffSynth's order
            timestep = (sigma * 1000).to(device, dtype).reshape(1)
            found = dit.time_embedder(timestep, compute_dtype) + pooled
            if dit.guidance_embedder is None:
                return found
            return found + dit.guidance_embedder(strength, compute_dtype)

        active = F.silu(torch.cat([conditioning(sigma) for sigma in sigmas]))[:, None]
    layers = [block.modulation_layers() for block in _blocks(dit)]
    found = [[layer(active) for layer in of_block] for of_block in layers]
    found.append([dit.final_norm_out.linear(active)])
    return Conditions(
        tokens,
        {
            sigma.item(): [[layer[step, None] for layer in of_block] for of_block in found]
            for step, sigma in enumerate(sigmas)
        },
    )


def flux_velocity(dit: Any, conditions: Conditions, work: Work | None = None) -> Velocity:
    """The transformer as a function of the latents and one of the sigmas of `conditions`.

    The arithmetic is that of DiffSynth's `model_fn_flux_image`.
    """
    work = work or Work()
    text = conditions.text
    rope: dict[tuple[int, int], Tensor] = {}  # the same at every step

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        height, width = latents.shape[2:]
        size = (height // 2, width // 2)
        if size not in rope:
            rope[size] = _rope(dit, text.shape[1], *size).to(latents.device)
        *modulation, (final,) = conditions.modulation[sigma.item()]
        x = work.attempt(partial(_embedded, dit, latents, text))
        for block, of_block in zip(_blocks(dit), modulation, strict=True):
            block(x, text.shape[1], of_block, rope[size], work)
        out = work.attempt(partial(_final, dit, x[:, text.shape[1] :], final))
        return dit.unpatchify(out, height, width).to(latents.dtype)

    return velocity


def _final(dit: Any, image: Tensor, modulation: Tensor) -> Tensor:
    """The last layer, for [batch, tokens, width]."""
    layer, norm = dit.final_proj_out, modulation.chunk(2, dim=-1)
    out = modulation.new_empty(*image.shape[:2], len(layer.weight))
    for picture, tokens in zip(out, image.split(1), strict=True):
        for some in ENDS.chunks(slice(0, out.shape[1])):
            picture[some] = layer(layer.rows(tokens[:, some], norm=norm))[0]
    return out


def _embedded(dit: Any, latents: Tensor, text: Tensor) -> Tensor:
    """The words, then the latents, as tokens of the transformer: [batch, tokens, width]."""
    patches = dit.patchify(latents.to(text.dtype))
    words = text.shape[1]
    shape = (len(latents), words + patches.shape[1], text.shape[2])
    x = text.new_empty(shape, dtype=residual_dtype(text))
    x[:, :words] = text
    for picture, mine in enumerate(patches):
        for some in ENDS.chunks(slice(0, len(mine))):
            x[picture, words:][some] = dit.x_embedder(mine[some])
    return x


def _blocks(dit: Any) -> list[Any]:
    return [*dit.blocks, *dit.single_blocks]


def _rope(dit: Any, words: int, rows: int, columns: int) -> Tensor:
    """RoPE of the words, at (0, 0, 0), and of each 2x2 latent patch, at (0, row, column).

    Its sines are computed in float64, which not every device has. The positions are float32:
    DiffSynth's own take the latents' dtype, and bfloat16 skips integers above 256, which a side
    of 4096 pixels reaches.
    """
    ids = torch.zeros(rows, columns, 3, device=CPU)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)
    everything = torch.cat([torch.zeros(words, 3), ids.reshape(rows * columns, 3)])
    return dit.pos_embedder(everything[None])
