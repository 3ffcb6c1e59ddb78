"""What the tensors of one layer in a LoRA do to it, told from their names and shapes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..engine.flux.geometry import FIRST_LAYER
from ..engine.sizes import OF_LATENTS
from .lora_models import FLUX_LORA, model_of_size
from .lora_names import Target
from .recognise import not_wanted
from .safetensors_file import DTYPES, ModelFileError
from .tensor_sources import Part, misfit, missing, require_readable, without_ones

CONTROL_INPUTS = 2 * OF_LATENTS  # of the first layer: those of the noisy picture and of another

LORA_, LOHA, LOKR = "LoRA", "LoHa", "LoKr"
# The matrices of each method, as the products of two; LoKr may have either of its own as a whole.
FACTORS = {
    LORA_: (("up", "down"),),
    LOHA: (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
    LOKR: (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b")),
}
WHOLE = {"lokr_w1_a": "lokr_w1", "lokr_w2_a": "lokr_w2"}
DIFF, SET, NORM, BIAS = "diff", "set", "norm", "bias"


@dataclass(frozen=True)
class Change:
    """What some tensors of a file do to a layer.

    method: one of FACTORS, or DIFF, SET, NORM or BIAS. tensors: by their role. rank: of the change
    as low-rank factors, 0 when it has none; divisor: the rank that alpha is divided by, 0 where
    alpha has no effect. layer: its name in the file. inputs: of the product of factors.
    """

    target: Target
    method: str
    tensors: Mapping[str, Part]
    layer: str
    rank: int = 0
    divisor: int = 0
    alpha: Part | None = None
    magnitude: Part | None = None
    inputs: int = 0

    @property
    def takes_picture(self) -> bool:
        """Whether the first layer sees a picture beside the noise then, as by a control LoRA."""
        of_first = self.target.layer == FIRST_LAYER
        return of_first and self.inputs == CONTROL_INPUTS > self.target.inputs

    @property
    def lacks_inputs(self) -> bool:
        """Whether it is for a model that takes no picture, unlike this one."""
        return self.target.layer == FIRST_LAYER and 0 < self.inputs < self.target.inputs

    @property
    def scales_rows(self) -> bool:
        """Whether its magnitude, if it has one, is of the rows of the weight."""
        return self.magnitude is not None and self.magnitude.rows == self.target.columns


class Layer:
    """Tensors that belong to one layer in a file, by their role, read as changes of `target`.

    name: the layer's in the file. fits: whether the model is known, so that sizes are compared.
    """

    def __init__(self, target: Target, parts: Mapping[str, Part], name: str, fits: bool):
        self.target, self.parts, self.name, self.fits = target, parts, name, fits
        self.path = next(iter(parts.values())).file.path

    def changes(self) -> Iterator[Change]:
        """Raises ModelFileError when the tensors do not fit each other or the model."""
        target, parts, layer = self.target, self.parts, self.name
        width = (target.columns,)
        if target.inputs == 0:
            for role, method in (("norm", NORM), ("set", NORM), ("diff", DIFF)):
                if role in parts:
                    self._require(parts[role], width)
                    yield Change(target, method, {method: parts[role]}, layer)
            return
        for method, pairs in FACTORS.items():
            if any(role in parts for pair in pairs for role in (*pair, WHOLE.get(pair[0]))):
                yield self._factors(method)
        for role, method in (("diff", DIFF), ("set", SET)):
            if role in parts:
                self._require(parts[role], (target.columns, target.inputs))
                yield Change(target, method, {role: parts[role]}, layer)
        for role in () if target.of_text else ("up_bias", "bias"):
            if role in parts:
                self._require(parts[role], width)
                scaled = role == "up_bias" and "down" in parts
                divisor = parts["down"].rows if scaled else 0
                alpha = parts.get("alpha") if scaled else None
                yield Change(target, BIAS, {BIAS: parts[role]}, layer, 0, divisor, alpha)

    def _factors(self, method: str) -> Change:
        """A change by matrices that are multiplied; their shapes have been compared then."""
        target, parts = self.target, self.parts
        tensors: dict[str, Part] = {}
        sizes: list[tuple[int, int]] = []
        rank, divisors = 1, []
        for pair in FACTORS[method]:
            whole = WHOLE.get(pair[0])
            if whole is not None and whole in parts:
                tensors[whole] = parts[whole]
                sizes.append(self._size(parts[whole]))
                rank *= min(sizes[-1])
                continue
            for role in pair:
                if role not in parts:
                    raise missing(self.path, f"{self.name}.{role}")
            left, right = (parts[role] for role in pair)
            (rows, inner), (next_inner, columns) = self._size(left), self._size(right)
            if inner != next_inner:
                raise self._misfit(left, [rows, next_inner])
            tensors |= zip(pair, (left, right), strict=True)
            sizes.append((rows, columns))
            rank *= inner
            divisors.append(inner)
        rows, columns = sizes[0]
        if method == LOKR:
            rows, columns = rows * sizes[1][0], columns * sizes[1][1]
        elif sizes[-1] != sizes[0]:
            raise self._misfit(tensors["hada_w2_a"], [rows, divisors[1]])
        alpha, magnitude = parts.get("alpha"), parts.get("magnitude")
        self._require_size(rows, columns, decomposed=magnitude is not None)
        if alpha is not None and not _is_number(alpha):
            raise self._misfit(alpha, [])
        if magnitude is not None and self._shape(magnitude, 1) != (1, target.inputs):
            self._require(magnitude, (target.columns,))
        # ComfyUI's and LyCORIS' choice: of LoKr the second matrix, of LoHa the first.
        divisor = (divisors[-1] if method == LOKR else divisors[0]) if divisors else 0
        return Change(target, method, tensors, self.name, rank, divisor, alpha, magnitude, columns)

    def _size(self, part: Part) -> tuple[int, int]:
        shape = self._shape(part, 2)
        if len(shape) != 2:
            raise self._misfit(part, "[n, m]")
        if 0 in shape:
            raise ModelFileError(
                "{file} is damaged: {name} has rank 0. Download it again, or choose another file.",
                file=self.path.name,
                name=part.name,
            )
        return shape[0], shape[1]

    def _shape(self, part: Part, axes: int) -> tuple[int, ...]:
        require_readable(self.path, part.name, part)
        return without_ones(part.file.tensors[part.name].shape, axes)

    def _require(self, part: Part, wanted: tuple[int, ...]) -> None:
        if self.fits and self._shape(part, len(wanted)) != wanted:
            raise self._other_size(part.name, part.file.tensors[part.name].shape, wanted)

    def _misfit(self, part: Part, wanted: object) -> ModelFileError:
        return misfit(self.path, part.name, part.file.tensors[part.name].shape, wanted)

    def _other_size(self, name: str, shape: Sequence[int], wanted: Sequence[int]) -> ModelFileError:
        return ModelFileError(
            "{file} does not fit this model: what it adds to {name} has the shape {shape}, "
            "where the model has {expected}. Choose another file.",
            file=self.path.name,
            name=name,
            shape=list(shape),
            expected=list(wanted),
        )

    def _require_size(self, rows: int, columns: int, decomposed: bool) -> None:
        """Of the product of factors. decomposed: by DoRA, which cannot bring the first layer a
        picture that the model does not take."""
        target = self.target
        if self.fits and (rows, columns) == (target.columns, target.inputs):
            return
        kind = model_of_size(target.layer, rows, columns)
        if kind is not None:
            raise not_wanted(self.path, (), kind, FLUX_LORA)
        sizes = columns, target.inputs
        with_picture = sizes == (CONTROL_INPUTS, OF_LATENTS) and not decomposed
        other_inputs = target.layer == FIRST_LAYER and (with_picture or columns == OF_LATENTS)
        if not self.fits or (rows == target.columns and other_inputs):
            return
        raise self._other_size(self.name, (rows, columns), (target.columns, target.inputs))


def _is_number(part: Part) -> bool:
    entry = part.file.tensors[part.name]
    return math.prod(entry.shape) == 1 and entry.dtype in DTYPES
