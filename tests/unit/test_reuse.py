"""Steps that are reused: which, what they give, and what moves for them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RecordingPatcher
from control_nets import FILES, LITE, control_net_tensors, picture, randn, transformer_tensors
from torch import Tensor

from majicflux.benchmarks.random_models import CLIP, T5
from majicflux.engine.errors import ReusedStepError, ReuseWithHeunError
from majicflux.engine.flux.controlnet import Control, ControlNet
from majicflux.engine.flux.reuse import REUSES, Reuse
from majicflux.engine.flux.step_cache import FOLLOWED, Course, StepCache
from majicflux.engine.flux.text_encoders import TextEmbedding
from majicflux.engine.flux.transformer import DiT, sized_flux_dit
from majicflux.engine.flux.velocity import Pass, TokenSequence
from majicflux.engine.offload import offloaded_module, prefetch
from majicflux.engine.offload.chunking import Chunking
from majicflux.engine.offload.prefetch import PrefetchRing
from majicflux.engine.offload.transfers import PlainTransfers
from majicflux.engine.offload.weight_block import WeightBlock
from majicflux.engine.quant.compute import ComputePrecision
from majicflux.engine.quant.formats import FLOAT32, uniform
from majicflux.engine.run.pipeline import Pipeline, denoise
from majicflux.engine.run.report import Report
from majicflux.engine.run.request import GenerationRequest
from majicflux.engine.sampling.schedules import diffsynth_sigmas, some_steps
from majicflux.engine.sampling.solvers import SOLVERS
from majicflux.loaders.controlnet import load_control_net
from majicflux.loaders.flux_dit import load_flux_dit

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, ACCELERATOR = torch.device("cpu"), torch.device("cpu", 0)  # another to PyTorch's comparisons
PROMPT = TextEmbedding(randn(1, 17, T5.width), randn(1, CLIP.width))
GUIDANCE = 3.5
SMALL = replace(LITE, double_blocks=2, single_blocks=2)
DECIDING = Reuse(threshold=0.8, in_a_row=2)  # of ten steps some are reused, and some are not


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("reuse")
    for name, geometry in (("small", SMALL), ("lite", LITE)):
        save_file(transformer_tensors(geometry), folder / f"{name}.safetensors")
    net = control_net_tensors(FILES["Union-Pro 2.0"])
    save_file(net, folder / "net.safetensors")
    return folder


@pytest.fixture
def make(folder: Path) -> Callable[..., Pipeline]:
    """A pipeline of a transformer alone, in float32."""

    def made(
        device: torch.device = CPU, budget_bytes: int | None = None, name: str = "small"
    ) -> Pipeline:
        weights, geometry = load_flux_dit(folder / f"{name}.safetensors", uniform(FLOAT32))
        patcher = RecordingPatcher(weights, device)
        dit = DiT(weights, patcher, geometry, uniform(FLOAT32))
        return Pipeline(dit, None, None, budget_bytes, ComputePrecision(torch.float32))

    return made


def request(reuse: Reuse | None, steps: int = 10, **changes: Any) -> GenerationRequest:
    given = GenerationRequest(PROMPT, 0, steps, GUIDANCE, width=64, height=48, reuse=reuse)
    return replace(given, **changes)


def painted(
    pipeline: Pipeline, asked: GenerationRequest, before_block: Callable[[], None] = lambda: None
) -> tuple[Tensor, Report]:
    return denoise(pipeline, asked, lambda _: None, before_block)


def reused(report: Report) -> tuple[int, ...]:
    found = report.stages[-1].reuse
    assert found is not None
    return found.reused


# Which steps


@pytest.mark.parametrize(
    ("steps", "first"), [(3, 3), (5, 5), (6, 4), (20, 4), (28, 6), (50, 10), (100, 20)]
)
def test_the_first_steps_and_the_last_are_computed(steps: int, first: int) -> None:
    """A fifth of them, and four at least."""
    decisions = Reuse(threshold=1.0, in_a_row=2).decisions(steps)
    open_ones = [number for number, computed in enumerate(decisions) if computed is None]
    assert open_ones == [*range(first, steps - 1)]


def test_chosen_steps_are_those_and_no_others() -> None:
    assert Reuse(chosen=(1, 4)).decisions(5) == [True, False, True, True, False]
    for wrong in (0, 5, 70):
        with pytest.raises(ReusedStepError, match=f"Step {wrong} cannot be reused in a run of 5"):
            Reuse(chosen=(wrong,)).decisions(5)


def test_a_step_that_is_not_in_the_run_is_refused_before_it_begins() -> None:
    whole = request(Reuse(chosen=(9,)))
    with pytest.raises(ReusedStepError, match="Step 9 cannot be reused in a run of 8"):
        replace(whole, schedule=some_steps(diffsynth_sigmas, 0, 8))
    with pytest.raises(ReusedStepError):
        request(Reuse(chosen=(9,)), steps=9)


def test_the_time_of_chosen_steps_is_known_beforehand() -> None:
    """That of the first of two blocks; where it is not known, a step is thought to be computed."""
    assert Course([True, False, None, True], [[[], []]] * 4).seconds([2, 2, 2, 4]) == 9


def test_heun_is_refused() -> None:
    with pytest.raises(ReuseWithHeunError, match="two passes"):
        request(REUSES["mild"], solver=SOLVERS["heun"])


class Scripted:
    """A transformer of two blocks, which add what a script says to every token, and the cache in
    front of it. found: by the first block, of each pass and picture."""

    def __init__(self, reuse: Reuse, found: Sequence[Sequence[float]], prompts: int = 1):
        self.reuse, self.found, self.prompts = reuse, found, prompts
        self.course = Course(reuse.decisions(len(found)), [[[], []]] * len(found))
        ring = PrefetchRing([], CPU, 0)
        self.cache = StepCache(self._blocks, reuse, self.course, ring, on_host=False)
        self.results = [self._run(number) for number in range(len(found))]

    def _run(self, number: int) -> Tensor:
        """The first token of the positive prompt, of each picture."""
        self.number = number
        x = torch.zeros(self.prompts, len(self.found[0]), 16, 4)
        sequences = [TokenSequence(of_prompt, 0, 16, x) for of_prompt in x]
        running = Pass(x, torch.tensor(1 - number / 10), sequences, [])
        for _ in self.cache(None, running, Chunking()):
            pass
        return sequences[0].x[:, 0, 0]

    def _blocks(self, dit: Any, running: Pass, chunking: Chunking) -> Iterator[None]:
        for place, sequence in enumerate(running.sequences):
            for image, found in zip(sequence.x, self.found[self.number], strict=True):
                image += found if place == 0 else 100 * self.number  # the negative is restless
        yield
        for sequence in running.sequences:
            sequence.x.add_(10 * (1 - self.number / 10))
        yield


STILL = [1.0]


def test_no_more_in_a_row_than_are_allowed() -> None:
    for most in (1, 2, 3):
        found = Scripted(Reuse(threshold=0.1, in_a_row=most), [STILL] * 12).course.reused
        expected = [n for n in range(4, 11) if (n - 4) % (most + 1) < most]
        assert found == tuple(expected)


def test_distance_is_from_the_last_computed_step() -> None:
    """So that many small changes count."""
    growing = [[1 + 0.05 * n] for n in range(12)]
    assert Scripted(Reuse(0.1, 9), growing).course.reused == (4, 5, 7, 8, 10)


def test_a_batch_is_reused_only_where_every_picture_would_be() -> None:
    jumps = [[1.0, 1.0 + (n in (6, 7))] for n in range(9)]
    assert Scripted(Reuse(0.1, 1), jumps).course.reused == (4, 7)
    assert Scripted(Reuse(0.1, 1), [each[:1] for each in jumps]).course.reused == (4, 6)


def test_the_positive_prompt_decides() -> None:
    assert Scripted(Reuse(0.1, 1), [STILL] * 8, prompts=2).course.reused == (4, 6)


def test_reused_steps_go_on_along_the_line() -> None:
    """By the distance of noise levels; the script's second block is on a line already."""
    run = Scripted(Reuse(chosen=(3, 4)), [STILL] * 6)
    held = 1 + 10 * 0.8
    followed = [held - FOLLOWED * beyond for beyond in (1, 2)]
    assert torch.stack(run.results[3:5]).flatten().tolist() == pytest.approx(followed)
    first = Scripted(Reuse(chosen=(1,)), [STILL] * 3)  # no line before there are two
    assert first.results[1].item() == pytest.approx(11)


