"""The forward of the Flux transformer, as a velocity for solvers."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.ops import norm_modulate_quantize
from ..offload.chunking import Chunking
from ..offload.weight_block import CPU
from ..sampling.solvers import Velocity
from .blocks import TokenSequence
from .conditioning import Conditions, blocks_of, modulation_layers

# The first and the last layer take as many tokens at once whatever the memory: one of their sides
# is so narrow that a card adds up in another order for fewer of them, and the picture would differ.
ENDS = Chunking(1024)


def flux_velocity(
    dit: Any,
    positive: Conditions,
    work: Chunking | None = None,
    negative: Conditions | None = None,
    cfg: float = 1.0,
) -> Velocity:
    """The transformer as a function of the latents and one of the sigmas of its conditions.

    With a negative prompt: classifier-free guidance. Both prompts go through the blocks side by
    side, so that each block of weights travels once. The arithmetic is that of DiffSynth's
    `model_fn_flux_image`.
    """
    work = work or Chunking()
    prompts = [each for each in (positive, negative) if each is not None]
    rope: dict[tuple[int, int, int], Tensor] = {}  # the same at every step
    sizes = [len(layer.weight) for layer in modulation_layers(dit)]

    def rope_of(words: int, rows: int, columns: int, device: torch.device) -> Tensor:
        size = (words, rows, columns)
        if size not in rope:
            rope[size] = _rope(dit, *size).to(device)
        return rope[size]

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        height, width = latents.shape[2:]
        sequences, modulations = [], []
        for prompt in prompts:
            told = prompt.modulation[sigma.item()]
            told = work.attempt(partial(told.to, latents.device, non_blocking=True))
            modulations.append(iter(told.split(sizes, dim=-1)))
            words = prompt.text.shape[1]
            turned = rope_of(words, height // 2, width // 2, latents.device)
            x = work.attempt(partial(_embedded, dit, latents, prompt.text))
            sequences.append(TokenSequence(x, words, turned))
        for block in blocks_of(dit):
            layers = block.modulation_layers()
            of_block = [[next(of_prompt) for _ in layers] for of_prompt in modulations]
            block(sequences, of_block, work)
        found = []
        for sequence, modulation in zip(sequences, modulations, strict=True):
            image = sequence.x[:, sequence.words :]
            out = work.attempt(partial(_final, dit, image, next(modulation)))
            found.append(dit.unpatchify(out, height, width).to(latents.dtype))
        return found[0] if negative is None else found[1] + cfg * (found[0] - found[1])

    return velocity


def _final(dit: Any, image: Tensor, modulation: Tensor) -> Tensor:
    """The last layer, for [batch, tokens, width]."""
    layer, (shift, scale) = dit.final_proj_out, modulation.chunk(2, dim=-1)
    out = modulation.new_empty(*image.shape[:2], len(layer.weight))
    for picture, tokens in zip(out, image.split(1), strict=True):
        for some in ENDS.chunks(slice(0, out.shape[1])):
            picture[some] = layer(norm_modulate_quantize(tokens[:, some], (shift, scale)))[0]
    return out


def _embedded(dit: Any, latents: Tensor, text: Tensor) -> Tensor:
    """The words, then the latents, as tokens of the transformer: [batch, tokens, width]."""
    patches = dit.patchify(latents.to(text.dtype))
    words = text.shape[1]
    x = text.new_empty(len(latents), words + patches.shape[1], text.shape[2])
    x[:, :words] = text
    for picture, mine in enumerate(patches):
        for some in ENDS.chunks(slice(0, len(mine))):
            x[picture, words:][some] = dit.x_embedder(mine[some])
    return x


def _rope(dit: Any, words: int, rows: int, columns: int) -> Tensor:
    """RoPE of the words, at (0, 0, 0), and of each 2x2 latent patch, at (0, row, column).

    Its sines are computed in float64, which not every device has. The positions are float32:
    DiffSynth's own take the latents' dtype, and bfloat16 skips integers above 256, which a side
    of 4096 pixels reaches.
    """
    ids = torch.zeros(rows, columns, 3, dtype=torch.float32, device=CPU)
    ids[..., 1] = torch.arange(rows, device=CPU)[:, None]
    ids[..., 2] = torch.arange(columns, device=CPU)
    everything = torch.cat([ids.new_zeros(words, 3), ids.reshape(rows * columns, 3)])
    return dit.pos_embedder(everything[None])
