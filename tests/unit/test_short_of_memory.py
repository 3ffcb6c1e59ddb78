"""What a run does when the card has less memory than was planned, or when it is stopped."""

import gc
import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from in_chunks import assert_same_in_chunks
from live_bytes import LiveBytes
from torch import Tensor

from majicflux.engine.errors import BudgetError
from majicflux.engine.flux import blocks, vae_bands
from majicflux.engine.flux.transformer import DiT
from majicflux.engine.flux.vae import VAE
from majicflux.engine.flux.vae_band_plan import BandPlan, plan_decode
from majicflux.engine.offload import prefetch
from majicflux.engine.offload.chunking import Chunking
from majicflux.engine.offload.offloaded_module import OffloadedModule
from majicflux.engine.offload.weight_block import WeightBlock
from majicflux.engine.plan.plan import Workload
from majicflux.engine.quant import methods
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.engine.quant.linear import StoredLinear
from majicflux.engine.run.pipeline import Pipeline, paint
from majicflux.engine.run.request import GenerationRequest
from majicflux.nodes.advice import advise

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")

ACCELERATOR = torch.device("cpu", 0)  # another device than `cpu` to PyTorch's comparisons
REQUEST = GenerationRequest("a cat", seed=3, steps=2, guidance=3.5, width=32, height=16)
ROOMY = 2**31
PHASES = ["text encoders", "denoising", "VAE decode"]


def run(
    pipeline: Pipeline,
    request: GenerationRequest = REQUEST,
    on_pass: Callable[[Tensor | None], None] = lambda _: None,
    before_block: Callable[[], None] = lambda: None,
) -> Tensor:
    """The latents."""
    return paint(pipeline, request, on_pass, before_block)[1]


def resident(pipeline: Pipeline) -> int:
    return sum(c.weights.resident_bytes for c in pipeline.components)


def homes(weights: OffloadedModule) -> list[int]:
    return [
        block.host_buffer.data_ptr()
        for block in weights.all_blocks
        if block.host_buffer is not None
    ]


def assert_at_rest(pipeline: Pipeline) -> None:
    """Every block is at home or resident, and nothing of a run hangs on to it."""
    for component in pipeline.components:
        weights = component.weights
        for block in weights.all_blocks:
            assert block.visitors == 0
            assert block.host_buffer is not None
            home = block.host_buffer.untyped_storage().data_ptr()
            at = {getattr(v.owner, v.name).untyped_storage().data_ptr() for v in block._views}
            assert (home not in at) if block.resident else at <= {home}
        for module in weights.module.modules():
            assert not {"onload"} & module.__dict__.keys()
            assert getattr(module, "method", None) is None
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in _blocks_of(weights))


def _blocks_of(weights: OffloadedModule) -> list[torch.nn.Module]:
    return [module for modules in weights._modules for module in modules]


def streaming_budget(pipeline: Pipeline, share: float = 0.0, job=REQUEST.workload) -> int:
    """Which lets about `share` of the transformer stay, and never all components."""
    smallest = pipeline.plan(job).smallest_bytes
    return int(smallest + share * pipeline.dit.weights.travelling_bytes)


class Shortage:
    """Calls of a function of the engine find no memory; which ones, `short` says by their number.

    A call is made first, so that it may change what it should not before it fails.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        owner: object,
        name: str,
        short: Callable[[int], bool],
        after: bool = False,
        where: Callable[..., bool] = lambda *_, **__: True,
    ):
        self.calls = self.failures = 0
        self.short = short
        original = getattr(owner, name)

        def found_none(*args: object, **kwargs: object) -> object:
            if not where(*args, **kwargs):
                return original(*args, **kwargs)
            self.calls += 1
            fails = self.short(self.calls - 1)
            result = original(*args, **kwargs) if after or not fails else None
            if fails:
                self.failures += 1
                raise torch.OutOfMemoryError("simulated")
            return result

        monkeypatch.setattr(owner, name, found_none)


# Where a run takes memory: the layer of the transformer whose product it is.
LAYERS: dict[str, Callable[[DiT], StoredLinear]] = {
    "embedding of the text": lambda dit: dit.weights.module.context_embedder,
    "modulation": lambda dit: dit.weights.module.blocks[1].norm1_a.linear,
    "embedding of the latents": lambda dit: dit.weights.module.x_embedder,
    "queries of a joint block": lambda dit: dit.weights.module.blocks[0].attn.a_to_qkv,
    "after the attention": lambda dit: dit.weights.module.blocks[1].attn.b_to_out,
    "into the MLP": lambda dit: dit.weights.module.blocks[1].ff_a[0],
    "out of the MLP": lambda dit: dit.weights.module.blocks[1].ff_a[2],
    "into a single block": lambda dit: dit.weights.module.single_blocks[0].to_qkv_mlp,
    "out of a single block": lambda dit: dit.weights.module.single_blocks[3].proj_out,
    "final layer": lambda dit: dit.weights.module.final_proj_out,
}


def no_memory_for(
    layer: StoredLinear, monkeypatch: pytest.MonkeyPatch, short: Callable[[int], bool]
) -> Shortage:
    """The products of one layer fail, after they were written where they belong."""

    def where(_: object, called: StoredLinear, *__: object) -> bool:
        return called is layer

    return Shortage(monkeypatch, methods.Dequantized, "__call__", short, after=True, where=where)


PLACES: dict[str, tuple[object, str]] = {
    "attention": (blocks, "attend"),
    "queries and keys": (blocks, "rms_rope_"),
    "rows of an MLP": (StoredLinear, "rows"),
}


def assert_survived(
    pipeline: Pipeline, shortage: Shortage, before: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert shortage.failures == 1
    assert resident(pipeline) < before
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert re.match(r"The card has less memory than planned; [\d.]+ GB of weights", warnings[0])
    assert_at_rest(pipeline)


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder, which takes most of the time, does nothing."""
    monkeypatch.setattr(VAE, "decode", lambda *_: (torch.zeros(1), 0))


