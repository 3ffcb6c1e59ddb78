"""How much is computed at once: the same result with any choice, and with any lack of memory."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from in_chunks import assert_same_in_chunks
from live_bytes import LiveBytes
from torch import Tensor

from majicflux.engine.flux import blocks, conditioning, velocity
from majicflux.engine.flux.blocks import TokenSequence
from majicflux.engine.flux.conditioning import Conditions, conditions_of
from majicflux.engine.flux.geometry import FluxGeometry
from majicflux.engine.flux.text_encoders import TextEmbedding
from majicflux.engine.flux.transformer import build_flux_dit
from majicflux.engine.flux.velocity import flux_velocity
from majicflux.engine.offload.chunking import CHUNKS, GROUPS, Chunking, split
from majicflux.engine.quant import methods
from majicflux.engine.quant.compute import ComputePrecision, choose_compute
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.engine.quant.linear import StoredLinear
from majicflux.engine.quant.quantize import quantize_rows

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
BFLOAT16 = ComputePrecision(torch.bfloat16)
GEOMETRY = FluxGeometry(512, 1, 1, text_width=64, pooled_width=64)  # 4 heads
WORDS = 70
LATENTS = (34, 36)  # 306 tokens: more than the smallest chunk
TIGHTEST = (CHUNKS[-1], GROUPS[-1])


@cache
def transformer(precision: str) -> Any:
    """Of random weights that keep the size of what passes through."""
    weights = build_flux_dit(GEOMETRY, PRECISIONS[precision]).allocate()
    drawn = torch.Generator().manual_seed(4)
    for module in weights.module.modules():
        for name, parameter in module.named_parameters(recurse=False):
            size = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
            values = size * torch.randn(parameter.shape, generator=drawn)
            if isinstance(module, StoredLinear) and name == "weight" and module.scale is not None:
                quantize_rows(values, parameter.data, module.scale.data, module.group)
            elif name != "scale":
                parameter.data.copy_(values)
    return weights.module


@cache
def given(pictures: int = 1) -> tuple[Tensor, Conditions]:
    """Latents, and what each block is told."""
    some = partial(torch.randn, generator=torch.Generator().manual_seed(5))
    modulation = {1.0: 0.3 * some(1, 1, (6 + 6 + 3 + 2) * GEOMETRY.hidden)}
    text = some(1, WORDS, GEOMETRY.hidden)
    return some(pictures, 16, *LATENTS), Conditions(text, modulation)


@torch.inference_mode()
def run(
    chunking: Chunking, precision: str = "bfloat16", mode: str = "bfloat16", pictures=1
) -> Tensor:
    dit = transformer(precision)
    latents, told = given(pictures)
    with choose_compute(dit, CPU, mode, torch.bfloat16).applied_to(dit, CPU):
        return flux_velocity(dit, told, chunking)(latents, torch.tensor(1.0))


@cache
def expected(pictures: int = 1) -> Tensor:
    return run(Chunking(), pictures=pictures)


@pytest.mark.parametrize(
    ("precision", "mode"),
    [
        ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float8_e4m3fn", "bfloat16"),
        ("float8_e4m3fn", "8-bit"), ("int8 rotated", "bfloat16"), ("int8 rotated", "8-bit"),
    ],
)  # fmt: skip
def test_chunks_and_groups_change_nothing(precision: str, mode: str) -> None:
    at_once = run(Chunking(), precision, mode)
    assert at_once.isfinite().all()
    for size in ((256, 1), (256, 2), TIGHTEST, (0, 4), (64, 1)):
        assert_same_in_chunks(run(Chunking(*size), precision, mode), at_once, size)


@pytest.mark.parametrize("groups", [1, *GROUPS])
def test_groups_of_heads_attend_one_after_another(
    monkeypatch: pytest.MonkeyPatch, groups: int
) -> None:
    """As many as there are heads, where there are fewer; queries, keys and values of one group
    are there at a time."""
    attended: list[tuple[int, int]] = []
    attend = blocks.attend

    def watched(qkv: Tensor, heads: int, *attention: Any) -> Tensor:
        attended.append((heads, qkv.shape[2]))
        return attend(qkv, heads, *attention)

    monkeypatch.setattr(blocks, "attend", watched)
    run(Chunking(256, groups))
    groups = min(groups, GEOMETRY.heads)
    heads = GEOMETRY.heads // groups
    assert attended == [(heads, 3 * 128 * heads)] * groups * 2  # a joint block and a single one


@torch.inference_mode()
def through_blocks(
    chunking: Chunking, allowed: Callable[[int, int, int], bool] = lambda *_: True
) -> tuple[Tensor, LiveBytes]:
    """A joint and a single block, in which every allocation belongs to an attempt."""
    dit, width = transformer("bfloat16"), GEOMETRY.hidden
    modulation = given()[1].modulation[1.0]
    *joint, single, _ = modulation.split([n * width for n in (6, 6, 3, 2)], dim=-1)
    drawn = torch.Generator().manual_seed(6)
    tokens = WORDS + 17 * 18
    x = torch.randn(1, tokens, width, generator=drawn)
    rope = torch.randn(1, 1, tokens, 64, 2, 2, generator=drawn)
    with BFLOAT16.applied_to(dit, CPU), LiveBytes("cpu", allowed) as live:
        sequences = [TokenSequence(x, WORDS, x.shape[1] - WORDS, rope)]
        dit.blocks[0](sequences, [joint], chunking)
        dit.single_blocks[0](sequences, [[single]], chunking)
    return x, live


@pytest.mark.parametrize(("size", "step"), [((0, 1), 1), ((256, 2), 5)])
def test_any_allocation_may_fail(size: tuple[int, int], step: int) -> None:
    """One, and another half a run later, with nothing to free. step: 1 for every allocation."""
    whole = through_blocks(Chunking())[0]
    allocations = through_blocks(Chunking(*size))[1].made
    assert allocations > 50
    for failing in range(0, allocations // 2 + 1, step):
        both = (failing, failing + allocations // 2)
        chunking = Chunking(*size)
        found, live = through_blocks(chunking, lambda number, *_, both=both: number not in both)
        assert live.made > both[1]
        assert_same_in_chunks(found, whole, failing)
        if size == (0, 1):
            assert (chunking.tokens, chunking.groups) != size, "less at once from then on"


def test_weights_leave_before_less_is_computed_at_once() -> None:
    whole = through_blocks(Chunking())[0]
    left = [3]

    def relieve() -> bool:
        left[0] -= 1
        return left[0] >= 0

    chunking = Chunking(relieve=relieve)
    found, _ = through_blocks(chunking, lambda number, *_: number not in (5, 9, 13))
    assert (left, chunking.tokens, chunking.groups) == ([0], 0, 1)
    assert torch.equal(found, whole)
    through_blocks(chunking, lambda number, *_: number != 5)
    assert (left, chunking.tokens, chunking.groups) == ([-1], 256, 1)


@pytest.mark.usefixtures("products_as_they_are")
@pytest.mark.parametrize(
    ("size", "less"), [((0, 1), (256, 1)), ((256, 1), (256, 2)), ((256, 2), None)]
)
def test_a_run_that_is_short_of_memory_computes_as_little_at_once_as_it_must(
    size: tuple[int, int], less: tuple[int, int] | None
) -> None:
    """less: when one byte is missing; None: nothing less is possible."""
    whole = through_blocks(Chunking())[0]
    peak = through_blocks(Chunking(*size))[1].peak
    for limit, enough in ((peak, size), (peak - 1, less)):
        chunking = Chunking()
        if enough is None:
            with pytest.raises(torch.OutOfMemoryError):
                through_blocks(chunking, lambda *numbers, limit=limit: numbers[2] <= limit)
            continue
        found, _ = through_blocks(chunking, lambda *numbers, limit=limit: numbers[2] <= limit)
        assert_same_in_chunks(found, whole)
        assert (chunking.tokens, chunking.groups) == enough


LAYERS = {
    "queries of a joint block": lambda dit: dit.blocks[0].attn.a_to_qkv,
    "after the attention": lambda dit: dit.blocks[0].attn.a_to_out,
    "into the MLP": lambda dit: dit.blocks[0].ff_a[0],
    "out of the MLP": lambda dit: dit.blocks[0].ff_a[2],
    "into a single block": lambda dit: dit.single_blocks[0].to_qkv_mlp,
    "out of a single block": lambda dit: dit.single_blocks[0].proj_out,
}


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("place", LAYERS)
def test_a_layer_that_is_short_of_memory_takes_fewer_tokens(
    monkeypatch: pytest.MonkeyPatch, caplog, place: str, pictures: int
) -> None:
    whole = expected(pictures)
    layer = LAYERS[place](transformer("bfloat16"))
    multiply = methods.Dequantized.__call__

    def short(product, called, x, out, columns) -> Tensor:
        y = multiply(product, called, x, out, columns)
        if called is layer and x.shape[-2] > 256:
            raise torch.OutOfMemoryError("simulated")
        return y

    monkeypatch.setattr(methods.Dequantized, "__call__", short)
    chunking = Chunking()
    assert_same_in_chunks(run(chunking, pictures=pictures), whole)
    assert (chunking.tokens, chunking.groups) == (256, 1)
    assert caplog.text.count("less memory than planned; from here on 256 tokens are computed") == 1


def test_a_step_whose_modulation_finds_no_room_makes_some() -> None:
    latents, told = given()
    left = [1]

    class Far(Tensor):
        def to(self, *where: Any, **how: Any) -> Tensor:
            if left[0]:
                raise torch.OutOfMemoryError("simulated")
            return self.as_subclass(Tensor)

    def relieve() -> bool:
        left[0] -= 1
        return True

    far = Conditions(told.text, {1.0: told.modulation[1.0].as_subclass(Far)})
    dit = transformer("bfloat16")
    with torch.inference_mode(), BFLOAT16.applied_to(dit, CPU):
        found = flux_velocity(dit, far, Chunking(relieve=relieve))(latents, torch.tensor(1.0))
    assert torch.equal(found, expected())


def test_what_cannot_be_pinned_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of it wait, and are right all the same."""
    empty = torch.empty

    def full(*shape: Any, pin_memory: bool = False, **given: Any) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*shape, **given)

    monkeypatch.setattr(torch, "empty", full)
    found = conditioning._host_memory((2, 1, 3), torch.bfloat16, torch.device("cuda"))
    assert (found.shape, found.dtype, found.device) == ((2, 1, 3), torch.bfloat16, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_step_has_what_all_modulation_layers_give(dtype: torch.dtype) -> None:
    dit, given = transformer("bfloat16"), []
    text = TextEmbedding(torch.randn(1, 4, GEOMETRY.text_width), torch.randn(1, 64))
    hooks = [
        layer.register_forward_hook(lambda _, __, found: given.append(found.clone()))
        for layer in conditioning.modulation_layers(dit)
    ]
    sigmas = torch.tensor([1.0, 0.5, 0.25, 0.0])
    with torch.inference_mode(), BFLOAT16.applied_to(dit, CPU):
        told = conditions_of(dit, [text], 3.5, torch.bfloat16, CPU, dtype, sigmas)[0].modulation
    for hook in hooks:
        hook.remove()
    assert [*told] == [1.0, 0.5, 0.25]
    for found, expected in zip(told.values(), torch.cat(given, dim=-1), strict=True):
        assert (found.dtype, found.shape) == (dtype, (1, *expected.shape))
        assert torch.equal(found[0], expected)


@pytest.mark.parametrize("tokens", [0, 256])
def test_the_ends_take_as_many_tokens_whatever_the_memory(
    monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """So that the bits of a picture do not depend on it, see `velocity.TOKENS_OF_ENDS`."""
    monkeypatch.setattr(velocity, "TOKENS_OF_ENDS", 128)
    dit = transformer("bfloat16")
    multiply, seen = methods.Dequantized.__call__, []

    def watched(product, called, x, out, columns) -> Tensor:
        if called in (dit.x_embedder, dit.final_proj_out):
            seen.append(x.shape[-2])
        return multiply(product, called, x, out, columns)

    monkeypatch.setattr(methods.Dequantized, "__call__", watched)
    run(Chunking(tokens))
    assert max(seen) == 128 < sum(seen) / 2


@pytest.mark.parametrize("most", [2, 1, 0])
def test_an_attention_that_is_short_of_memory_takes_fewer_heads(
    monkeypatch: pytest.MonkeyPatch, caplog, most: int
) -> None:
    whole = expected(2)
    attend = blocks.attend
    attended: list[int] = []

    def short(qkv: Tensor, heads: int, *attention: Any) -> Tensor:
        if heads > most:
            raise torch.OutOfMemoryError("simulated")
        attended.append(heads)
        return attend(qkv, heads, *attention)

    monkeypatch.setattr(blocks, "attend", short)
    chunking = Chunking(tokens=512)
    if not most:
        with pytest.raises(torch.OutOfMemoryError):
            run(chunking, pictures=2)
        return
    assert_same_in_chunks(run(chunking, pictures=2), whole)
    assert (chunking.tokens, chunking.groups) == (512, GEOMETRY.heads // most)
    assert "from here on heads attend in 2 groups" in caplog.text
    # Two pictures in two blocks, and no group of heads twice.
    assert attended == [most] * (GEOMETRY.heads // most) * 4


@pytest.mark.parametrize(("heads", "groups"), [(24, [2, 4, 8]), (6, [2]), (4, [2, 4]), (5, [])])
def test_groups_are_all_of_one_size(heads: int, groups: list[int]) -> None:
    chunking = Chunking()
    found = []
    while chunking.fewer_heads(heads):
        found.append(chunking.groups)
        assert chunking.heads_at_once(heads) * chunking.groups == heads
    assert found == groups
    assert not chunking.fewer_tokens(), (
        "where nothing is done in chunks there can be no smaller ones"
    )


@pytest.mark.parametrize("count", [1, 255, 256, 257, 514, 1100, 4097])
@pytest.mark.parametrize("tokens", [0, *CHUNKS])
def test_every_token_is_done_once(count: int, tokens: int) -> None:
    """And no chunk is longer than the first, which is what the plan counts on; also where memory
    runs out in the middle."""
    for failing in (None, 0, 1, 2):
        chunking = Chunking(tokens)
        done: list[slice] = []
        calls = 0

        def part(some: slice, failing=failing, done=done) -> None:
            nonlocal calls
            calls += 1
            if calls - 1 == failing:
                raise torch.OutOfMemoryError("simulated")
            done.append(some)

        chunking.for_each(slice(100, 100 + count), part)
        calls = 0
        assert [n for some in done for n in range(some.start, some.stop)] == [
            *range(100, 100 + count)
        ]
        sizes = [some.stop - some.start for some in done]
        assert max(sizes) <= (tokens or count)
        assert sizes == sorted(sizes, reverse=True)
        if failing is None:
            assert done[0] == next(split(slice(100, 100 + count), chunking.tokens))
