"""What an adapter (LoRA) adds to a model: low-rank terms, by the names of the layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LowRankTerm:
    """scale * up @ down, added to the weight's output columns first : first + len(up).

    down: [rank, in], up: [columns, rank], both bfloat16 on the CPU.
    """

    down: Tensor
    up: Tensor
    scale: float
    first: int = 0


@dataclass(frozen=True, eq=False)
class Adapter:
    """Of one file. terms: by the name of the layer; biases: added, norms: in place of theirs."""

    terms: Mapping[str, tuple[LowRankTerm, ...]]
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, Tensor] = field(default_factory=dict)