@pytest.fixture
def expected(make_pipeline, unseen) -> Tensor:
    return run(make_pipeline(device=ACCELERATOR))


@pytest.mark.parametrize("place", LAYERS)
def test_a_shortage_at_any_layer_is_survived(
    unseen, make_pipeline, monkeypatch, caplog, place: str
) -> None:
    precision = PRECISIONS["float8_e4m3fn"]  # some layers are converted, others are not
    pipeline = make_pipeline(device=ACCELERATOR, budget_bytes=ROOMY, precision=precision)
    expected = run(pipeline)
    before = resident(pipeline)
    layer = LAYERS[place](pipeline.dit)
    pipeline.dit.last_conditions.forget()
    shortage = no_memory_for(layer, monkeypatch, lambda call: call == 0)
    assert torch.equal(run(pipeline), expected)
    assert_survived(pipeline, shortage, before, caplog)


@pytest.mark.parametrize("call", [0, 1, 5])
@pytest.mark.parametrize("place", PLACES)
def test_a_shortage_between_the_layers_is_survived(
    unseen, make_pipeline, monkeypatch, caplog, place: str, call: int
) -> None:
    pipeline = make_pipeline(device=ACCELERATOR, budget_bytes=ROOMY)
    expected = run(pipeline)
    before = resident(pipeline)
    shortage = Shortage(monkeypatch, *PLACES[place], lambda number: number == call, after=True)
    assert torch.equal(run(pipeline), expected)
    assert_survived(pipeline, shortage, before, caplog)


@pytest.mark.parametrize("encoder", ["clip", "t5"])
def test_a_shortage_in_the_text_encoders_is_survived(
    unseen, make_pipeline, monkeypatch, caplog, expected: Tensor, encoder: str
) -> None:
    pipeline = make_pipeline(device=ACCELERATOR, budget_bytes=ROOMY)
    run(pipeline, replace(REQUEST, prompt="a dog"))
    before = resident(pipeline)
    module = pipeline.text_encoders.weights.module[encoder]
    shortage = Shortage(monkeypatch, module, "forward", lambda call: call == 0, after=True)
    assert torch.equal(run(pipeline), expected)
    assert_survived(pipeline, shortage, before + 1, caplog)


@pytest.mark.parametrize(
    ("encoder", "name"),
    [("clip", "CLIPEncoderLayer"), ("t5", "T5LayerSelfAttention"), ("t5", "T5LayerFF")],
)
def test_a_shortage_in_the_text_encoders_costs_one_layer(
    make_pipeline, monkeypatch, encoder: str, name: str
) -> None:
    encoders = make_pipeline().text_encoders
    layers = encoders.weights.module[encoder].modules()
    (kind,) = {type(layer) for layer in layers if type(layer).__name__ == name}
    # The second layer of three fails, and the third.
    shortage = Shortage(monkeypatch, kind, "forward", lambda call: call in (1, 3), after=True)
    relieved: list[bool] = []

    def relieve() -> bool:
        relieved.append(True)
        return True

    with torch.inference_mode():
        found, _ = encoders.encode("a cat", chunking=Chunking(relieve=relieve))
        monkeypatch.undo()
        expected, _ = encoders.encode("a cat")
    assert (shortage.calls, len(relieved)) == (5, 2)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.pooled, expected.pooled)