# What they give


def test_nothing_reused_is_off_bit_for_bit(make) -> None:
    expected, _ = painted(make(), request(None))
    for nothing in (Reuse(chosen=()), Reuse(threshold=0.0, in_a_row=2)):
        found, report = painted(make(), request(nothing))
        assert torch.equal(found, expected)
        assert reused(report) == ()


def diffsynths(pipeline: Pipeline) -> Any:
    """Its own transformer, with the same weights."""
    from diffsynth.models.flux_dit import FluxJointTransformerBlock, FluxSingleTransformerBlock

    theirs = sized_flux_dit(SMALL, FluxJointTransformerBlock, FluxSingleTransformerBlock)
    theirs.load_state_dict(pipeline.dit.weights.module.state_dict(), assign=True)
    return theirs.eval()


def by_hand(dit: Any, asked: GenerationRequest, reuse: Reuse) -> tuple[Tensor, list[int]]:
    """Euler with first-block caching on DiffSynth's blocks, without anything of ours."""
    inputs = asked.sampler_inputs(None)
    latents, text = inputs.known(inputs.sigmas[0]), dit.context_embedder(PROMPT.tokens)
    ids = torch.cat([torch.zeros(1, text.shape[1], 3), dit.prepare_image_ids(latents).float()], 1)
    rope, (rows, columns) = dit.pos_embedder(ids), latents.shape[2:]
    computed: list[tuple[float, Tensor, Tensor]] = []  # sigma, what the first and the others added
    skipped: list[int] = []
    for number, (sigma, following) in enumerate(pairwise(inputs.sigmas.tolist())):
        conditioning = (
            dit.time_embedder(torch.tensor([1000 * sigma]), torch.float32)
            + dit.pooled_text_embedder(PROMPT.pooled)
            + dit.guidance_embedder(torch.tensor([1000 * GUIDANCE]), torch.float32)
        )
        before = dit.x_embedder(dit.patchify(latents))
        image, words = dit.blocks[0](before, text, conditioning, rope)
        first = (image - before)[:, ::8]
        in_a_row = number - 1 - max((n for n in range(number) if n not in skipped), default=-1)
        near = False
        if 4 <= number < asked.steps - 1 and in_a_row < reuse.in_a_row:
            last = computed[-1][1]
            near = ((first - last).abs().mean() / last.abs().mean()).item() < reuse.threshold
        if near:
            skipped.append(number)
            (older, _, added_before), (newer, _, added) = computed[-2:]
            along = FOLLOWED * (sigma - newer) / (newer - older)
            image = image + added + along * (added - added_before)
        else:
            start = image
            for block in dit.blocks[1:]:
                image, words = block(image, words, conditioning, rope)
            both = torch.cat([words, image], dim=1)
            for block in dit.single_blocks:
                both, words = block(both, words, conditioning, rope)
            image = both[:, text.shape[1] :]
            computed.append((sigma, first, image - start))
        out = dit.final_proj_out(dit.final_norm_out(image, conditioning))
        latents = latents + dit.unpatchify(out, rows, columns) * (following - sigma)
    return latents, skipped


