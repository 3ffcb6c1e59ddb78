"""The VRAM plan against what is really allocated, at the sizes of FLUX.1-dev."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flux_plans import (
    CARDS,
    COMPUTED,
    FULL,
    INT8_ATTENTION,
    ONE_OF_EACH,
    SIZES,
    autoencoder,
    computing_of,
    control_net,
    encoders,
    plan_of,
    transformer,
)
from live_bytes import LiveBytes
from torch import Tensor

from majicflux.engine import kernels
from majicflux.engine.flux import blocks, conditioning, vae_bands, velocity
from majicflux.engine.flux.conditioning import conditions_of
from majicflux.engine.flux.controlnet import Control, ControlNet
from majicflux.engine.flux.geometry import ControlGeometry, T5Geometry, kind_of_layer
from majicflux.engine.flux.lockstep import ControlTokens, Lockstep
from majicflux.engine.flux.picture_conditions import PictureConditions, picture_tokens
from majicflux.engine.flux.prompts import CLIP_TOKENS, T5_TOKENS
from majicflux.engine.flux.reuse import Reuse
from majicflux.engine.flux.step_cache import Course, StepCache
from majicflux.engine.flux.text_encoders import TextEmbedding
from majicflux.engine.flux.velocity import Blocks, all_blocks, flux_velocity
from majicflux.engine.kernels import dispatch, matmul
from majicflux.engine.offload.chunking import GROUPS, Chunking
from majicflux.engine.offload.chunking import split as split_tokens
from majicflux.engine.offload.prefetch import PrefetchRing
from majicflux.engine.plan import denoising
from majicflux.engine.plan.denoising import NO_ADAPTERS, AdapterSizes
from majicflux.engine.plan.device import DeviceProfile
from majicflux.engine.plan.plan import StagePlan, Workload
from majicflux.engine.plan.text import plan_text
from majicflux.engine.plan.units import GB, MB
from majicflux.engine.plan.vae import plan_decode
from majicflux.engine.quant import adapters
from majicflux.engine.quant.adapters import adapted, bound_bytes
from majicflux.engine.quant.attention import Attention
from majicflux.engine.quant.compute import ComputePrecision
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.engine.quant.linear import StoredLinear
from majicflux.engine.quant.low_rank import Adapter, LowRankTerm
from majicflux.engine.sampling.inputs import SamplerInputs
from majicflux.engine.sampling.loop import sample
from majicflux.engine.sampling.schedules import diffsynth_sigmas

META = torch.device("meta")
SOME_STEPS = 2  # of a run: the others hold no more
Sizes = tuple[tuple[int, int], ...]  # rows and columns of latents
# All sizes of one, as many as tell something of the rest.
CASES = [("bfloat16", size) for size in SIZES[:4]]
CASES += [(name, size) for name in [*COMPUTED][1:] for size in ((512, 512), (1024, 1024))]
CASES += [("int8 rotated", (1536, 640)), ("float8", (2048, 2048))]
rope_once = cache(velocity._rope)


@pytest.fixture
def as_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and products in float8 allocate what they do on a card: only their output.

    Two chunks stand for all, of which none is longer than the first.
    """

    def first_two(chunking: Chunking, tokens: slice, part: Callable[[slice], object]) -> None:
        for some in islice(split_tokens(tokens, chunking.tokens), 2):
            part(some)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, dim = q.shape
        return q.new_empty(batch, tokens, heads, dim).transpose(1, 2)

    functional = SimpleNamespace(scaled_dot_product_attention=attention)
    monkeypatch.setattr(Chunking, "for_each", first_two)
    monkeypatch.setattr(velocity, "_rope", rope_once)
    monkeypatch.setattr(conditioning, "_on_host", lambda x: torch.empty(x.shape))
    monkeypatch.setattr(blocks, "F", functional)
    monkeypatch.setattr(matmul, "_float8_product", lambda *_: None)