def test_any_allocation_in_the_text_encoders_may_fail(make_pipeline) -> None:
    """Of what is as large as the states are; with nothing to free."""
    encoders = make_pipeline().text_encoders
    states = 77 * 128 * 2  # bytes of CLIP's, the smaller ones
    with torch.inference_mode():
        expected, _ = encoders.encode("a cat")
        numbers: list[int] = []

        def noted(number: int, size: int, _: int) -> bool:
            if size > states:
                numbers.append(number)
            return True

        with LiveBytes("cpu", noted):
            encoders.encode("a cat")
        for failing in numbers[::7]:
            with LiveBytes("cpu", lambda number, *_, failing=failing: number != failing):
                found, _ = encoders.encode("a cat")
            assert torch.equal(found.tokens, expected.tokens)
            assert torch.equal(found.pooled, expected.pooled)


def test_a_shortage_of_the_root_is_survived(unseen, make_pipeline, monkeypatch, caplog) -> None:
    """When the phase begins, where none of the weights become resident, and when it runs."""
    pipeline = make_pipeline(device=ACCELERATOR, budget_bytes=ROOMY)
    expected = run(pipeline)
    root = pipeline.dit.weights.root
    pipeline.dit.weights.release(float("inf"))
    before = resident(pipeline)
    assert before
    shortage = Shortage(
        monkeypatch, WeightBlock, "stay_on", lambda call: call < 2, where=lambda b, *_: b is root
    )
    assert torch.equal(run(pipeline), expected)
    assert shortage.calls == 3
    shortage.failures -= 1
    assert_survived(pipeline, shortage, before, caplog)


def test_when_no_weights_are_left_less_is_computed_at_once(
    unseen, make_pipeline, monkeypatch, caplog
) -> None:
    pipeline = make_pipeline(device=ACCELERATOR, budget_bytes=ROOMY)
    expected = run(pipeline)
    shortage = Shortage(
        monkeypatch, blocks, "attend", lambda _: True, where=lambda _, heads, *__: heads > 1
    )
    assert_same_in_chunks(run(pipeline), expected)
    assert shortage.failures > 1
    assert pipeline.dit.weights.resident_bytes < 2 * pipeline.dit.weights.largest_bytes
    assert "from here on heads attend in 2 groups" in caplog.text
    caplog.clear()
    shortage.short = lambda _: False
    assert torch.equal(run(pipeline), expected)
    assert "less memory" not in caplog.text, "the next run begins as planned"


def test_a_shortage_of_the_ring_is_survived(unseen, make_pipeline, monkeypatch, caplog) -> None:
    pipeline = make_pipeline(device=ACCELERATOR)
    expected = run(pipeline)
    for component in pipeline.components:
        component.weights.release(float("inf"))
    weights = pipeline.dit.weights
    planned: list[int] = []

    def some_stay(working: int, weight_cap: int | None) -> None:
        planned.append(working)
        assert weight_cap is None
        weights.keep_resident(ACCELERATOR, 0.6 * weights.travelling_bytes)

    monkeypatch.setattr(pipeline.dit.patcher, "load", some_stay)
    monkeypatch.setattr(pipeline.vae.patcher, "load", lambda *_, **__: None)
    shortage = Shortage(monkeypatch, prefetch.PrefetchRing, "_new_ring", lambda call: call == 0)
    before = 0.6 * weights.travelling_bytes - 2 * weights.largest_bytes
    caplog.clear()
    assert torch.equal(run(pipeline), expected)
    assert planned
    assert_survived(pipeline, shortage, int(before), caplog)


@pytest.mark.parametrize("budget", [ROOMY, None])
@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_shortage_in_the_decoder_is_survived(
    make_pipeline, monkeypatch, caplog, budget: int | None, failures: int
) -> None:
    """With the same picture once other weights have left, or its own, then in smallest bands."""
    pipeline = make_pipeline(device=ACCELERATOR, budget_bytes=budget)
    picture = paint(pipeline, REQUEST, lambda *_: None, lambda: None)[0]
    decoder = pipeline.vae.weights.module["decoder"]
    bands: list[BandPlan | None] = []  # None: no bands
    decode = vae_bands.decode
    whole = decoder.forward

    def in_bands(*args: Any) -> Tensor:
        bands.append(args[2])
        if len(bands) <= failures:
            raise torch.OutOfMemoryError("simulated")
        return decode(*args)

    def at_once(latent: Tensor) -> Tensor:
        bands.append(None)
        if len(bands) <= failures:
            raise torch.OutOfMemoryError("simulated")
        return whole(latent)

    monkeypatch.setattr(decoder, "forward", at_once)
    monkeypatch.setattr(vae_bands, "decode", in_bands)
    before = resident(pipeline)
    found = paint(pipeline, REQUEST, lambda *_: None, lambda: None)[0]
    smallest = plan_decode(*REQUEST.workload.latent_size, 2, 0)
    assert len(bands) == failures + 1
    assert (bands[0] is None) == (budget is None)
    assert bands[1:] == [bands[0], bands[0], smallest][:failures]
    assert torch.equal(found, picture) or failures == 3
    assert (found - picture).abs().max() < 0.02
    assert resident(pipeline) < before
    assert caplog.text.count("less memory than planned") == min(failures, 2)
    assert_at_rest(pipeline)