@pytest.mark.parametrize("threshold", [0.75, 1.0])
def test_the_arithmetic_is_that_of_first_block_caching(make, threshold: float) -> None:
    reuse = replace(DECIDING, threshold=threshold)
    pipeline = make()
    with torch.no_grad():
        expected, skipped = by_hand(diffsynths(pipeline), request(None), reuse)
        whole, _ = by_hand(diffsynths(pipeline), request(None), Reuse())
    found, report = painted(pipeline, request(reuse))
    assert [*reused(report)] == skipped
    assert skipped
    apart = (found - expected).norm()
    assert apart < 1e-4 * expected.norm()
    assert apart < 0.01 * (whole - expected).norm(), "what is reused makes a difference"


@pytest.mark.parametrize("solver", ["euler", "deis_2m"])
@pytest.mark.parametrize("more", [{}, {"batch_size": 2, "cfg": 2.0, "negative": PROMPT}])
def test_the_chosen_steps_of_a_report_paint_the_same(make, solver: str, more: dict) -> None:
    asked = request(DECIDING, solver=SOLVERS[solver], **more)
    expected, report = painted(make(), asked)
    assert reused(report)
    found, _ = painted(make(), replace(asked, reuse=Reuse(chosen=reused(report))))
    assert torch.equal(found, expected)


