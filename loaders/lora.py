"""A LoRA as the engine applies it: low-rank terms beside the weights, whoever wrote the file.

What terms cannot express is baked into the weights, by `bake`.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.flux.geometry import ClipGeometry, FluxGeometry
from ..engine.quant.low_rank import Adapter, AdapterReport, LowRankTerm
from ..engine.torch_state import own_state, torch
from ..messages import later, log, say
from .convert import LARGEST, Progress, convert_into, damaged, read_small
from .lora_changes import BIAS, DIFF, NORM, SET, Change
from .lora_factors import factors
from .lora_file import LoraFile, inspect_lora
from .recognise import is_lora
from .safetensors_file import ModelFileError, SafetensorsFile
from .tensor_sources import Part, Source

if TYPE_CHECKING:
    from torch import Tensor


MOST_RANK = 256  # that any output column of a layer may have in all, to be multiplied beside it

# Why low-rank terms cannot express a change.
FULL_RANK = later("of full rank")
LARGE_RANK = later("a rank above 256")
OTHER_AXIS = later("DoRA on the input axis")
OF_TEXT = later("DoRA of CLIP-L")


@own_state()
def load_lora(
    path: Path,
    flux: FluxGeometry,
    clip: ClipGeometry | None = None,
    dtype: "torch.dtype | None" = None,
    progress: Progress | None = None,
    only_text: bool = False,
) -> Adapter:
    """Read a LoRA for a transformer of this geometry.

    clip: of the text encoder, by default CLIP-L's. dtype: of the factors, by default bfloat16.
    only_text: leave out the part for the transformer.
    Raises ModelFileError as `inspect_lora`, and when the file holds an infinity or a NaN.
    """
    lora = inspect_lora(path, flux, clip or ClipGeometry())
    dtype = dtype or torch.bfloat16
    kept, _ = _sorted(lora)
    kept = {n: c for n, c in kept.items() if c[0].target.of_text or not only_text}
    values = read_tensors(chain(*kept.values()), dtype, progress)
    terms: dict[str, tuple[LowRankTerm, ...]] = {}
    of_text: dict[str, tuple[LowRankTerm, ...]] = {}
    for layer, changes in kept.items():
        found = _joined([*_terms(lora, changes, values, dtype)])
        if found:
            (of_text if changes[0].target.of_text else terms)[layer] = found
    report = _report(lora)
    log.info(report)
    return Adapter(terms, *_vectors(lora, chain(*kept.values()), values), report, of_text)


def describe_lora(path: Path) -> AdapterReport | None:
    """What a LoRA holds, from its header; None when the file seems to be something else.

    Raises ModelFileError when it is for another model, or damaged.
    """
    if path.is_dir() or not is_lora(SafetensorsFile(path).tensors):
        return None
    return _report(inspect_lora(path))


def inspect_usable_lora(
    path: Path, flux: FluxGeometry | None = None, clip: ClipGeometry | None = None
) -> AdapterReport:
    """What a LoRA holds, from its header.

    Raises ModelFileError as `inspect_lora`, and when there is nothing in it that can be used.
    """
    report = _report(inspect_lora(path, flux, clip))
    if report.layers + report.text_layers == 0:
        raise ModelFileError(
            "{file} changes CLIP-L alone, in a way that MajicFlux cannot use ({reasons}). "
            "Choose another file.",
            file=path.name,
            reasons=", ".join(map(say, report.unused)),
        )
    return report


def _report(lora: LoraFile) -> AdapterReport:
    kept, others = _sorted(lora)
    unused = {reason: [*names] for reason, names in lora.unused.items()}
    baking: dict[str, list[str]] = defaultdict(list)
    for layer, (reason, changes) in others.items():
        if changes[0].target.of_text:
            names = [part.name for change in changes for part in change.tensors.values()]
            unused.setdefault(reason, []).extend(names)
        else:
            baking[reason].append(layer)
    of_text = sum(changes[0].target.of_text for changes in kept.values())
    return AdapterReport(
        lora.path.name,
        lora.dialect,
        lora.methods,
        lora.ranks,
        len(kept) - of_text + sum(map(len, baking.values())),
        of_text,
        {reason: tuple(names) for reason, names in unused.items()},
        {reason: tuple(layers) for reason, layers in baking.items()},
        any(change.takes_picture for change in lora.changes),
    )


def _sorted(lora: LoraFile) -> tuple[dict[str, list[Change]], dict[str, tuple[str, list[Change]]]]:
    """Changes by the layer, of those that terms can express; and of the others with the reason."""
    layers: dict[str, list[Change]] = defaultdict(list)
    for change in lora.changes:
        layers[change.target.layer].append(change)
    kept, others = dict[str, list[Change]](), dict[str, tuple[str, list[Change]]]()
    for layer, changes in layers.items():
        reason = _why_baked(changes)
        if reason is None:
            kept[layer] = changes
        else:
            others[layer] = reason, changes
    return kept, others


def _why_baked(changes: Sequence[Change]) -> str | None:
    """Why the changes of a layer cannot be low-rank terms beside its weight; None when they can."""
    for change in changes:
        whole = any(role in change.tensors for role in ("lokr_w1", "lokr_w2"))
        if change.method in (DIFF, SET) or (whole and change.rank > MOST_RANK):
            return FULL_RANK
        if change.magnitude is not None and not change.scales_rows:
            return OTHER_AXIS
        if change.magnitude is not None and change.target.of_text:
            return OF_TEXT
    return LARGE_RANK if _most_rank(changes) > MOST_RANK else None


def scale_of(lora: LoraFile, change: Change) -> float:
    """What the product of the factors is multiplied by."""
    if change.divisor == 0:
        return 1.0
    if change.alpha is None:
        return _declared_scale(lora.declared, change)
    alpha = read_small(change.alpha.file, change.alpha.name).double().item()
    if not abs(alpha) <= LARGEST:
        raise damaged(change.alpha, change.alpha.name)
    return alpha / change.divisor


def _declared_scale(declared: Mapping[str, Any], change: Change) -> float:
    """The scale that PEFT's own description gives a layer; 1 where there is none."""
    prefix = "text_encoder." if change.target.of_text else "transformer."
    said = {**declared, **{k.removeprefix(prefix): v for k, v in declared.items()}}
    alpha, pattern = said.get("lora_alpha"), said.get("alpha_pattern")
    if isinstance(pattern, dict):
        parts = change.layer.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        alpha = next((pattern[end] for end in ends if end in pattern), alpha)
    if not isinstance(alpha, (int, float)) or not abs(alpha) <= LARGEST:
        return 1.0
    return alpha / (math.sqrt(change.divisor) if said.get("use_rslora") else change.divisor)