@pytest.mark.parametrize("phase", PHASES)
def test_when_nothing_is_left_to_free_the_run_ends(
    make_pipeline, monkeypatch, caplog, phase: str
) -> None:
    pipeline = make_pipeline(device=ACCELERATOR, budget_bytes=ROOMY)
    expected = run(pipeline)
    dog = replace(REQUEST, prompt="a dog")
    owner, name = {
        "text encoders": (pipeline.text_encoders.weights.module.t5, "forward"),
        "denoising": (blocks, "attend"),
        "VAE decode": (vae_bands, "decode"),
    }[phase]
    with monkeypatch.context() as context:
        shortage = Shortage(context, owner, name, lambda _: True)
        with pytest.raises(BudgetError) as ended:
            run(pipeline, dog)
    advise(ended.value)  # as the nodes do
    said = str(ended.value)
    smallest = pipeline.plan(REQUEST.workload).stages[PHASES.index(phase)].smallest
    assert f"the phase '{phase}', which needs {smallest / 2**30:.2f} GB at least" in said
    assert "Close other programs that use the card, or choose a smaller picture or batch." in said
    assert shortage.failures == shortage.calls > 1
    # What computes stays; nothing else does.
    used = pipeline.components[[1, 0, 2][PHASES.index(phase)]].weights
    largest = max(block.footprint for block in used.blocks)
    assert resident(pipeline) == used.resident_bytes <= used.root.footprint + largest
    assert_at_rest(pipeline)
    caplog.clear()
    assert torch.equal(run(pipeline), expected)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert_at_rest(pipeline)


def test_memory_that_another_program_takes_in_the_middle_is_made_up_for(
    unseen, make_pipeline, monkeypatch, caplog
) -> None:
    pipeline = make_pipeline(device=ACCELERATOR, budget_bytes=ROOMY)
    request = replace(REQUEST, steps=4)
    expected = run(pipeline, request)
    left = pipeline.dit.weights.travelling_bytes // 2
    taken = False
    seen: list[int] = []

    def on_pass(_: Tensor | None) -> None:
        nonlocal taken
        seen.append(resident(pipeline))
        taken = len(seen) >= 2

    shortage = Shortage(
        monkeypatch, blocks, "attend", lambda _: taken and resident(pipeline) > left
    )
    assert torch.equal(run(pipeline, request, on_pass), expected)
    assert seen[:2] == [seen[0]] * 2
    assert seen[2] == seen[3] <= left
    assert seen[2] > 0, "no more than it took"
    warnings = caplog.text.count("less memory than planned")
    assert warnings == shortage.failures > 1
    assert_at_rest(pipeline)


class Cancelled(BaseException):
    pass


class Stop:
    """Called before each visit; stops the run at one of them."""

    def __init__(self, allowed: float = float("inf")):
        self.visits = 0
        self.allowed = allowed

    def __call__(self) -> None:
        self.visits += 1
        if self.visits > self.allowed:
            raise Cancelled


@pytest.mark.parametrize("budget", ["small", "roomy"])
@pytest.mark.parametrize("phase", PHASES[:2])
def test_a_run_may_be_stopped_at_every_visit(
    unseen, make_pipeline, phase: str, budget: str
) -> None:
    pipeline = make_pipeline(device=ACCELERATOR)
    encoders, dit = pipeline.text_encoders.weights, pipeline.dit.weights
    request = replace(REQUEST, steps=1)
    if budget == "small":
        for component in (pipeline.dit, pipeline.text_encoders):
            keep = component.patcher.load
            component.patcher.load = lambda working, weight_cap, keep=keep: keep(working, 0)
    else:
        pipeline = replace(pipeline, budget_bytes=ROOMY)
    expected = run(pipeline, request)
    assert bool(encoders.resident_bytes and dit.resident_bytes) == (budget == "roomy")
    texts = len(encoders.blocks)
    passes = len(dit.once) + len(dit.blocks)
    remembered = pipeline.text_encoders._remembered
    for stop in range(texts if phase == "text encoders" else passes):
        if phase == "text encoders":
            remembered.clear()
        pipeline.dit.last_conditions.forget()
        stopper = Stop(stop)
        with pytest.raises(Cancelled):
            run(pipeline, request, before_block=stopper)
        assert stopper.visits == stop + 1
        assert_at_rest(pipeline)
        if stop % 8 == 5:
            assert torch.equal(run(pipeline, request), expected)
    remembered.clear()
    pipeline.dit.last_conditions.forget()
    assert torch.equal(run(pipeline, request, before_block=(every := Stop())), expected)
    assert every.visits == texts + passes
    assert_at_rest(pipeline)


