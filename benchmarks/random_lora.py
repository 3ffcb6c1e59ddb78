"""A random LoRA for the small random transformer."""

from collections.abc import Iterable

import torch
from torch import Tensor

RANK = 4
SIZE = 0.1  # of what is added, beside weights that keep the size of what passes through them


def random_lora(
    shapes: Iterable[tuple[str, tuple[int, ...]]], rank: int = RANK
) -> dict[str, Tensor]:
    """A random change of each matrix in the blocks, the same at every call.

    shapes: of the tensors in the transformer's file, by their names there.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in sorted(shapes):
        if "blocks." not in name or len(shape) != 2:
            continue
        layer = name.removeprefix("model.").removesuffix(".weight")
        down = torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5
        up = torch.randn(shape[0], rank, generator=generator) * (SIZE / rank**0.5)
        tensors[f"{layer}.lora_A.weight"] = down.to(torch.bfloat16)
        tensors[f"{layer}.lora_B.weight"] = up.to(torch.bfloat16)
    return tensors