def test_image_to_image_counts_from_its_first_step(make) -> None:
    latents = randn(1, 16, 6, 8)
    asked = request(Reuse(threshold=9.0, in_a_row=2), latents=latents, strength=0.5)
    _, report = painted(make(), asked)
    assert reused(report) == (4, 5, 7, 8)


def test_a_run_leaves_nothing_to_the_next(make) -> None:
    pipeline = make()
    expected, before = painted(pipeline, request(DECIDING))
    painted(pipeline, request(DECIDING, seed=5))
    found, after = painted(pipeline, request(DECIDING))
    assert torch.equal(found, expected)
    assert reused(after) == reused(before)


# What moves


class Watched(PlainTransfers):
    """Notes what is copied."""

    def __init__(self) -> None:
        self.copied: list[Tensor] = []

    def copy(self, host_buffer: Tensor, place: Tensor, after: Sequence[Any]) -> None:
        self.copied.append(host_buffer)
        super().copy(host_buffer, place, after)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[Watched, list[WeightBlock]]:
    """What is copied for visits, and the blocks that are entered."""
    transfers, entered, enter = Watched(), [], PrefetchRing.enter

    def noted(ring: PrefetchRing, block: WeightBlock) -> None:
        if block.visitors == 0:
            entered.append(block)
        enter(ring, block)

    monkeypatch.setattr(prefetch, "transfers_to", lambda *_: transfers)
    monkeypatch.setattr(offloaded_module, "transfers_to", lambda *_: PlainTransfers())
    monkeypatch.setattr(PrefetchRing, "enter", noted)
    return transfers, entered


