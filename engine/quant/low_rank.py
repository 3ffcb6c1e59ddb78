"""What a LoRA adds to the layers of a model, whatever program wrote it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...messages import say

if TYPE_CHECKING:
    from torch import Tensor

SOME = 3  # names that stand for all in a report


@dataclass(frozen=True, eq=False)
class LowRankTerm:
    """scale * up @ down, added to the weight's output columns [first, first + len(up)).

    down: [rank, in], with more inputs than the layer itself has in a control LoRA's first layer;
    up: [columns, rank]; both in bfloat16. scale: alpha / rank, or alpha / sqrt(rank). Terms of one
    layer that have equal downs have the same one.
    """

    down: "Tensor"
    up: "Tensor"
    scale: float
    first: int = 0

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def columns(self) -> slice:
        return slice(self.first, self.first + len(self.up))


@dataclass(frozen=True)
class AdapterReport:
    """What was found in a file.

    dialect: whose names it uses. methods: LoRA, LoHa, LoKr, DoRA. ranks: that occur, sorted.
    layers, text_layers: how many of the transformer and of CLIP-L it reaches. unused: tensors by
    the reason why they are not used. baking: layers of the transformer by the reason why low-rank
    terms cannot express what the file does to them, so that it is baked into the weights. Both
    kinds of reasons are texts for `say`. takes_picture: a control LoRA, with which the transformer
    sees a picture beside the noise.
    """

    file: str = ""
    dialect: str = ""
    methods: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    layers: int = 0
    text_layers: int = 0
    unused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    baking: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    takes_picture: bool = False

    def __str__(self) -> str:
        ranks = [str(rank) for rank in self.ranks]
        lines = [
            say(
                "{file}: {methods} in the names of {dialect}, rank {ranks}; layers of the "
                "transformer: {layers}, of CLIP-L: {text}",
                file=self.file,
                methods=" + ".join(self.methods) or "–",
                dialect=self.dialect,
                ranks=" – ".join(ranks if len(ranks) < 3 else [ranks[0], ranks[-1]]) or "–",
                layers=self.layers,
                text=self.text_layers,
            )
        ]
        for reason, names in self.unused.items():
            lines.append(
                say(
                    "tensors not used ({reason}): {count}, as {names}",
                    count=len(names),
                    reason=say(reason),
                    names=_some(names),
                )
            )
        for reason, names in self.baking.items():
            lines.append(
                say(
                    "layers that need baking in ({reason}): {count}, as {names}",
                    count=len(names),
                    reason=say(reason),
                    names=_some(names),
                )
            )
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a file changes, by the names of the layers in the engine.

    terms: of linear layers of the transformer. biases: added, [out]. norms: in place of the weight
    of a norm. magnitudes: DoRA on the output axis, [out]: the norm that each row of the sum of
    weight and terms is given, NaN for rows that keep theirs. These three are in float32.
    text_encoder: terms of CLIP-L. gains: what `adapters.row_gains` finds for the magnitudes, which
    depends on the weights of a transformer.
    """

    terms: Mapping[str, tuple[LowRankTerm, ...]]
    biases: Mapping[str, "Tensor"] = field(default_factory=dict)
    norms: Mapping[str, "Tensor"] = field(default_factory=dict)
    magnitudes: Mapping[str, "Tensor"] = field(default_factory=dict)
    report: AdapterReport = AdapterReport()
    text_encoder: Mapping[str, tuple[LowRankTerm, ...]] = field(default_factory=dict)
    gains: Mapping[str, "Tensor"] = field(default_factory=dict)

    @property
    def reaches_transformer(self) -> bool:
        return bool(self.terms or self.biases or self.norms or self.magnitudes)

    @property
    def nbytes(self) -> int:
        """Of memory for the terms, those of CLIP-L included."""
        layers = [*self.terms.values(), *self.text_encoder.values()]
        tensors = [x for terms in layers for term in terms for x in (term.down, term.up)]
        return sum(x.nbytes for x in {id(x): x for x in tensors}.values())


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:SOME]) + (" ..." if len(names) > SOME else "")
