"""The plan of the denoising loop, and the time of a step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..flux.geometry import HEAD_DIM, MLP_RATIO, ControlGeometry, FluxGeometry
from ..flux.reuse import AT_ONCE, COMPARED
from ..offload.chunking import CHUNKS, GROUPS, Chunking, split
from ..offload.weight_sizes import WeightSizes
from ..quant.attention import PYTORCH, Attention
from ..quant.formats import CONVERTED_AT_ONCE
from ..sizes import CHANNELS, OF_LATENTS
from .device import DeviceProfile
from .plan import DENOISE, StagePlan, Workload
from .split import split_budget


@dataclass(frozen=True)
class AdapterSizes:
    """Bytes of what adapters keep beside the weights before the first step, and in every step;
    ranks: of the layer with the most, in every step."""

    once: int
    always: int
    ranks: int


NO_ADAPTERS = AdapterSizes(0, 0, 0)


def plan_denoising(
    weights: WeightSizes,
    geometry: FluxGeometry,
    workload: Workload,
    itemsize: int,
    eight_bit: bool,
    conversion_bytes: int,
    budget: int | None,
    profile: DeviceProfile,
    adapters: AdapterSizes = NO_ADAPTERS,
    controls: Sequence[ControlGeometry] = (),
    attention: Attention = PYTORCH,
    reuse: bool = False,
) -> StagePlan:
    """weights: of the transformer and its control nets; itemsize: of the activations; eight_bit:
    whether rows are quantized; conversion_bytes: of the buffer in which weights are converted;
    controls: the net of each picture that one is shown; reuse: whether steps may be reused: what
    they take is on the card, or on the host where the budget is too small for that."""
    workload = _with_mode_token(workload, controls)
    pictures, text_tokens = workload.batch_size, workload.text_tokens
    tokens, width = workload.tokens, geometry.hidden
    rows, columns = workload.latent_size
    latents = pictures * CHANNELS * rows * columns
    modulation = _modulation(geometry) + 2  # of one step
    side_by_side = pictures * workload.prompts
    beside = geometry.in_channels - OF_LATENTS  # of a picture and a mask
    given_pictures = workload.image_tokens * beside + workload.reference_tokens * OF_LATENTS
    fixed = (
        (side_by_side * tokens + workload.prompts * (modulation + text_tokens)) * width * 4
        + workload.prompts * tokens * HEAD_DIM * 2 * 4  # RoPE, which prompts of one length share
        + latents * 10 * 4
        + side_by_side * given_pictures * 4
        + conversion_bytes
        + adapters.always
        + sum(_control_bytes(net, workload, itemsize) for net in controls)
    )
    one_of_width = tokens * width * itemsize
    # Before the first step, in float32 too: the embedding of the text, or what a modulation layer
    # gives for all steps, made in pieces that are joined.
    given = [
        (text_tokens * (geometry.text_width + (workload.prompts - 1) * width), text_tokens * width),
        (workload.prompts * (text_tokens + workload.steps) * width, workload.steps * 6 * width),
    ]
    piece = min(CONVERTED_AT_ONCE, max(6 * width, geometry.text_width) * width)
    conditions = 4 * max(beside + result + max(piece, result) for beside, result in given)
    conditions += adapters.once + 4 * len(controls) * workload.prompts * text_tokens * width
    attended = one_of_width
    if attention.in_int8(tokens):
        attended += _rounded_bytes(geometry, tokens, itemsize)
    low = adapters.ranks * itemsize  # of a token, between the two matrices of a term

    def values(chunk: int, groups: int = 1) -> int:
        all_at_once, *each_at_once = (
            next(split(some, chunk)).stop - some.start
            for some in (slice(0, tokens), slice(0, text_tokens), slice(text_tokens, tokens))
        )
        one_at_once = max(each_at_once)  # of picture and text
        share = (
            Chunking(chunk, groups).heads_at_once(geometry.heads) / geometry.heads
        )  # of the heads at once
        before_row, joint_row, single_row = (
            low + row for row in _row_bytes(geometry, itemsize, eight_bit, weights, profile, share)
        )
        # Chunk 0 joins a single block's first products: its MLP then waits for the attention, which
        # copies queries, keys or values that do not lie one after the other.
        waiting = 0 if chunk or share < 1 else MLP_RATIO * one_of_width
        others = (side_by_side - 1) * one_of_width  # what they mix to, in a joint block
        qkv = int(3 * share * one_of_width) + (one_of_width if share < 1 else 0)
        step = fixed + max(
            others + qkv + int(share * attended),  # queries, keys, values, what they mix to
            others + qkv + one_at_once * before_row,
            qkv + waiting + all_at_once * before_row,
            others + one_of_width + one_at_once * joint_row,
            (5 if waiting else 1) * one_of_width + all_at_once * single_row,
        )
        return max(step, conditions)

    smaller = [chunk for chunk in CHUNKS if chunk < tokens]
    chunks = [0, *smaller]
    # Between two steps there is a preview, which is left out where it finds no room.
    choices = [(chunk, max(values(chunk), fixed + workload.preview_bytes)) for chunk in chunks]
    grouped = []
    for groups in GROUPS:  # with the largest chunks that take no more than the smallest
        least = values(chunks[-1], groups)
        chunk = next(chunk for chunk in smaller or chunks if values(chunk, groups) <= least)
        grouped.append((chunk, least, groups))
    # Every chunk converts the weights again, or takes many small operations.
    repeating = conversion_bytes > 0 or not profile.fused

    def planned(kept: int) -> StagePlan:
        """With so many bytes more for what reused steps take."""
        return split_budget(
            DENOISE, weights, [(chunk, values + kept) for chunk, values in choices], budget,
            profile, grouped=[(chunk, values + kept, groups) for chunk, values, groups in grouped],
            repeating=repeating,
        )  # fmt: skip

    on_card, on_host = _kept_bytes(workload, width) if reuse else (0, 0)
    plan = planned(on_card)
    if reuse and budget is not None and plan.smallest > budget:
        return replace(planned(on_host), kept_on_host=True)
    return plan


def _kept_bytes(workload: Workload, width: int) -> tuple[int, int]:
    """Of the card, for steps that may be reused: with what the blocks added in two passes kept
    there, or with a stretch of it on its way from the host. And what the first block added in two
    passes, and how far they are apart."""
    pictures, image = workload.batch_size, workload.image_tokens
    added = 2 * pictures * workload.prompts * image
    travelling = pictures * min(image, AT_ONCE)
    compared = 3 * pictures * -(-image // COMPARED)
    return (added + compared) * width * 4, (travelling + compared) * width * 4


def _modulation(geometry: FluxGeometry) -> int:
    """Widths of what the modulation layers of the blocks give for one step."""
    return 12 * geometry.double_blocks + 3 * geometry.single_blocks


def _with_mode_token(workload: Workload, controls: Sequence[ControlGeometry]) -> Workload:
    """With the token before the text by which a control net is told the mode."""
    return replace(workload, text_tokens=workload.text_tokens + any(c.modes for c in controls))


def _control_bytes(net: ControlGeometry, workload: Workload, itemsize: int) -> int:
    """Of a control net that runs beside the transformer: its residual, text, modulation, RoPE,
    hint, and what it told last."""
    image, text, width = workload.image_tokens, workload.text_tokens, net.hidden
    side_by_side = workload.batch_size * workload.prompts
    values = (
        side_by_side * (image + text) * width
        + workload.prompts * (_modulation(net) + text) * width
        + workload.prompts * (image + text) * HEAD_DIM * 2
        + workload.batch_size * image * net.hint_channels
    )
    return values * 4 + side_by_side * image * width * itemsize


def _row_bytes(
    geometry: FluxGeometry,
    itemsize: int,
    eight_bit: bool,
    weights: WeightSizes,
    profile: DeviceProfile,
    share: float,
) -> tuple[int, int, int]:
    """Bytes for each token that is computed at once: before the attention, after it in a joint
    block and in a single one. share: of the heads that attend at once."""
    width, hidden = geometry.hidden, MLP_RATIO * geometry.hidden
    joined = width + hidden  # the input of a single block's last layer
    if profile.fused:  # straight into the format that the product takes
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


def _rounded_bytes(geometry: FluxGeometry, tokens: int, itemsize: int) -> int:
    """Of queries, keys and values of all heads in int8, with their scales, and of a result in
    bfloat16 where one in float32 is made of it, as comfy-kitchen allocates them."""
    padded = -(-tokens // 128) * 128
    scales = padded // 128 * (32 + 8) * 4 + HEAD_DIM * 4 + 4
    half = tokens * HEAD_DIM * 2 if itemsize > 2 else 0
    return geometry.heads * ((2 * tokens + padded) * HEAD_DIM + scales + half)


def step_seconds(
    phase: StagePlan,
    geometry: FluxGeometry,
    workload: Workload,
    profile: DeviceProfile,
    controls: Sequence[ControlGeometry] = (),
) -> float | None:
    """Predicted seconds of a denoising step: the longer of its copies and its arithmetic."""
    if profile.copy_rate is None or profile.product_rate is None or profile.attention_rate is None:
        return None
    tokens, width = workload.tokens, geometry.hidden
    blocks = sum(each.blocks for each in (geometry, *controls))
    passes = workload.batch_size * workload.prompts
    products = 2 * 12 * width**2 * blocks * tokens * passes
    attention = 4 * width * tokens**2 * blocks * passes
    arithmetic = products / profile.product_rate + attention / profile.attention_rate
    return max(phase.visiting / profile.copy_rate, arithmetic)
