"""One change of each kind that a LoRA can make, and the same in float64."""

from collections.abc import Callable

import torch

from file_layouts import Tensors
from lora_dialects import PROJ, QKV, H, engine_names, kronecker

FINAL = "final_layer.adaLN_modulation.1"
NORM = "double_blocks.0.img_attn.norm.key_norm"
OURS_NORM = "blocks.0.attn.norm_k_a"
WEIGHT, BIAS = f"{engine_names([PROJ])[PROJ]}.weight", f"{engine_names([PROJ])[PROJ]}.bias"
Change = Callable[[torch.Tensor], torch.Tensor]  # of a weight in float64, at strength 1


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 16


def of(layer: str, parts: Tensors) -> Tensors:
    return {f"{layer}.{name}": tensor for name, tensor in parts.items()}


def added(delta: torch.Tensor) -> Change:
    return lambda weight: weight + delta


def low_rank(rank: int, shape: tuple[int, int]) -> tuple[Tensors, torch.Tensor]:
    up, down = random(shape[0], rank), random(rank, shape[1])
    parts = {"lora_A.weight": down, "lora_B.weight": up, "alpha": torch.tensor(3.0)}
    return parts, up.double() @ down.double() * 3 / rank


def loha() -> tuple[Tensors, torch.Tensor]:
    parts = {"hada_w1_a": random(H, 3), "hada_w1_b": random(3, H) * 16,
             "hada_w2_a": random(H, 5), "hada_w2_b": random(5, H)}  # fmt: skip
    one, two = (parts[f"hada_w{n}_a"].double() @ parts[f"hada_w{n}_b"].double() for n in (1, 2))
    return {**parts, "alpha": torch.tensor(1)}, one * two / 3


def lokr(*whole: bool) -> tuple[Tensors, torch.Tensor]:
    parts = kronecker(whole, (8, 16), 4)
    one, two = (
        parts[f"lokr_w{n}"].double()
        if f"lokr_w{n}" in parts
        else parts[f"lokr_w{n}_a"].double() @ parts[f"lokr_w{n}_b"].double()
        for n in (1, 2)
    )
    scale = 1.0 if all(whole) else 2 / 4
    return {**parts, "alpha": torch.tensor(2.0)}, torch.kron(one, two) * scale


def dora(axis: int) -> tuple[Tensors, Change]:
    """Weight and change together get the norms of the file, of their rows or their columns."""
    parts, delta = low_rank(4, (H, H))
    magnitude = 1 + random(H, 1).abs() if axis == 1 else 1 + random(1, H).abs()

    def decomposed(weight: torch.Tensor) -> torch.Tensor:
        whole = weight + delta
        return whole * magnitude.double() / whole.norm(dim=axis, keepdim=True)

    return {**parts, "dora_scale": magnitude}, decomposed


def kinds() -> dict[str, tuple[Tensors, str, Change]]:
    """Of each: tensors of the file, the parameter that they change, how."""
    found = {}
    factors = {"rank 4": low_rank(4, (H, H)), "rank 300": low_rank(300, (H, H)), "LoHa": loha(),
               "LoKr": lokr(True, False), "LoKr of four": lokr(False, False),
               "full LoKr": lokr(True, True),
               "diff": ({"diff": random(H, H)}, random(H, H))}  # fmt: skip
    for name, (parts, delta) in factors.items():
        found[name] = of(PROJ, parts), WEIGHT, added(delta.double())
    found["set_weight"] = of(PROJ, {"set_weight": random(H, H)}), WEIGHT, lambda _: random(H, H)
    found["bias"] = of(PROJ, {"diff_b": random(H)}), BIAS, added(random(H).double())
    found["norm"] = of(NORM, {"set_weight": random(128)}), f"{OURS_NORM}.weight", (
        lambda _: random(128)
    )  # fmt: skip
    found["diff of a norm"] = (
        of(NORM, {"diff": random(128)}), f"{OURS_NORM}.weight", added(random(128).double()),
    )  # fmt: skip
    for name, axis in (("DoRA of rows", 1), ("DoRA of columns", 0)):
        parts, change = dora(axis)
        found[name] = of(PROJ, parts), WEIGHT, change
    parts, delta = low_rank(4, (H, H))
    of_key = torch.zeros(3 * H, H, dtype=torch.float64)
    of_key[H : 2 * H] = delta
    qkv = f"{engine_names([QKV])[QKV]}.weight"
    found["of a part"] = of("transformer_blocks.1.attn.to_k", parts), qkv, added(of_key)
    parts, delta = low_rank(4, (2 * H, H))
    parts["lora_B.weight"] = parts["lora_B.weight"].roll(H, 0)
    final = f"{engine_names([FINAL])[FINAL]}.weight"
    found["halves that change places"] = of("norm_out.linear", parts), final, added(delta)
    whole = random(2 * H, H)
    found["a diff whose halves change places"] = (
        of("norm_out.linear", {"diff": whole.roll(H, 0)}), final, added(whole.double()),
    )  # fmt: skip
    return found


KINDS = kinds()
REPLACED = ("set_weight", "norm")  # whatever the strength, as by ComfyUI


def wanted_of(kind: str, base: Tensors, strength: float) -> tuple[str, torch.Tensor]:
    """The parameter that changes and its value in float64, from the values before."""
    _, name, change = KINDS[kind]
    before = base[name].double()
    after = change(before).double()
    return name, after if kind in REPLACED else before + strength * (after - before)
