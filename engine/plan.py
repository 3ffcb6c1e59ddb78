"""The VRAM plan: what a run keeps on the card, before anything is moved there.

A pure function of the modules' sizes, the picture, the budget and the card. Bytes are those of
PyTorch's allocator; the CUDA context (0.3 to 0.6 GB, for every program on the card) is not in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from . import vae_bands
from .flux_dit import HEAD_DIM, MLP_RATIO, FluxGeometry
from .latents import CHANNELS
from .prompts import T5_TOKENS
from .sizes import PIXELS_PER_LATENT, STEP
from .text_encoders import T5Geometry
from .work import CHUNKS, GROUPS, Work

if TYPE_CHECKING:
    from .offload import OffloadedModule

GB = 2**30
MB = 2**20
RING_BLOCKS = 3  # of the largest size: one computes, one waits, one is being copied


class BudgetError(ValueError):
    """A run that cannot work in the memory it may use."""

    __module__ = "majicflux"  # ComfyUI shows it, and would show the path of the pack


@dataclass(frozen=True)
class Card:
    """What the plan must know of a device.

    workspace_bytes: that libraries need besides the tensors. fused: whether rows
    are prepared by fused kernels, which need no memory in between. Rates, where they are known:
    copies from pinned memory in bytes/s, products in the weights' format and attention in FLOP/s.
    """

    workspace_bytes: int = 0
    fused: bool = False
    copy_rate: float | None = None
    product_rate: float | None = None
    attention_rate: float | None = None

    def overhead(self, values: int) -> int:
        """Bytes besides tensors of so many: for libraries, and lost between the tensors."""
        return self.workspace_bytes + values // 16 if self.workspace_bytes else 0


@dataclass(frozen=True)
class Job:
    """The picture: pixels, pictures at once, denoising steps, prompts that each step follows, and
    T5's tokens of each."""

    width: int
    height: int
    batch_size: int = 1
    steps: int = 20
    prompts: int = 1
    words: int = T5_TOKENS

    @property
    def image_tokens(self) -> int:
        return (self.width // STEP) * (self.height // STEP)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT


@dataclass(frozen=True)
class Phase:
    """One phase of a run, in bytes of the card.

    values: activations and buffers; overhead: of libraries; ring: for visiting weights, 0 where all
    stay; resident: weights that stay; visiting: weights that are copied at each pass; once: weights
    that are copied once; tokens: computed at once, 0 for all; smallest: what the phase needs;
    groups: of heads that attend one after another.
    """

    name: str
    values: int
    overhead: int
    ring: int
    resident: int
    visiting: int
    once: int
    tokens: int
    smallest: int
    groups: int = 1

    @property
    def peak(self) -> int:
        return self.values + self.overhead + self.ring + self.resident


@dataclass(frozen=True)
class Plan:
    """phases: text encoders, denoising, VAE decode; seconds: of a denoising step, if predicted."""

    job: Job
    budget_bytes: int | None
    phases: tuple[Phase, ...]
    seconds: float | None
    chosen: bool = True  # whether the budget was set by the user, not by what the device has left

    @property
    def peak_bytes(self) -> int:
        return max(phase.peak for phase in self.phases)

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget that works."""
        return max(phase.smallest for phase in self.phases)

    def require_budget(self) -> None:
        """Raises BudgetError when the run cannot work in its budget."""
        if self.budget_bytes is None or self.smallest_bytes <= self.budget_bytes:
            return
        worst = max(self.phases, key=lambda phase: phase.smallest)
        if not self.chosen:
            raise BudgetError(
                f"Only {self.budget_bytes / GB:.2f} GB of VRAM can be had, too little for "
                f"{self._picture}: the phase '{worst.name}' needs {in_gb_above(worst.smallest)} "
                f"GB. Close other programs that use the card, or choose {self._smaller}."
                + self._needs
            )
        raise BudgetError(
            f"{self.budget_bytes / GB:.2f} GB of VRAM are too little for {self._picture}: the "
            f"phase '{worst.name}' needs {worst.smallest / GB:.2f} GB. Set vram_budget_gb to "
            f"{in_gb_above(worst.smallest)} or more, or choose {self._smaller}." + self._needs
        )

    @property
    def _picture(self) -> str:
        job = self.job
        return f"{job.batch_size} x {job.width}x{job.height}"

    @property
    def _smaller(self) -> str:
        prompt = ", or a shorter prompt" if self.job.words > T5_TOKENS else ""
        return f"a smaller picture or batch{prompt}"

    @property
    def _needs(self) -> str:
        """Further lines of an error."""
        return "".join(f"\n{p.name}: {in_gb_above(p.smallest)} GB at least" for p in self.phases)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; sizes in bytes."""
        phases = [{**asdict(phase), "peak": phase.peak} for phase in self.phases]
        totals = {"peak_bytes": self.peak_bytes, "smallest_bytes": self.smallest_bytes}
        return {**asdict(self), "phases": phases, **totals}

    def __str__(self) -> str:
        """Short lines, for a node of the canvas."""
        budget = "" if self.budget_bytes is None else f", budget {_gb(self.budget_bytes)}"
        lines = [f"{self._picture}, {self.job.steps} steps{budget}"]
        for phase in self.phases:
            visits = ""
            if phase.visiting:
                visits = f"; {_gb(phase.visiting)} of weights visit at each pass"
            lines.append(f"{phase.name}: {_gb(phase.peak)}{visits}")
        lines.append(f"smallest budget that works: {in_gb_above(self.smallest_bytes)} GB")
        if self.seconds is not None:
            lines.append(f"predicted: {self.seconds:.2f} s a step")
        return "\n".join(lines)


def in_gb_above(size: float) -> str:
    """GB with one digit, never less than `size`."""
    return f"{-(-int(size) * 10 // GB) / 10:.1f}"


def _gb(size: float) -> str:
    return f"{size / GB:.2f} GB"


def plan_text(
    weights: "OffloadedModule",
    t5: T5Geometry,
    itemsize: int,
    budget: int | None,
    card: Card,
    others_bytes: int = 0,
    words: int = T5_TOKENS,
) -> Phase:
    """Both encoders; one prompt of so many T5 tokens.

    They visit unless there is room for `others_bytes` of the other components' weights too: they
    run once a prompt, and what made room for them would have to come back.
    """
    scores = t5.heads * words**2
    # The position bias, the scores, and both in float32 around the softmax: no fused attention
    # takes a bias everywhere.
    values = scores * (2 * itemsize + 2 * 4) + words * (t5.width + 4 * t5.mlp_width) * itemsize
    phase = _phase("text encoders", weights, [(0, values)], budget, card)
    if budget is None or phase.peak + others_bytes <= budget:
        return phase
    return _phase("text encoders", weights, [(0, values)], budget, card, stay=False)


def plan_denoising(
    weights: "OffloadedModule",
    geometry: FluxGeometry,
    job: Job,
    itemsize: int,
    eight_bit: bool,
    conversion_bytes: int,
    budget: int | None,
    card: Card,
) -> Phase:
    """itemsize: of the activations; eight_bit: whether rows are quantized; conversion_bytes: of
    the buffer in which weights are converted."""
    rotated = any(getattr(layer, "group", 0) for layer in weights.module.modules())
    integers = any(not weight.is_floating_point() for weight in weights.module.parameters())
    pictures, words = job.batch_size, job.words
    tokens = job.image_tokens + words
    width = geometry.hidden
    rows, columns = job.latent_size
    latents = pictures * CHANNELS * rows * columns
    modulation = 12 * geometry.double_blocks + 3 * geometry.single_blocks + 2
    fixed = (
        pictures * tokens * width * itemsize  # the residual
        + tokens * HEAD_DIM * 2 * 4  # RoPE
        + job.prompts * (job.steps * modulation + words) * width * itemsize
        + latents * (8 * 4 + 2 * itemsize)
        + conversion_bytes
    )
    one_of_width = tokens * width * itemsize

    def values(chunk: int, groups: int = 1) -> int:
        work = Work(chunk, groups)
        all_at_once, image_at_once = (
            next(work.chunks(some)).stop - some.start
            for some in (slice(0, tokens), slice(words, tokens))
        )
        share = work.heads(geometry.heads) / geometry.heads  # of the heads at once
        before_row, joint_row, single_row = _row_bytes(
            geometry, itemsize, eight_bit, rotated, integers, card, share
        )
        # Chunk 0 joins a single block's first products: its MLP then waits for the attention, which
        # copies queries, keys or values that do not lie one after the other.
        waiting = 0 if chunk or share < 1 else MLP_RATIO * one_of_width
        others = (pictures - 1) * one_of_width  # what the other pictures mix to, in a joint block
        qkv = int(3 * share * one_of_width) + (one_of_width if share < 1 else 0)
        return fixed + max(
            others + qkv + int(share * one_of_width),  # queries, keys, values, what they mix to
            others + qkv + image_at_once * before_row,
            qkv + waiting + all_at_once * before_row,
            others + one_of_width + image_at_once * joint_row,
            (5 if waiting else 1) * one_of_width + all_at_once * single_row,
        )

    chunks = [0, *(chunk for chunk in CHUNKS if chunk < tokens)]
    choices = [(chunk, values(chunk)) for chunk in chunks]
    grouped = []
    for groups in GROUPS:  # with the largest chunks that take no more than the smallest
        least = values(chunks[-1], groups)
        chunk = next(chunk for chunk in chunks if chunk and values(chunk, groups) <= least)
        grouped.append((chunk, least, groups))
    return _phase("denoising", weights, choices, budget, card, grouped=grouped)


def _row_bytes(
    geometry: FluxGeometry,
    itemsize: int,
    eight_bit: bool,
    rotated: bool,
    integers: bool,
    card: Card,
    share: float,
) -> tuple[int, int, int]:
    """Bytes for each token that is computed at once: before the attention, after it in a joint
    block and in a single one. integers: whether weights are; share: of the heads that attend at
    once."""
    width, hidden = geometry.hidden, MLP_RATIO * geometry.hidden
    joined = width + hidden  # the input of a single block's last layer
    if card.fused:  # straight into the format that the product takes
        row = 1 if eight_bit else itemsize
        before = row * width
        if share < 1:  # a product, on its way to where it belongs
            before += int(itemsize * share * width)
        return before, (itemsize + row) * hidden, itemsize * hidden + row * joined
    # Rows as they are rotated, or float32 queries or keys as they are turned.
    before = int(max(2 * itemsize, 20 * share) * width)
    more = itemsize * rotated
    if eight_bit and integers:  # float32 rows as they are rotated, or sums in int32 and in float32
        before = int(max(11, 27 * share) * width)
        more = 8  # in float32 before they are rotated, and after
    elif eight_bit:
        before = int(max(8, 20 * share) * width)
        more = 5.3  # in float32, in float8, and what finds the scale
    # GELU is computed in place; only beside the attention it is copied.
    joint = int((itemsize + more) * hidden) + 2 * itemsize * width
    return before, joint, itemsize * hidden + int((itemsize + more) * joined)


def plan_decode(
    weights: "OffloadedModule", job: Job, itemsize: int, budget: int | None, card: Card
) -> Phase:
    """The VAE: its weights are there as one block, the picture in bands of rows."""
    rows, columns = job.latent_size
    latents = CHANNELS * rows * columns * 2 * itemsize
    plan = partial(vae_bands.plan_decode, rows, columns, itemsize)
    return _plan_vae("VAE decode", plan, latents, weights, budget, card)


def plan_encode(
    weights: "OffloadedModule", job: Job, itemsize: int, budget: int | None, card: Card
) -> Phase:
    """As of `plan_decode`."""
    plan = partial(vae_bands.plan_encode, job.height, job.width, itemsize)
    return _plan_vae("VAE encode", plan, 0, weights, budget, card)


def _plan_vae(
    name: str,
    plan: Callable[[float], vae_bands.Bands],
    beside: int,
    weights: "OffloadedModule",
    budget: int | None,
    card: Card,
) -> Phase:
    """plan: bands within a limit; beside: bytes of values besides."""
    limit = float("inf")
    if budget is not None:
        left = budget - weights.root.nbytes - weights.largest_bytes - card.workspace_bytes
        limit = left - beside - card.overhead(max(0, left)) + card.workspace_bytes
    choices = [(0, plan(limit).peak_bytes + beside)]
    return _phase(name, weights, choices, budget, card, least=plan(0).peak_bytes + beside)


def _phase(
    name: str,
    weights: "OffloadedModule",
    choices: Sequence[tuple[int, int]],
    budget: int | None,
    card: Card,
    least: int | None = None,
    stay: bool = True,
    grouped: Sequence[tuple[int, int, int]] = (),
) -> Phase:
    """choices: (tokens at once, bytes of values), from the roomiest to the tightest; least: bytes
    of values that would do; stay: whether weights may become resident; grouped: the same with
    groups of heads, from the fewest to the most."""
    once = sum(block.nbytes for block in weights.once)
    passing = sum(block.nbytes for block in weights.blocks)
    largest = weights.largest_bytes
    tightest = min(values for _, values in choices)
    least = min([tightest, *(values for _, values, _ in grouped)]) if least is None else least

    def needed(values: int, kept: int = weights.root.nbytes + largest) -> int:
        return kept + values + card.overhead(values)

    smallest, groups = needed(least), 1
    if budget is None:
        tokens, values = choices[0]
        overhead, resident = card.overhead(values), weights.travelling_bytes
        return Phase(name, values, overhead, 0, resident, 0, 0, tokens, smallest)

    # Everything at once where all weights stay beside it; else the largest chunks that cost no
    # residency, because attention decides the peak anyway. Groups of heads only where it must be.
    tokens, values = next(
        (tokens, values) for tokens, values in choices
        if values <= tightest or (stay and needed(values, weights.travelling_bytes) <= budget)
    )  # fmt: skip
    if grouped and needed(values) > budget:
        tokens, values, groups = next((c for c in grouped if needed(c[1]) <= budget), grouped[-1])
    overhead = card.overhead(values)
    left = budget - values - overhead
    if stay and weights.travelling_bytes <= left:
        return Phase(name, values, overhead, 0, weights.travelling_bytes, 0, 0, tokens, smallest)
    blocks = min(RING_BLOCKS, len(weights.blocks))
    ring = max(largest, min(blocks * largest, left - weights.root.nbytes))
    staying = weights.fitting(left - ring if stay else weights.root.nbytes)
    resident = sum(block.footprint for block in staying)
    kept = set(staying)
    return Phase(
        name,
        values,
        overhead,
        ring,
        max(resident, weights.root.nbytes),
        passing - sum(block.nbytes for block in weights.blocks if block in kept),
        once - sum(block.nbytes for block in weights.once if block in kept),
        tokens,
        smallest,
        groups,
    )


def step_seconds(phase: Phase, geometry: FluxGeometry, job: Job, card: Card) -> float | None:
    """Predicted seconds of a denoising step: the longer of its copies and its arithmetic."""
    if card.copy_rate is None or card.product_rate is None or card.attention_rate is None:
        return None
    tokens, width = job.image_tokens + job.words, geometry.hidden
    blocks = geometry.double_blocks + geometry.single_blocks
    passes = job.batch_size * job.prompts
    products = 2 * 12 * width**2 * blocks * tokens * passes
    attention = 4 * width * tokens**2 * blocks * passes
    arithmetic = products / card.product_rate + attention / card.attention_rate
    return max(job.prompts * phase.visiting / card.copy_rate, arithmetic)