@pytest.mark.parametrize("reuse", [DECIDING, Reuse(chosen=(2, 3, 5, 8))])
@pytest.mark.parametrize("share", [0, 1, 4])
def test_streamed_is_resident_and_only_the_first_block_moves(
    make, watched, reuse: Reuse, share: int
) -> None:
    asked = request(reuse)
    resident = make(device=ACCELERATOR)
    expected, report = painted(resident, asked)
    transfers, entered = watched
    assert not transfers.copied
    smallest = resident.plan(asked.workload, [resident.denoise_with((), reuse)]).smallest_bytes
    blocks = sum(block.nbytes for block in resident.dit.weights.blocks)
    streamed = make(device=ACCELERATOR, budget_bytes=smallest + share * blocks // 8)
    entered.clear()
    found, of_streamed = painted(streamed, asked)
    assert torch.equal(found, expected)
    assert reused(of_streamed) == reused(report)
    assert reused(report)

    weights = streamed.dit.weights
    visiting = [block for block in entered if not block.resident]
    copied = [block.data_ptr() for block in transfers.copied]
    assert copied == [block.host_buffer.data_ptr() for block in visiting], "in turn, each once"
    first = weights.blocks[: len(weights.module.blocks[0].weight_blocks())]
    passing = [block for block in entered if block in weights.blocks]
    computed = asked.steps - len(reused(report))
    assert passing.count(weights.blocks[-1]) == computed
    assert all(passing.count(block) == asked.steps for block in first)
    others = [block for block in weights.blocks if block not in first and not block.resident]
    unmoved = of_streamed.stages[-1].reuse.unmoved_bytes
    assert unmoved == len(reused(report)) * sum(block.nbytes for block in others) > 0
    assert report.stages[-1].reuse.unmoved_bytes == 0


def test_what_is_kept_waits_on_the_host_where_the_budget_is_small(make) -> None:
    asked = request(DECIDING, batch_size=4)
    expected, _ = painted(make(device=ACCELERATOR), asked)
    stage = make().denoise_with((), DECIDING)
    workload = replace(asked.workload, text_tokens=PROMPT.tokens.shape[1])
    whole = stage.plan(workload, None)
    on_card = stage.plan(workload, whole.smallest)
    assert not on_card.kept_on_host
    on_host = stage.plan(workload, whole.smallest - 1)
    assert on_host.kept_on_host
    assert on_host.smallest < whole.smallest
    found, report = painted(make(device=ACCELERATOR, budget_bytes=on_host.smallest), asked)
    assert torch.equal(found, expected)
    assert reused(report)


def test_a_cancel_in_a_reused_step_stops_there(make) -> None:
    pipeline = make()
    begun = passes = 0

    class Cancelled(Exception):
        pass

    def before_block() -> None:
        nonlocal begun
        begun += 1
        if passes == 4:  # the step behind them is reused
            raise Cancelled

    def on_pass(_: Tensor) -> None:
        nonlocal passes
        passes += 1

    asked = request(Reuse(chosen=(4,)))
    with pytest.raises(Cancelled):
        denoise(pipeline, asked, on_pass, before_block)
    weights = pipeline.dit.weights
    assert begun == len(weights.once) + 4 * len(weights.blocks) + 1
    assert passes == 4
    begun, passes = 0, 10
    denoise(pipeline, asked, on_pass, lambda: None)
    assert passes == 10 + asked.steps, "each is reported, reused or not"


# Beside control nets


def control(folder: Path, **options: Any) -> Control:
    weights, geometry = load_control_net(folder / "net.safetensors", uniform(FLOAT32))
    net = ControlNet(weights, RecordingPatcher(weights), geometry, uniform(FLOAT32))
    return Control(net, picture(48, 64), **options)


def with_control(pipeline: Pipeline, shown: Control, reuse: Reuse) -> tuple[Tensor, Report]:
    asked = request(reuse, controls=(shown,))
    stage = pipeline.denoise_with(asked.acting, reuse)
    run = pipeline.start(asked.workload, [stage], lambda: None)
    given = (asked.sampler_inputs(None), [PROMPT], GUIDANCE, lambda _: None)
    with torch.inference_mode():
        return stage.run(run, *given, hints=[randn(1, 16, 6, 8)]), run.report


def test_a_control_net_is_left_out_with_the_blocks_that_it_tells(make, folder, watched) -> None:
    _, entered = watched
    shown, chosen = control(folder), (4, 5, 7)
    with_control(make(name="lite"), shown, Reuse(chosen=chosen))
    net = shown.net
    visits = net.visits([0]), net.visits([1])
    for each, expected in zip(visits, (10, 10 - len(chosen)), strict=True):
        assert all(entered.count(block) == expected for block in each)


def test_two_steps_are_computed_from_where_a_control_begins_or_ends(make, folder) -> None:
    """A line through one step with it and one without would lead astray."""
    always = Reuse(threshold=1e9, in_a_row=99)
    _, report = with_control(make(name="lite"), control(folder), always)
    assert reused(report) == (4, 5, 6, 7, 8)
    shown = control(folder, end=0.75)
    levels = request(None).sigmas[:-1].tolist()
    ends = next(n for n, level in enumerate(levels) if not shown.acts_at(level))
    assert 4 < ends < 9
    _, report = with_control(make(name="lite"), shown, always)
    assert reused(report) == tuple(n for n in range(4, 9) if n not in (ends, ends + 1))
