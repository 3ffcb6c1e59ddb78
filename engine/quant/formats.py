"""In which precision each kind of weight is stored: the one table."""

from dataclasses import dataclass, replace

from ..torch_state import torch

ROTATION = 256  # values that are rotated together; the widest that ComfyUI's int8 files use


@dataclass(frozen=True)
class Storage:
    """How a matrix is stored. `scaled`: one float32 per output channel beside it.

    `rotated`: groups of up to ROTATION input channels are multiplied by a Hadamard matrix first,
    which spreads an outlier over its group. 0 stands for none; a file may bring its own size.
    """

    dtype: str  # a name of torch's
    scaled: bool = False
    rotated: int = 0

    @property
    def torch_dtype(self) -> "torch.dtype":
        return getattr(torch, self.dtype)

    @property
    def vector_dtype(self) -> str:
        """Of the vectors beside the matrix, which cost nothing to keep when it is scaled."""
        return "bfloat16" if self.scaled else self.dtype

    @property
    def eight_bit(self) -> bool:
        return self.dtype in ("float8_e4m3fn", "int8")

    def __str__(self) -> str:
        if self.dtype == "int8":
            return "int8 rotated" if self.rotated else "int8"
        return self.dtype + " unscaled" * (self.eight_bit and not self.scaled)


def itemsize(dtype: str) -> int:
    """Bytes of a value of this dtype, one of those in which weights are stored."""
    return {"float32": 4, "bfloat16": 2}.get(dtype, 1)


def rotation_group(width: int, wanted: int) -> int:
    """The largest power of 4 up to `wanted` that divides `width`; 0 when that is 1."""
    group = 1
    while group * 4 <= wanted and width % (group * 4) == 0:
        group *= 4
    return group if group > 1 else 0


FLOAT32 = Storage("float32")
BFLOAT16 = Storage("bfloat16")
FLOAT8 = Storage("float8_e4m3fn", scaled=True)
FLOAT8_UNSCALED = Storage("float8_e4m3fn")
INT8_ROTATED = Storage("int8", scaled=True, rotated=ROTATION)


@dataclass(frozen=True)
class Precision:
    """The storage of each kind of weight of a Flux.1 transformer.

    mlp counts the joint matrices of the single blocks, four fifths of which are MLP. rest is what
    belongs to no block: the embedders and the final layer, 0.5 % of the parameters and half of
    the error of an 8-bit cast. Norms and biases follow the matrix that they stand beside.
    """

    attention: Storage
    mlp: Storage
    modulation: Storage
    rest: Storage

    def with_kinds(self, **kinds: Storage | None) -> "Precision":
        """The same with other storages for the kinds that are given one."""
        return replace(self, **{kind: s for kind, s in kinds.items() if s is not None})

    @property
    def eight_bit(self) -> bool:
        return any(s.eight_bit for s in (self.attention, self.mlp, self.modulation, self.rest))

    def __str__(self) -> str:
        if self.attention == self.mlp == self.modulation:
            return str(self.mlp)
        return f"{self.attention}, MLP {self.mlp}, modulation {self.modulation}"


def uniform(storage: Storage) -> Precision:
    return Precision(storage, storage, storage, storage)


# The modulation layers act on one token and turn the error of a weight into an error of every
# token: in float8 they alone would raise the error by a third (see benchmarks/README.md).
PRECISIONS = {
    "float8_e4m3fn": Precision(FLOAT8, FLOAT8, BFLOAT16, BFLOAT16),
    "int8 rotated": Precision(INT8_ROTATED, INT8_ROTATED, BFLOAT16, BFLOAT16),
    "bfloat16": uniform(BFLOAT16),
    "float8_e4m3fn unscaled": uniform(FLOAT8_UNSCALED),
}
STORAGES = {str(s): s for s in (FLOAT8, INT8_ROTATED, BFLOAT16, FLOAT8_UNSCALED)}
CONVERTED_AT_ONCE = 2**22  # values of a weight, for rows that are not in the dtype of the run
