"""Low-rank adapters of the little transformer: a style in kohya's dialect for Flux, and one that
takes a further picture, as Black Forest Labs write theirs of depth and canny."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.sizes import OF_LATENTS
from .dit import DiT

RANK = 8
CONTROL_RANK = 32  # their real ones have 128, of matrices twelve times as wide
OF_DOUBLE_BLOCKS = ("img_attn.qkv", "img_attn.proj", "txt_attn.qkv", "txt_attn.proj")
OF_SINGLE_BLOCKS = ("linear2",)


class Adapted(nn.Module):
    """A linear layer that stays as it is, and what is learnt beside it. Its alpha is its rank.

    wide: channels, of which the layer itself sees as many of the first as it always did; bias:
    whether one is learnt too.
    """

    def __init__(
        self, layer: nn.Linear, rank: int = RANK, wide: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        device = layer.weight.device
        self.layer = layer
        self.lora_down = nn.Linear(wide or layer.in_features, rank, bias=False, device=device)
        self.lora_up = nn.Linear(rank, layer.out_features, bias=bias, device=device)
        for parameter in self.lora_up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        own = x[..., : self.layer.in_features]
        return self.layer(own) + self.lora_up(self.lora_down(x))


def adapt(dit: DiT) -> nn.ModuleDict:
    """Put adapters into the transformer and freeze all else; returns them by kohya's names."""
    dit.requires_grad_(False)
    found = nn.ModuleDict()
    for path in list(_paths(dit)):
        layer: Any = dit.get_submodule(path)
        found["lora_unet_" + path.replace(".", "_")] = _put(dit, path, Adapted(layer))
    return found


def adapt_for_control(dit: DiT) -> dict[str, Adapted]:
    """Put adapters at all linear layers and freeze all else; returns them by their paths.

    The first sees a picture's latents too.
    """
    dit.requires_grad_(False)
    layers = [(path, m) for path, m in dit.named_modules() if isinstance(m, nn.Linear)]
    found = {}
    for path, layer in layers:
        wide = 2 * OF_LATENTS if path == "img_in" else None
        found[path] = _put(dit, path, Adapted(layer, CONTROL_RANK, wide, bias=True))
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


def control_tensors(dit: DiT, adapters: dict[str, Adapted]) -> dict[str, Tensor]:
    """NAME.lora_A.weight [rank, in], NAME.lora_B.weight [out, rank], NAME.lora_B.bias, and the
    norms of queries and keys, which such a file replaces, as they are."""
    found: dict[str, Tensor] = {
        name: norm for name, norm in dit.named_parameters() if name.endswith("_norm.scale")
    }
    for path, adapted in adapters.items():
        found[f"{path}.lora_A.weight"] = adapted.lora_down.weight
        found[f"{path}.lora_B.weight"] = adapted.lora_up.weight
        found[f"{path}.lora_B.bias"] = adapted.lora_up.bias
    return found


def _put(dit: DiT, path: str, adapted: Adapted) -> Adapted:
    parent, _, name = path.rpartition(".")
    setattr(dit.get_submodule(parent), name, adapted)
    return adapted


def _paths(dit: DiT) -> Iterator[str]:
    for index in range(len(dit.double_blocks)):
        yield from (f"double_blocks.{index}.{name}" for name in OF_DOUBLE_BLOCKS)
    for index in range(len(dit.single_blocks)):
        yield from (f"single_blocks.{index}.{name}" for name in OF_SINGLE_BLOCKS)