def test_a_decode_may_be_stopped_at_every_band(make_pipeline) -> None:
    pipeline = make_pipeline(device=ACCELERATOR)
    latents = torch.randn(2, 16, 2, 4, generator=torch.Generator().manual_seed(1))
    bands = plan_decode(2, 4, pipeline.vae.dtype.itemsize, 0)
    with torch.inference_mode():
        expected, moved = pipeline.vae.decode(latents, every := Stop(), bands)
        assert every.visits > 60
        assert moved == pipeline.vae.weights.blocks[0].nbytes
        for stop in range(0, every.visits, 5):
            with pytest.raises(Cancelled):
                pipeline.vae.decode(latents, Stop(stop), bands)
            assert_at_rest(pipeline)
        assert torch.equal(pipeline.vae.decode(latents, None, bands)[0], expected)


def test_two_pipelines_share_a_transformer(make_pipeline) -> None:
    one = make_pipeline(device=ACCELERATOR)
    expected = run(one)
    small = replace(make_pipeline(device=ACCELERATOR), dit=one.dit)
    small = replace(small, budget_bytes=streaming_budget(one))
    roomy = replace(one, budget_bytes=ROOMY)
    home = homes(one.dit.weights)
    for _ in range(3):
        for pipeline in (roomy, small):
            assert torch.equal(run(pipeline), expected)
            assert_at_rest(one)
            assert_at_rest(small)
            assert resident(pipeline) <= pipeline.budget_bytes
    assert homes(one.dit.weights) == home


def count_tensors() -> Counter:
    gc.collect()
    found: Counter = Counter()
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter):
            found[(tuple(thing.shape), thing.dtype)] += 1
    return found


def test_many_runs_with_changing_budgets_leave_as_much_as_one(make_pipeline) -> None:
    first = make_pipeline(device=ACCELERATOR)
    expected = run(first)
    home = [homes(c.weights) for c in first.components]
    sizes = [(32, 48), (64, 16), (48, 48)]
    jobs = [Workload(*size, batch_size=2) for size in sizes]
    small = max(streaming_budget(first, job=job) for job in jobs)
    budgets = [ROOMY, small, int(1.2 * small), small + 10**6]
    kept: list[dict[str, int]] = []
    tensors: list[Counter] = []
    for turn in range(12):
        pipeline = replace(first, budget_bytes=budgets[turn % 4])
        width, height = sizes[turn % 3]
        request = replace(REQUEST, width=width, height=height, batch_size=1 + turn % 2, seed=turn)
        run(pipeline, request)
        assert resident(pipeline) <= budgets[turn % 4]
        pipeline = replace(first, budget_bytes=budgets[0])
        if turn in (3, 11):  # after every budget
            first.text_encoders._remembered.clear()
            assert torch.equal(run(pipeline), expected)
            kept.append({type(c).__name__: c.weights.resident_bytes for c in first.components})
            tensors.append(count_tensors())
    assert [homes(c.weights) for c in first.components] == home
    assert kept[0] == kept[1]
    assert tensors[0] == tensors[1]
    assert_at_rest(first)


def test_a_shortage_never_costs_more_than_the_weights(unseen, make_pipeline, monkeypatch) -> None:
    """However often memory is short, a run of `attempt` ends: every relief frees something."""
    pipeline = make_pipeline(device=ACCELERATOR, budget_bytes=ROOMY)
    run(pipeline)
    freed: list[int] = []
    release = OffloadedModule.release

    def watched(weights: OffloadedModule, size: float) -> int:
        freed.append(release(weights, size))
        return freed[-1]

    monkeypatch.setattr(OffloadedModule, "release", watched)
    shortage = Shortage(monkeypatch, blocks, "attend", lambda _: True)
    everything = len(pipeline.dit.weights.travelling)
    with pytest.raises(BudgetError):
        run(pipeline)
    assert shortage.calls <= everything + 3