@pytest.fixture
def kitchens_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """comfy-kitchen's own attention without its kernel: it allocates what it does on a card."""
    library = pytest.importorskip("comfy_kitchen.sage_attention")
    backend = SimpleNamespace(
        _C=SimpleNamespace(sage_sdpa=lambda *_, **__: None), _wrap_for_dlpack=lambda x: x
    )
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(library, "_cuda_backend", backend)
    monkeypatch.setattr(library, "_validate_inputs", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(blocks, "kitchen_int8_attention", library._int8_attention_cuda)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that compute nothing and allocate what ours in Triton do."""

    def norm_modulate_quantize(
        x, norm, gelu, eps, dtype, limit=0.0, group=0
    ) -> tuple[Tensor, Tensor | None]:
        source = x if x is not None else gelu
        batch, tokens, _ = source.shape
        width = sum(part.shape[-1] for part in (x, gelu) if part is not None)
        x, gelu = (y if y is None or y.stride(-1) == 1 else y.contiguous() for y in (x, gelu))
        out = source.new_empty(batch, tokens, width, dtype=dtype)
        return out, source.new_empty(batch, tokens, 1, dtype=torch.float32) if limit else None

    def rms_rope_(qkv, *_: object) -> None:
        assert qkv.stride(-1) == 1

    def add_gated_(x, gate, y) -> None:
        y.contiguous()

    stand_in = SimpleNamespace(
        norm_modulate_quantize=norm_modulate_quantize, rms_rope_=rms_rope_, add_gated_=add_gated_,
        dequantize=lambda *_: None,
    )  # fmt: skip
    products = SimpleNamespace(
        product=lambda *_: None, low_rank_rows=lambda *_: None, add_low_rank_=lambda *_: None
    )
    monkeypatch.setattr(dispatch, "fused", lambda x: x.device == META)
    monkeypatch.setattr(dispatch, "int8_product_works", lambda _: True)
    monkeypatch.setattr(dispatch, "low_rank_works", lambda *_: True)
    for name, module in (("fused_triton", stand_in), ("triton_products", products)):
        monkeypatch.setitem(sys.modules, f"majicflux.engine.kernels.{name}", module)  # type: ignore
        monkeypatch.setattr(kernels, name, module, raising=False)


@cache
def denoised(
    name: str,
    job: Workload,
    tokens: int,
    groups: int,
    is_fused: bool,
    rank: int = 0,
    references: Sizes = (),
    channels: int = FULL.in_channels,
    controls: Sequence[ControlGeometry] = (),
    reuse: bool = False,
) -> int:
    """The most bytes that are alive at once, besides the weights. rank: of adapters in all layers
    of the blocks but their modulation; reuse: whether a step is reused."""
    del is_fused  # for the cache: the fixture says it to the engine
    precision, computing = computing_of(name)
    geometry = replace(ONE_OF_EACH, in_channels=channels)
    module = transformer(geometry, precision).module
    text = TextEmbedding(
        torch.empty(1, job.text_tokens, FULL.text_width), torch.empty(1, FULL.pooled_width)
    )
    noise = torch.empty(job.batch_size, 16, *job.latent_size)
    given = pictures_of(references, job.batch_size), geometry, noise.shape, None
    task = SamplerInputs(diffsynth_sigmas(job.steps, job.width, job.height), noise)
    beside, names = adapters_of(module, rank)
    shown = [Control(control_of(net, precision), torch.empty(1, 1, 1, 3)) for net in controls]
    modules = torch.nn.ModuleList([module, *(each.net.weights.module for each in shown)])
    with torch.inference_mode(), LiveBytes() as live:
        with computing.applied_to(modules, META):
            told = (torch.bfloat16, META, torch.float32, task.sigmas)
            prompts = conditions_of(module, [text] * job.prompts, 3.5, *told)
            of_nets = [
                conditions_of(each.net.weights.module, [text] * job.prompts, 3.5, *told)
                for each in shown
            ]
        hints = [
            ControlTokens(each, [*map(each.told, of_net)], each.hint(noise.to(META)))
            for each, of_net in zip(shown, of_nets, strict=True)
        ]
        del of_nets
        with (
            computing.applied_to(modules, META),
            adapted(module, beside, names, torch.bfloat16, META),
        ):
            prompts = [
                replace(each, pictures=picture_tokens(*given, lambda x: x.to(META)))
                for each in prompts
            ]
            positive, negative = [*prompts, None][:2]
            given = (module, positive, Chunking(tokens, groups), negative, 2.0)
            through = Lockstep(geometry, hints) if hints else all_blocks
            if reuse:
                through = reusing(through, job.steps)
            velocity = flux_velocity(*given, through)
            some = task if reuse else replace(task, sigmas=task.sigmas[: SOME_STEPS + 1])
            sample(some, velocity, lambda _: None, META, torch.float32)
    return live.peak


def reusing(through: Blocks, steps: int) -> StepCache:
    """The last step but one is reused, and what decides is there too."""
    decisions = [True] * steps
    decisions[-2] = False
    course = Course(decisions, [[[], []]] * steps)
    return StepCache(through, Reuse(1.0, 1), course, PrefetchRing([], META, 0), False)


def control_of(geometry: ControlGeometry, precision: str) -> ControlNet:
    patcher: Any = None
    weights = control_net(geometry, precision)
    return ControlNet(weights, patcher, geometry, PRECISIONS[precision])


def pictures_of(references: Sizes, batch_size: int = 1) -> PictureConditions:
    latents = (torch.empty(batch_size, 16, *size) for size in references)
    return PictureConditions(references=tuple(latents))


def adapters_of(module, rank: int) -> tuple[list[tuple[Adapter, float]], list[str]]:
    if rank == 0:
        return [], []
    layers = {
        name: layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, StoredLinear) and kind_of_layer(name) in ("attention", "mlp")
    }
    terms = {
        name: (
            LowRankTerm(torch.empty(rank, weight.shape[1]), torch.empty(len(weight), rank), 1.0),
        )
        for name, weight in layers.items()
    }
    return [(Adapter(terms), 1.0)], [*terms]


def assert_planned(
    name: str,
    job: Workload,
    card: str,
    rank: int = 0,
    references: Sizes = (),
    channels: int = FULL.in_channels,
    controls: Sequence[ControlGeometry] = (),
    reuse: bool = False,
) -> set[tuple[int, int]]:
    """Every plan for up to 24 GB is kept, and not much too large; returns the tokens at once and
    the groups of heads."""
    wrong: list[str] = []
    found: set[tuple[int, int]] = set()
    precision, computing = computing_of(name)
    module = transformer(ONE_OF_EACH, precision).module
    nbytes, ranks = bound_bytes(module, *adapters_of(module, rank), computing.method(module, META))
    given = (replace(FULL, in_channels=channels), AdapterSizes(0, nbytes, ranks), controls, reuse)
    job = replace(job, reference_tokens=pictures_of(references).reference_tokens)
    smallest = plan_of(name, job, None, CARDS[card], *given).smallest
    for budget in (*(smallest + n * smallest // 16 for n in range(16)), *range(GB, 25 * GB, GB)):
        phase = plan_of(name, job, budget, CARDS[card], *given)
        size = (phase.tokens, phase.groups)
        if smallest > budget or size in found:
            continue
        found.add(size)
        # The modulation of the blocks that are not there.
        absent = (12 * 18 + 3 * 37) * FULL.hidden * 4 * job.prompts
        given_too = (rank, references, channels, controls, reuse)
        peak = denoised(name, job, *size, card == "fused", *given_too) + absent
        share = peak / phase.values
        if not 0.85 <= share <= 1:
            wrong.append(f"{size}: {peak / 1e6:.1f} MB, {share:.3f} of the plan")
    assert not wrong
    return found


def test_what_reused_steps_take_holds_what_was_planned(as_cuda, fused) -> None:
    job = Workload(1024, 1024, steps=4)
    assert_planned("int8 rotated", job, "fused", reuse=True)
    given = (CARDS["fused"], FULL, NO_ADAPTERS, ())
    plans = [plan_of("int8 rotated", job, None, *given, kept) for kept in (False, True)]
    added, first = 2 * 4096 * 3072 * 4, 3 * 512 * 3072 * 4
    assert plans[1].values - plans[0].values == added + first
    tight = plan_of("int8 rotated", job, plans[1].smallest - 1, *given, True)
    assert tight.kept_on_host
    on_the_way = 1024 * 3072 * 4
    assert plans[1].smallest - tight.smallest >= added - on_the_way  # and libraries' share of it


@pytest.mark.parametrize(("name", "size"), CASES)
def test_a_picture_holds_what_was_planned(as_cuda, name: str, size: tuple[int, int]) -> None:
    found = assert_planned(name, Workload(*size, steps=1 + (size == SIZES[0])), "plain")
    assert len({tokens for tokens, _ in found}) > 1 or min(size) < 1024, "in chunks and at once"
    assert max(groups for _, groups in found) > 1 or min(size) < 1024, "and in groups of heads"


@pytest.mark.parametrize(("name", "size"), CASES)
def test_fused_kernels_hold_what_was_planned(
    as_cuda, fused, name: str, size: tuple[int, int]
) -> None:
    found = assert_planned(name, Workload(*size, steps=1 + (size == SIZES[0])), "fused")
    assert max(groups for _, groups in found) > 1
    if size == (2048, 2048):
        assert max(groups for _, groups in found) == GROUPS[-1]


@pytest.mark.parametrize(
    ("name", "side", "batch"), [("bfloat16", 1024, 2), ("int8 rotated", 512, 4)]
)
def test_a_batch_holds_what_was_planned(as_cuda, name: str, side: int, batch: int) -> None:
    assert_planned(name, Workload(side, side, batch, 1), "plain")


@pytest.mark.parametrize(
    ("name", "side", "batch"), [("float8", 1024, 2), ("float8 dequantized", 512, 4)]
)
def test_a_fused_batch_holds_what_was_planned(
    as_cuda, fused, name: str, side: int, batch: int
) -> None:
    assert_planned(name, Workload(side, side, batch, 1), "fused")


@pytest.mark.parametrize("name", ["bfloat16", "int8 rotated"])
@pytest.mark.parametrize(
    ("side", "saved_mb", "least_tokens"), [(1024, 60, 256), (2048, 240, 512), (4096, 900, 2048)]
)
def test_heads_are_grouped_only_where_nothing_else_would_do(
    monkeypatch: pytest.MonkeyPatch, name: str, side: int, saved_mb: int, least_tokens: int
) -> None:
    """Queries, keys and values of 2048x2048 pixels are 311 MB, and what they mix to 104 MB."""
    job, card = Workload(side, side), CARDS["fused"]

    def found(budget: int | None) -> tuple[StagePlan, StagePlan]:
        """With groups, and as it would be without."""
        grouped = plan_of(name, job, budget, card)
        with monkeypatch.context() as without:
            without.setattr(denoising, "GROUPS", ())
            return grouped, plan_of(name, job, budget, card)

    grouped, plain = found(None)
    assert plain.smallest - grouped.smallest > saved_mb * 1e6
    for budget in (None, plain.smallest, 2 * plain.smallest, 24 * GB):
        phase, same = found(budget)
        assert replace(phase, smallest=same.smallest) == same
    groups = []
    step = (plain.smallest - grouped.smallest) // 12
    for budget in range(plain.smallest - 1, grouped.smallest, -step):
        phase = plan_of(name, job, budget, card)
        assert phase.peak <= budget
        assert phase.tokens >= least_tokens, "larger chunks cost nothing beside the attention"
        groups.append(phase.groups)
    assert groups == sorted(groups), "as few as will do"
    assert {*groups} == {*GROUPS} or side == 1024


@pytest.mark.parametrize(
    ("products", "card", "size"),
    [
        ("float8", "fused", (1024, 1024)), ("int8 rotated", "fused", (2048, 2048)),
        ("bfloat16", "plain", (1024, 1024)), ("bfloat16", "fused", (512, 512)),
    ],
)  # fmt: skip
def test_attention_in_int8_is_planned(
    as_cuda, kitchens_buffers, request, products: str, card: str, size: tuple[int, int]
) -> None:
    if card == "fused":
        request.getfixturevalue("fused")
    job, name = Workload(*size, steps=1), f"{products} and {INT8_ATTENTION}"
    found = assert_planned(name, job, card)
    assert max(groups for _, groups in found) > 1
    plain, more = (plan_of(each, job, None, CARDS[card]) for each in (products, name))
    assert more.smallest >= plain.smallest


def test_attention_in_int8_of_a_batch_and_two_prompts_is_planned(
    as_cuda, kitchens_buffers, fused
) -> None:
    job = Workload(512, 512, 2, 1, prompts=2)
    assert_planned(f"float8 and {INT8_ATTENTION}", job, "fused", controls=(UNION,))


@pytest.mark.parametrize(("dtype", "mb"), [(torch.bfloat16, 42.6), (torch.float32, 70.9)])
def test_attention_in_int8_holds_what_was_planned(
    kitchens_buffers, dtype: torch.dtype, mb: float
) -> None:
    """Besides its result, of 4608 tokens; half as much as one more of queries, keys and values."""
    qkv = torch.empty(1, 4608, 3 * FULL.hidden, dtype=dtype, device=META)
    with LiveBytes() as live:
        found = blocks.attend(qkv, FULL.heads, Attention(0))
    planned = denoising._rounded_bytes(FULL, 4608, dtype.itemsize)
    assert live.now == found.nbytes
    assert 0.99 * planned < live.peak - found.nbytes <= planned
    assert planned == pytest.approx(mb * 1e6, rel=0.01)


def test_two_prompts_side_by_side_are_planned(as_cuda) -> None:
    assert_planned("bfloat16", Workload(1024, 1024, steps=1, prompts=2), "plain")


def test_two_prompts_side_by_side_are_planned_with_fused_kernels(as_cuda, fused) -> None:
    assert_planned("float8", Workload(512, 512, 2, 1, prompts=2), "fused")


@pytest.mark.parametrize(("name", "card"), [("float8", "fused"), ("int8 rotated", "plain")])
def test_adapters_are_planned(as_cuda, monkeypatch, request, name: str, card: str) -> None:
    if card == "fused":
        request.getfixturevalue("fused")
    monkeypatch.setattr(adapters, "quantize_rows", lambda *_: None)
    job = Workload(1024, 1024, steps=1)
    plain, more = (
        plan_of(name, job, None, CARDS[card], FULL, sizes).smallest
        for sizes in (NO_ADAPTERS, AdapterSizes(0, 100 * MB, 64))
    )
    assert more - plain >= 100 * MB
    assert_planned(name, job, card, rank=64)


REFERENCES = [
    ((512, 512), ((64, 64),)),
    ((1024, 1024), ((128, 128), (65, 91))),
    ((1024, 768), ((96, 128), (96, 128), (48, 48))),
    ((2048, 2048), ((256, 256), (128, 128))),
]


@pytest.mark.parametrize(("name", "card"), [("float8", "fused"), ("int8 rotated", "plain")])
@pytest.mark.parametrize(("size", "references"), REFERENCES)
def test_references_are_planned(
    as_cuda, request, size: tuple[int, int], references: Sizes, name: str, card: str
) -> None:
    if card == "fused":
        request.getfixturevalue("fused")
    job = Workload(*size, steps=1)
    assert_planned(name, job, card, references=references)
    tokens = pictures_of(references).reference_tokens
    plain, more = (
        plan_of(name, each, None, CARDS[card])
        for each in (job, replace(job, reference_tokens=tokens))
    )
    assert more.smallest - plain.smallest > tokens * FULL.hidden * 4, "the residual at least"
    assert more.values > plain.values


def test_references_of_two_prompts_and_a_batch_are_planned(as_cuda, fused) -> None:
    job = Workload(512, 512, 2, 1, prompts=2)
    assert_planned("float8", job, "fused", references=((64, 64), (32, 32)))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels", [128, 384])
def test_a_picture_beside_the_latents_is_planned(as_cuda, fused, channels: int, batch) -> None:
    job = Workload(1024, 1024, batch, steps=1)
    assert_planned("float8", job, "fused", channels=channels)
    wide, plain = (
        plan_of("float8", job, 8 * GB, CARDS["fused"], replace(FULL, in_channels=n)).values
        for n in (channels, 64)
    )
    assert wide - plain == batch * job.image_tokens * (channels - 64) * 4


PRO_2, UNION = ControlGeometry(), ControlGeometry(single_blocks=10, modes=10)
INPAINTING = ControlGeometry(hint_channels=68)
CONTROLS = {
    "Union-Pro 2.0": (PRO_2,),
    "Union": (UNION,),
    "two": (INPAINTING, PRO_2),
    "three": (UNION, UNION, INPAINTING),
}


@pytest.mark.parametrize(
    ("controls", "side"),
    [*((name, 1024) for name in CONTROLS), ("two", 512), ("Union", 2048), ("three", 2048)],
)
def test_control_nets_are_planned(as_cuda, fused, controls: str, side: int) -> None:
    job, nets = Workload(side, side, steps=1), CONTROLS[controls]
    assert_planned("float8", job, "fused", controls=nets)
    plain = plan_of("float8", job, None, CARDS["fused"]).smallest
    more = plan_of("float8", job, None, CARDS["fused"], controls=nets).smallest
    tokens = len(nets) * (job.tokens * 4 + job.image_tokens * 2)
    assert more - plain > tokens * FULL.hidden, "residuals and what was told"


@pytest.mark.parametrize(("name", "card"), [("int8 rotated", "plain"), ("bfloat16", "fused")])
def test_control_nets_of_two_prompts_and_a_batch_are_planned(
    as_cuda, request, name: str, card: str
) -> None:
    if card == "fused":
        request.getfixturevalue("fused")
    assert_planned(name, Workload(512, 768, 2, 20, prompts=2), card, controls=CONTROLS["two"])


def test_a_reference_and_a_control_net_add_up_in_the_plan(as_cuda, fused) -> None:
    job, given = Workload(512, 512, steps=1), {"references": ((64, 64),), "controls": (PRO_2,)}
    assert_planned("float8", job, "fused", **given)


def test_a_preview_is_planned_where_it_takes_more_than_a_step() -> None:
    job, card = Workload(1024, 1024), CARDS["fused"]
    plain, small, large = (
        plan_of("float8", replace(job, preview_bytes=size), 24 * GB, card)
        for size in (0, 100 * MB, GB)
    )
    assert small == plain
    assert GB < large.values < 2 * GB
    assert large.smallest == plain.smallest, "without room for it there is none"


def test_a_long_prompt_is_planned(as_cuda) -> None:
    assert_planned("bfloat16", Workload(512, 512, steps=1, text_tokens=2048), "plain")


def test_fewer_tokens_than_any_chunk_has_are_planned() -> None:
    job, card = Workload(64, 48, text_tokens=40), CARDS["plain"]
    smallest = plan_of("bfloat16", job, None, card).smallest
    assert plan_of("bfloat16", job, smallest, card).peak <= smallest


@pytest.mark.parametrize("precision", ["bfloat16", "float8_e4m3fn unscaled"])
@pytest.mark.parametrize("steps", [1, 400])
def test_conditions_hold_what_was_planned(as_cuda, precision: str, steps: int) -> None:
    """What is computed once, before the first step, of two prompts; it waits on the host."""
    module = transformer(ONE_OF_EACH, precision).module
    text = TextEmbedding(
        torch.empty(1, T5_TOKENS, FULL.text_width), torch.empty(1, FULL.pooled_width)
    )
    given = (torch.bfloat16, META, torch.float32, diffsynth_sigmas(steps, 64, 64))
    computing = ComputePrecision(torch.bfloat16)
    with torch.inference_mode(), computing.applied_to(module, META), LiveBytes() as live:
        kept = conditions_of(module, [text, text], 3.5, *given)
    assert [len(of_prompt.modulation) for of_prompt in kept] == [steps] * 2
    assert live.now == 2 * T5_TOKENS * FULL.hidden * 4, "only the words stay"
    job = Workload(64, 64, steps=steps, prompts=2)
    planned = min(plan_of("bfloat16", job, None, card).values for card in CARDS.values())
    assert live.peak <= planned
    assert live.peak >= 0.85 * planned or steps == 1, "a step takes more"


@pytest.mark.parametrize("words", [T5_TOKENS, 1280])
@pytest.mark.parametrize("prompts", [1, 4, 16])
def test_the_text_encoders_hold_what_was_planned(
    monkeypatch: pytest.MonkeyPatch, words: int, prompts: int
) -> None:
    """Without a fused attention that takes a bias, as on many cards: in float32, step by step."""

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, **_: object) -> Tensor:
        scores = q.float() @ k.float().mT
        if attn_mask is not None:
            scores += attn_mask
        return (scores.softmax(-1) @ v.float()).to(q.dtype)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    weights = encoders(2)
    phase = plan_text(
        weights.sizes, T5Geometry(layers=2), 2, None, DeviceProfile(), text_tokens=words,
        prompts=prompts,
    )  # fmt: skip
    with torch.inference_mode(), LiveBytes() as live:
        clip_ids = torch.zeros(prompts, CLIP_TOKENS, dtype=torch.int64, device=META)
        t5_ids = torch.zeros(prompts, words, dtype=torch.int64, device=META)
        pooled, _ = weights.module.clip(clip_ids)
        tokens = weights.module.t5(t5_ids)
    assert pooled.shape == (prompts, 768)
    assert tokens.shape == (prompts, words, 4096)
    assert 0.85 * phase.values <= live.peak <= phase.values


@pytest.mark.parametrize("size", SIZES)
def test_the_decoder_holds_what_was_planned(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    host: list[int] = []
    allocate = vae_bands.host_map

    def host_map(*args) -> Tensor:
        live._alive.add((tensor := allocate(*args)).untyped_storage()._cdata)
        live.now -= tensor.untyped_storage().nbytes()
        host.append(tensor.nbytes)
        return tensor

    def elsewhere(*args) -> Tensor:
        peak = live.peak
        tensor = host_map(*args)
        live.peak = peak
        return tensor

    monkeypatch.setattr(vae_bands, "host_map", elsewhere)
    decoder = autoencoder().module["decoder"]
    for batch_size in (1, 4):
        job = Workload(*size, batch_size)
        found = set()
        for gb in (1, 2, 4, 8, 24):
            phase = plan_decode(autoencoder().sizes, job, 2, gb * GB, CARDS["fused"])
            if phase.smallest > gb * GB:
                continue
            if phase.bands in found:
                continue
            found.add(phase.bands)
            latents = torch.empty(1, 16, *job.latent_size)
            with torch.inference_mode(), LiveBytes() as live:
                latent = latents.to(META, torch.bfloat16)
                vae_bands.decode(decoder, latent, phase.bands)
            assert 0.85 * phase.values <= live.peak <= phase.values, (gb, batch_size)
        assert host
        assert found
