"""What the Flux transformer is told besides the latents: computed once, for all steps of a run."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..offload.offloaded_module import onloaded
from ..offload.weight_block import CPU
from .picture_conditions import PictureTokens
from .text_encoders import TextEmbedding


@dataclass
class Conditions:
    """What the transformer is told besides the latents, computed once for a whole run.

    text: [1, text tokens, width], in the dtype that the residual is to have; modulation: by sigma,
    what all modulation layers give, [1, 1, n * width], the final norm's last. It waits in the
    host's memory for its step. pictures: where the prompt comes with any.
    """

    text: Tensor
    modulation: dict[float, Tensor] = field(default_factory=dict)
    pictures: PictureTokens | None = None


class LastConditions:
    """Those of the last run, for one that has another seed and nothing else: the layers that give
    them, a quarter of the weights, then need not travel."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Have the next run make its own."""
        self._made_of: list[Any] = []
        self._prompts: Sequence[TextEmbedding] = ()  # whose ids `_made_of` has: so nobody else does
        self._kept: list[Conditions] = []
        self._unpinned = False

    def of(
        self,
        prompts: Sequence[TextEmbedding],
        make: Callable[[], list[Conditions]],
        device: torch.device,
        *given: Hashable,
    ) -> list[Conditions]:
        """On `device` what was made of these prompts' tensors and what else is given, or is now."""
        made_of = [*given, *((id(p.tokens), id(p.pooled), p.guidance, p.guided) for p in prompts)]
        if made_of != self._made_of:
            self.forget()  # before there are others: they take memory
            conditions = make()
            self._kept = [replace(each, text=_on_host(each.text)) for each in conditions]
            self._prompts, self._made_of = prompts, made_of
            return conditions
        if self._unpinned:
            self._unpinned = False
            self._move(partial(_host_memory, device=device))
        return [replace(each, text=each.text.to(device)) for each in self._kept]

    def unpin(self) -> None:
        """Keep them in plain memory until they are asked for again."""
        self._unpinned = True
        self._move(partial(torch.empty, device=CPU))

    def _move(self, new: Callable[..., Tensor]) -> None:
        for each in self._kept:
            places = {level: new(x.shape, dtype=x.dtype) for level, x in each.modulation.items()}
            for level, place in places.items():
                _put(place, each.modulation[level])
            each.modulation = places


def conditions_of(
    dit: Any,
    prompts: Sequence[TextEmbedding],
    guidance: float,
    compute_dtype: torch.dtype,
    device: torch.device,
    dtype: torch.dtype,
    sigmas: Tensor,
) -> list[Conditions]:
    """The conditions of each prompt for every sigma but 0, with one visit of each layer.

    Modulation depends on the step, the guidance and the pooled text alone, while its layers are a
    quarter of the parameters: computed before the first step, they need not travel at every step.
    dtype: of the latents. If it is float32, so are these conditions, the residual and both ends:
    three quarters less error with bfloat16 products, because an error of the modulation is one of
    every token (see benchmarks/README.md). If it is bfloat16, all is rounded as in DiffSynth, which
    makes a guidance of 3504 of 3500.
    """
    sigmas = sigmas[sigmas > 0]
    wide = torch.promote_types(dtype, compute_dtype)

    def active(text: TextEmbedding) -> Tensor:
        """What the modulation layers take, [sigmas, 1, width]."""
        own = guidance if text.guidance is None else text.guidance
        strength = torch.full((1,), own, device=device, dtype=dtype) * 1000
        pooled = dit.pooled_text_embedder(text.pooled.to(device, wide))

        def conditioning(sigma: Tensor) -> Tensor:  # in DiffSynth's order
            timestep = (sigma * 1000).to(device, dtype).reshape(1)
            found = dit.time_embedder(timestep, wide) + pooled
            if dit.guidance_embedder is None or not text.guided:
                return found
            return found + dit.guidance_embedder(strength, wide)

        return F.silu(torch.cat([conditioning(sigma) for sigma in sigmas]))[:, None]

    with onloaded(dit.context_embedder):
        text_tokens = [dit.context_embedder(p.tokens.to(device, wide)) for p in prompts]
        inputs = [active(prompt) for prompt in prompts]

    layers = modulation_layers(dit)
    ends = [*accumulate(len(layer.weight) for layer in layers)]
    shape = len(sigmas), 1, ends[-1]
    of_prompts = [_host_memory(shape, x.dtype, device) for x in inputs]
    for layer, end in zip(layers, ends, strict=True):
        with onloaded(layer):
            for x, of_prompt in zip(inputs, of_prompts, strict=True):
                _put(of_prompt[..., end - len(layer.weight) : end], _on_host(layer(x)))
    return [
        Conditions(tokens, dict(zip(sigmas.tolist(), of_prompt.split(1), strict=True)))
        for tokens, of_prompt in zip(text_tokens, of_prompts, strict=True)
    ]


def _on_host(x: Tensor) -> Tensor:
    return x if x.is_meta else x.cpu()  # nothing can be copied from the meta device


def _host_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """From which copies to `device` need not wait, if the host has so much of that."""
    try:
        return torch.empty(shape, dtype=dtype, device=CPU, pin_memory=device.type == "cuda")
    except RuntimeError:
        return torch.empty(shape, dtype=dtype, device=CPU)


def _put(place: Tensor, x: Tensor) -> None:
    """Copy x there by this thread alone. PyTorch would call a team of threads together for each of
    77 small copies, and the teams of several processes take each other's cores."""
    if not x.is_meta:
        place.view(torch.uint8).numpy()[...] = x.view(torch.uint8).numpy()


def blocks_of(dit: Any) -> list[Any]:
    return [*dit.blocks, *dit.single_blocks]


def modulation_layers(dit: Any) -> list[Any]:
    """In their order; a control net has no last one."""
    of_blocks = [layer for block in blocks_of(dit) for layer in block.modulation_layers()]
    return [*of_blocks, *(norm.linear for norm in (dit.final_norm_out,) if norm is not None)]