def _most_rank(changes: Sequence[Change]) -> int:
    """The largest sum of ranks that an output column has."""

    def at(column: int) -> int:
        targets = ((change.target, change.rank) for change in changes)
        return sum(rank for t, rank in targets if t.first <= column < t.first + t.columns)

    return max(at(change.target.first) for change in changes)


def read_tensors(
    changes: Iterable[Change], dtype: "torch.dtype | None", progress: Progress | None
) -> dict[str, "Tensor"]:
    """The tensors of the changes by their names: plain factors in `dtype`, all else in float32.

    Without a dtype, float16 and bfloat16 stay what they are.
    """
    holder, parts = torch.nn.Module(), list[Part]()
    for change in changes:
        for role, part in [*change.tensors.items(), ("", change.magnitude)]:
            if part is None:
                continue
            kept = dtype if role in ("up", "down") else torch.float32
            if dtype is None:
                kept = {"F16": torch.float16, "BF16": torch.bfloat16}.get(part.dtype, torch.float32)
            empty = torch.empty(part.file.tensors[part.name].shape, dtype=kept)
            parameter = torch.nn.Parameter(empty, requires_grad=False)
            holder.register_parameter(str(len(parts)), parameter)
            parts.append(part)
    convert_into(holder, {str(i): Source((part,)) for i, part in enumerate(parts)}, progress)
    return {part.name: holder.get_parameter(str(i)).data for i, part in enumerate(parts)}


def _terms(
    lora: LoraFile, changes: Iterable[Change], values: Mapping[str, "Tensor"], dtype: "torch.dtype"
) -> Iterator[LowRankTerm]:
    for change in changes:
        if change.rank == 0:
            continue
        matrices = {role: values[part.name].flatten(1) for role, part in change.tensors.items()}
        up, down = factors(change.method, matrices)
        up = _in_our_order(change, up)
        scale = scale_of(lora, change)
        yield LowRankTerm(
            down.to(dtype).contiguous(), up.to(dtype).contiguous(), scale, change.target.first
        )


def _joined(terms: Sequence[LowRankTerm]) -> tuple[LowRankTerm, ...]:
    """The terms of a layer, by their first columns; those that continue each other as one.

    So are query, key and value that were split when a file was converted: all have one down.
    """
    joined: list[LowRankTerm] = []
    for term in terms:
        down = next((t.down for t in joined if torch.equal(t.down, term.down)), term.down)
        last = joined[-1] if joined else None
        if (
            last is not None
            and (last.first + len(last.up), last.scale) == (term.first, term.scale)
            and last.down is down
        ):
            joined[-1] = replace(last, up=torch.cat([last.up, term.up]))
        else:
            joined.append(replace(term, down=down))
    return tuple(joined)


def _vectors(
    lora: LoraFile, changes: Iterable[Change], values: Mapping[str, "Tensor"]
) -> "tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]":
    """Biases, norms and magnitudes, as an `Adapter` has them."""
    biases: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    magnitudes: dict[str, Tensor] = {}
    for change in changes:
        target = change.target
        new = partial(torch.full, (target.outputs,), dtype=torch.float32)
        rows = slice(target.first, target.first + target.columns)
        if change.method == NORM:
            norms[target.layer] = values[change.tensors[NORM].name].flatten()
        elif change.method == BIAS:
            added = _vector(change, change.tensors[BIAS], values) * scale_of(lora, change)
            biases.setdefault(target.layer, new(fill_value=0.0))[rows] += added
        if change.magnitude is not None:
            magnitude = magnitudes.setdefault(target.layer, new(fill_value=math.nan))
            magnitude[rows] = _vector(change, change.magnitude, values)
    return biases, norms, magnitudes


def _vector(change: Change, part: Part, values: Mapping[str, "Tensor"]) -> "Tensor":
    return _in_our_order(change, values[part.name].flatten())


def _in_our_order(change: Change, rows: "Tensor") -> "Tensor":
    return rows.roll(len(rows) // 2, 0) if change.target.swapped else rows
