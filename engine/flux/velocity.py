"""The forward of the Flux transformer, as a velocity for solvers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.ops import norm_modulate_quantize
from ..offload.chunking import Chunking, split
from ..offload.weight_block import CPU
from ..sampling.guidance import classifier_free
from ..sampling.solvers import Velocity
from ..sizes import PATCH
from .blocks import TokenSequence
from .conditioning import Conditions, blocks_of, modulation_layers
from .picture_conditions import Place

# The first and the last layer take as many tokens at once whatever the memory: one of their sides
# is so narrow that a card adds up in another order for fewer of them, and the picture would differ.
TOKENS_OF_ENDS = 1024

Ropes = dict[tuple[object, ...], Tensor]  # by the tokens that they turn: the same at every step


@dataclass(frozen=True)
class Pass:
    """One pass of all sequences through the blocks, at some latents and one of the sigmas.

    modulations: for each prompt what the modulation layers gave, in their order.
    """

    latents: Tensor
    sigma: Tensor
    sequences: Sequence[TokenSequence]
    modulations: Sequence[Iterator[Tensor]]

    def through(self, block: Any, chunking: Chunking) -> None:
        """All sequences, in place."""
        layers = block.modulation_layers()
        of_block = [[next(of_prompt) for _ in layers] for of_prompt in self.modulations]
        block(self.sequences, of_block, chunking)


# How the sequences pass through the blocks, in place, with a pause behind each: here blocks are
# left out that need not be computed, or what a control net found is added.
Blocks = Callable[[Any, Pass, Chunking], Iterator[None]]


def all_blocks(dit: Any, running: Pass, chunking: Chunking) -> Iterator[None]:
    for block in blocks_of(dit):
        running.through(block, chunking)
        yield


def flux_velocity(
    dit: Any,
    positive: Conditions,
    chunking: Chunking | None = None,
    negative: Conditions | None = None,
    cfg: float = 1.0,
    through_blocks: Blocks = all_blocks,
) -> Velocity:
    """The transformer as a function of the latents and one of the sigmas of its conditions.

    With a negative prompt: classifier-free guidance. Both prompts go through the blocks side by
    side, so that each block of weights travels once. The arithmetic is that of DiffSynth's
    `model_fn_flux_image`.
    """
    chunking = chunking or Chunking()
    prompts = [each for each in (positive, negative) if each is not None]
    ropes: Ropes = {}

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        height, width = latents.shape[2:]
        running = begun(dit, prompts, latents, sigma, ropes, chunking)
        for _ in through_blocks(dit, running, chunking):
            pass
        slopes = []
        for sequence, modulation in zip(running.sequences, running.modulations, strict=True):
            *_, of_last_layer = modulation  # behind those of blocks that were left out
            out = chunking.retry(partial(_final, dit, sequence.image, of_last_layer))
            slopes.append(dit.unpatchify(out, height, width).to(latents.dtype))
        return slopes[0] if negative is None else classifier_free(slopes[0], slopes[1], cfg)

    return velocity


def begun(
    dit: Any,
    prompts: Sequence[Conditions],
    latents: Tensor,
    sigma: Tensor,
    ropes: Ropes,
    chunking: Chunking,
) -> Pass:
    """A pass that has been through no block yet. ropes: are remembered there."""
    height, width = latents.shape[2:]
    painted = Place(0, 0, 0, height // PATCH, width // PATCH)
    widths = [len(layer.weight) for layer in modulation_layers(dit)]
    sequences, modulations = [], []
    for prompt in prompts:
        on_host = prompt.modulation[sigma.item()]
        modulation = chunking.retry(partial(on_host.to, latents.device, non_blocking=True))
        modulations.append(iter(modulation.split(widths, dim=-1)))
        references = () if prompt.pictures is None else prompt.pictures.places
        tokens = (prompt.text.shape[1], painted, *references)
        if tokens not in ropes:
            ropes[tokens] = _rope(dit, *tokens).to(latents.device)
        x = chunking.retry(partial(_embedded, dit, latents, prompt))
        sequences.append(TokenSequence(x, prompt.text.shape[1], painted.tokens, ropes[tokens]))
    return Pass(latents, sigma, sequences, modulations)


def _final(dit: Any, image: Tensor, modulation: Tensor) -> Tensor:
    """The last layer, for [batch, tokens, width]."""
    layer, (shift, scale) = dit.final_proj_out, modulation.chunk(2, dim=-1)
    out = modulation.new_empty(*image.shape[:2], len(layer.weight))
    for picture, tokens in zip(out, image.split(1), strict=True):
        for some in split(slice(0, out.shape[1]), TOKENS_OF_ENDS):
            picture[some] = layer(norm_modulate_quantize(tokens[:, some], (shift, scale)))[0]
    return out


def _embedded(dit: Any, latents: Tensor, prompt: Conditions) -> Tensor:
    """The text, the latents with what lies beside them, and references, as tokens of the
    transformer: [batch, tokens, width]."""
    text, pictures = prompt.text, prompt.pictures
    patches = dit.patchify(latents.to(text.dtype))
    references = 0 if pictures is None else sum(place.tokens for place in pictures.places)
    text_tokens = text.shape[1]
    x = text.new_empty(len(latents), text_tokens + patches.shape[1] + references, text.shape[2])
    x[:, :text_tokens] = text
    for number, mine in enumerate(patches):
        first = text_tokens
        for part in [mine] if pictures is None else pictures.parts(number, mine):
            place = x[number, first : first + len(part)]
            for some in split(slice(0, len(part)), TOKENS_OF_ENDS):
                place[some] = dit.x_embedder(part[some])
            first += len(part)
    return x


def _rope(dit: Any, text_tokens: int, *pictures: Place) -> Tensor:
    """RoPE of the text, at (0, 0, 0), and of each 2x2 latent patch, at (index, row, column).

    Its sines are computed in float64, which not every device has. The positions are float32:
    DiffSynth's own take the latents' dtype, and bfloat16 skips integers above 256, which a side
    of 4096 pixels reaches.
    """
    text = torch.zeros(text_tokens, 3, dtype=torch.float32, device=CPU)
    return dit.pos_embedder(torch.cat([text, *map(_ids, pictures)])[None])


def _ids(place: Place) -> Tensor:
    """(index, row, column) of each of its tokens, float32."""
    ids = torch.empty(place.rows, place.columns, 3, dtype=torch.float32, device=CPU)
    ids[..., 0] = place.index
    ids[..., 1] = place.top + torch.arange(place.rows, device=CPU)[:, None]
    ids[..., 2] = place.left + torch.arange(place.columns, device=CPU)
    return ids.reshape(place.tokens, 3)
