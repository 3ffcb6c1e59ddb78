"""A low-rank adapter of the little transformer, written in kohya's dialect for Flux."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .dit import DiT

RANK = 8
OF_DOUBLE_BLOCKS = ("img_attn.qkv", "img_attn.proj", "txt_attn.qkv", "txt_attn.proj")
OF_SINGLE_BLOCKS = ("linear2",)


class Adapted(nn.Module):
    """A linear layer that stays as it is, and what is learnt beside it. Its alpha is its rank."""

    def __init__(self, layer: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        device = layer.weight.device
        self.layer = layer
        self.lora_down = nn.Linear(layer.in_features, rank, bias=False, device=device)
        self.lora_up = nn.Linear(rank, layer.out_features, bias=False, device=device)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.lora_up(self.lora_down(x))


def adapt(dit: DiT) -> nn.ModuleDict:
    """Put adapters into the transformer and freeze all else; returns them by kohya's names."""
    dit.requires_grad_(False)
    found = nn.ModuleDict()
    for path in list(_paths(dit)):
        parent, _, name = path.rpartition(".")
        layer: Any = dit.get_submodule(path)
        adapted = Adapted(layer)
        setattr(dit.get_submodule(parent), name, adapted)
        found["lora_unet_" + path.replace(".", "_")] = adapted
    return found


def kohya_tensors(adapters: nn.ModuleDict) -> dict[str, Tensor]:
    """bfloat16: NAME.lora_down.weight [rank, in], NAME.lora_up.weight [out, rank], NAME.alpha."""
    found = {}
    for name, adapted in adapters.items():
        for part in ("lora_down", "lora_up"):
            weight = adapted.get_parameter(f"{part}.weight")
            found[f"{name}.{part}.weight"] = weight.detach().to("cpu", torch.bfloat16)
        found[f"{name}.alpha"] = torch.tensor(float(RANK), dtype=torch.bfloat16)
    return found


def _paths(dit: DiT) -> Iterator[str]:
    for index in range(len(dit.double_blocks)):
        yield from (f"double_blocks.{index}.{name}" for name in OF_DOUBLE_BLOCKS)
    for index in range(len(dit.single_blocks)):
        yield from (f"single_blocks.{index}.{name}" for name in OF_SINGLE_BLOCKS)
