"""How a phase of a run divides the memory of its budget: the arithmetic behind the VRAM plan."""

from collections.abc import Callable, Sequence
from functools import partial

from . import vae_plan
from .geometry import HEAD_DIM, MLP_RATIO, FluxGeometry, T5Geometry
from .plan import DECODE, DENOISING, ENCODE, TEXT, Card, Job, Phase
from .prompts import T5_TOKENS
from .sizes import CHANNELS
from .weight_sizes import WeightSizes
from .work import CHUNKS, CONVERTED_AT_ONCE, GROUPS, Work

# Of the weights of a pass, that must stay for the others to travel while the card computes: the
# fastest card with the fewest lanes for each FLOP, an H200, copies all of them in two steps.
SHARE_UNNOTICED = 0.5
RING_BLOCKS = 3  # of the largest size: one computes, one waits, one is being copied


def plan_text(
    weights: WeightSizes,
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
    # The position bias, and the scores in float32 before and after the softmax: no fused attention
    # takes a bias everywhere.
    values = scores * (itemsize + 2 * 4) + words * (t5.width + 4 * t5.mlp_width) * itemsize
    phase = _phase(TEXT, weights, [(0, values)], budget, card)
    if budget is None or phase.peak + others_bytes <= budget:
        return phase
    return _phase(TEXT, weights, [(0, values)], budget, card, stay=False)


def plan_denoising(
    weights: WeightSizes,
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
    pictures, words = job.batch_size, job.words
    tokens = job.image_tokens + words
    width = geometry.hidden
    rows, columns = job.latent_size
    latents = pictures * CHANNELS * rows * columns
    modulation = 12 * geometry.double_blocks + 3 * geometry.single_blocks + 2  # of one step
    side_by_side = pictures * job.prompts
    fixed = (
        (side_by_side * tokens + job.prompts * (modulation + words)) * width * 4
        + job.prompts * tokens * HEAD_DIM * 2 * 4  # RoPE, which prompts of one length share
        + latents * 10 * 4
        + conversion_bytes
    )
    one_of_width = tokens * width * itemsize
    # Before the first step, in float32 too: the embedding of the text, or what a modulation layer
    # gives for all steps, made in pieces that are joined.
    given = [
        (words * (geometry.text_width + (job.prompts - 1) * width), words * width),
        (job.prompts * (words + job.steps) * width, job.steps * 6 * width),
    ]
    piece = min(CONVERTED_AT_ONCE, max(6 * width, geometry.text_width) * width)
    conditions = 4 * max(beside + result + max(piece, result) for beside, result in given)

    def values(chunk: int, groups: int = 1) -> int:
        work = Work(chunk, groups)
        all_at_once, *each_at_once = (
            next(work.chunks(some)).stop - some.start
            for some in (slice(0, tokens), slice(0, words), slice(words, tokens))
        )
        one_at_once = max(each_at_once)  # of picture and text
        share = work.heads(geometry.heads) / geometry.heads  # of the heads at once
        before_row, joint_row, single_row = _row_bytes(
            geometry, itemsize, eight_bit, weights, card, share
        )
        # Chunk 0 joins a single block's first products: its MLP then waits for the attention, which
        # copies queries, keys or values that do not lie one after the other.
        waiting = 0 if chunk or share < 1 else MLP_RATIO * one_of_width
        others = (side_by_side - 1) * one_of_width  # what they mix to, in a joint block
        qkv = int(3 * share * one_of_width) + (one_of_width if share < 1 else 0)
        step = fixed + max(
            others + qkv + int(share * one_of_width),  # queries, keys, values, what they mix to
            others + qkv + one_at_once * before_row,
            qkv + waiting + all_at_once * before_row,
            others + one_of_width + one_at_once * joint_row,
            (5 if waiting else 1) * one_of_width + all_at_once * single_row,
        )
        return max(step, conditions)

    chunks = [0, *(chunk for chunk in CHUNKS if chunk < tokens)]
    # Between two steps there is a preview, which is left out where it finds no room.
    choices = [(chunk, max(values(chunk), fixed + job.preview_bytes)) for chunk in chunks]
    grouped = []
    for groups in GROUPS:  # with the largest chunks that take no more than the smallest
        least = values(chunks[-1], groups)
        chunk = next(chunk for chunk in chunks if chunk and values(chunk, groups) <= least)
        grouped.append((chunk, least, groups))
    # Every chunk converts the weights again, or takes many small operations.
    repeating = conversion_bytes > 0 or not card.fused
    return _phase(DENOISING, weights, choices, budget, card, grouped=grouped, repeating=repeating)


def _row_bytes(
    geometry: FluxGeometry,
    itemsize: int,
    eight_bit: bool,
    weights: WeightSizes,
    card: Card,
    share: float,
) -> tuple[int, int, int]:
    """Bytes for each token that is computed at once: before the attention, after it in a joint
    block and in a single one. share: of the heads that attend at once."""
    width, hidden = geometry.hidden, MLP_RATIO * geometry.hidden
    joined = width + hidden  # the input of a single block's last layer
    if card.fused:  # straight into the format that the product takes
        row = 1 if eight_bit else itemsize
        before = row * width
        if share < 1:  # a product, on its way to where it belongs
            before += int(itemsize * share * width)
        return before, (itemsize + row) * hidden, itemsize * hidden + row * joined
    # Normed rows in float32 and as the product takes them, or float32 queries or keys as they are
    # turned.
    before = int(max(4 + itemsize, 20 * share) * width)
    more = itemsize * weights.rotated
    if eight_bit and weights.integers:
        # Float32 rows as they are rotated, or sums in int32 and in float32.
        before = int(max(11, 27 * share) * width)
        more = 8  # in float32 before they are rotated, and after
    elif eight_bit:
        before = int(max(8, 20 * share) * width)
        more = 5.3  # in float32, in float8, and what finds the scale
    # GELU is computed in place; only beside the attention it is copied.
    joint = int((itemsize + more) * hidden) + 2 * itemsize * width
    return before, joint, itemsize * hidden + int((itemsize + more) * joined)


def plan_decode(
    weights: WeightSizes, job: Job, itemsize: int, budget: int | None, card: Card
) -> Phase:
    """The VAE: its weights are there as one block, the picture in bands of rows."""
    rows, columns = job.latent_size
    latents = CHANNELS * rows * columns * 2 * itemsize
    plan = partial(vae_plan.plan_decode, rows, columns, itemsize)
    return _plan_vae(DECODE, plan, latents, weights, budget, card)


def plan_encode(
    weights: WeightSizes, job: Job, itemsize: int, budget: int | None, card: Card
) -> Phase:
    """As of `plan_decode`."""
    plan = partial(vae_plan.plan_encode, job.height, job.width, itemsize)
    return _plan_vae(ENCODE, plan, 0, weights, budget, card)


def _plan_vae(
    name: str,
    plan: Callable[[float], vae_plan.Bands],
    beside: int,
    weights: WeightSizes,
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
    weights: WeightSizes,
    choices: Sequence[tuple[int, int]],
    budget: int | None,
    card: Card,
    least: int | None = None,
    stay: bool = True,
    grouped: Sequence[tuple[int, int, int]] = (),
    repeating: bool = False,
) -> Phase:
    """choices: (tokens at once, bytes of values), from the roomiest to the tightest; least: bytes
    of values that would do; stay: whether weights may become resident; grouped: the same with
    groups of heads, from the fewest to the most; repeating: whether fewer tokens at once cost time
    themselves."""
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

    # Everything at once where so many weights stay beside it that the others travel unnoticed, or
    # where fewer tokens cost time, if the ring has its room; else the largest chunks that cost no
    # residency, because attention decides the peak anyway. Groups of heads only where it must be.
    blocks = min(RING_BLOCKS, len(weights.blocks))
    beside = weights.root.nbytes + blocks * largest
    beside += 0 if repeating else int(SHARE_UNNOTICED * passing)
    tokens, values = next(
        (tokens, values) for tokens, values in choices
        if values <= tightest or (stay and needed(values, beside) <= budget)
    )  # fmt: skip
    if grouped and needed(values) > budget:
        tokens, values, groups = next((c for c in grouped if needed(c[1]) <= budget), grouped[-1])
    overhead = card.overhead(values)
    left = budget - values - overhead
    if stay and weights.travelling_bytes <= left:
        return Phase(name, values, overhead, 0, weights.travelling_bytes, 0, 0, tokens, smallest)
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
    return max(phase.visiting / card.copy_rate, arithmetic)
