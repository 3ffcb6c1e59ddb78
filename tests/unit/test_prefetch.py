"""Visiting weights on a card that copies and computes late, which a CPU does not."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from majicflux.engine.flux.conditioning import conditions_of
from majicflux.engine.flux.text_encoders import TextEmbedding
from majicflux.engine.flux.transformer import DiT
from majicflux.engine.flux.velocity import flux_velocity
from majicflux.engine.offload import prefetch
from majicflux.engine.offload.offloaded_module import OffloadedModule, onloaded
from majicflux.engine.offload.weight_block import WeightBlock
from majicflux.engine.quant.compute import ComputePrecision
from majicflux.engine.run.pipeline import paint
from majicflux.engine.run.request import GenerationRequest
from majicflux.engine.sampling.inputs import SamplerInputs
from majicflux.engine.sampling.loop import sample
from majicflux.engine.sampling.schedules import diffsynth_sigmas

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")

ACCELERATOR = torch.device("cpu", 0)  # another device than `cpu` to PyTorch's comparisons
WIDTH = 4
POISON = 0x7F  # four of them are a float32 of 3.4e38


@dataclass
class Copy:
    host_buffer: Tensor
    place: Tensor
    after: list[int]
    begun: bool = False


@dataclass
class LateCard:
    """Simulates the queues of a card; a `Transfers`.

    Copies happen one after the other, in the order in which they were asked for, and as late as
    they may: when a computation waits for them, or, with `chance`, at any moment before. A copy
    that has begun leaves poison until it is finished. Computations run late too: what they read
    must still be there when the card says that they are over, which is when a copy has to wait for
    them, or, with `chance`, sooner.
    """

    chance: float = 0.0
    seed: int = 0
    copies: int = 0
    copied_bytes: int = 0
    closed: bool = False
    fail_at_copy: int = -1

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.waiting: list[Copy] = []
        self.running: list[tuple[int, Tensor, Tensor]] = []  # when launched, what it reads and read
        self.launched = 0
        self.over = 0  # computations that were launched before this moment

    def launch(self, *read: Tensor) -> None:
        """A computation reads these from now until it is over."""
        self._time_passes()
        self.launched += 1
        self.running += [(self.launched, x, x.clone()) for x in read]

    def copy(self, home: Tensor, place: Tensor, after: Sequence[int]) -> Copy:
        assert not self.closed
        if self.copies == self.fail_at_copy:
            self.fail_at_copy = -1
            raise Trouble("copy")
        assert home.shape == place.shape
        assert home.is_contiguous()
        assert place.is_contiguous()
        self.waiting.append(asked := Copy(home, place, [*after]))
        self.copies += 1
        self.copied_bytes += home.nbytes
        self._time_passes()
        return asked

    def wait(self, copied: Copy) -> None:
        self._time_passes()
        while any(one is copied for one in self.waiting):
            self._copy_something()

    def computed(self) -> int:
        self._time_passes()
        return self.launched

    def close(self) -> None:
        while self.waiting and self.random.random() < 0.5:  # finish or drop
            self._copy_something()
        self._compute_until(self.launched)
        self.waiting.clear()
        self.closed = True

    def _time_passes(self) -> None:
        while self.random.random() < self.chance:
            if self.waiting and self.random.random() < 0.7:
                self._copy_something()
            else:
                self._compute_until(self.over + 1)

    def _copy_something(self) -> None:
        one = self.waiting[0]
        if one.begun:
            one.place.copy_(one.host_buffer)
            self.waiting.pop(0)
        else:
            self._compute_until(max(one.after, default=0))
            one.place.fill_(POISON)
            one.begun = True

    def _compute_until(self, event: int) -> None:
        for launched, now, then in self.running:
            if launched <= event:
                assert torch.equal(now, then), "overwritten while it was computed with"
        self.running = [one for one in self.running if one[0] > event]
        self.over = max(self.over, event)


class Trouble(BaseException):  # as a KeyboardInterrupt: no hook of a module sees it
    pass


class Layer(nn.Module):
    """Adds its weights to x one after the other, so that every byte of them matters."""

    def __init__(self, rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, WIDTH), requires_grad=False)
        self.card: LateCard | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.card is not None:
            self.card.launch(self.weight)
        return x * 0.5 + self.weight.cumsum(0)[-1]


def layers_of(rows: Sequence[int], once: Sequence[int] = (), seed: int = 0) -> OffloadedModule:
    """Layers of so many rows, a block each, and one in the root."""
    with torch.device("meta"):
        passes, early = ([Layer(r) for r in some] for some in (rows, once))
        parts = {"passes": nn.ModuleList(passes), "once": nn.ModuleList(early), "root": Layer(3)}
    module = nn.ModuleDict(parts)
    weights = OffloadedModule(module, [[x] for x in passes], [[x] for x in early]).allocate()
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return weights


def layer_sequence(weights: OffloadedModule) -> list[Layer]:
    """The layers of a pass, then those that run once."""
    return [*weights.module["passes"], *weights.module["once"]]


def computed(weights: OffloadedModule, order: Sequence[int], card: LateCard | None) -> Tensor:
    """What the layers of that order make of ones, between two calls of the root."""
    layers = layer_sequence(weights)
    for layer in (*layers, weights.module["root"]):
        layer.card = card
    x = weights.module["root"](torch.ones(1, WIDTH))
    for index in order:
        with onloaded(layers[index]):
            x = layers[index](x)
            if index % 3 == 0:
                x = layers[index](x)
    return weights.module["root"](x)


def assert_at_rest(*components: OffloadedModule) -> None:
    """Every block is at home or resident, and nothing of a run hangs on to it."""
    for weights in components:
        for block in weights.all_blocks:
            assert block.visitors == 0
            assert block.host_buffer is not None
            homes = {block.host_buffer.untyped_storage().data_ptr()}
            at = {getattr(v.owner, v.name).untyped_storage().data_ptr() for v in block._views}
            assert at.isdisjoint(homes) if block.resident and at else at <= homes
        for module in weights.module.modules():
            assert "visit" not in module.__dict__
            assert getattr(module, "product", None) is None
        for modules in weights._modules:
            for module in modules:
                assert not module._forward_pre_hooks
                assert not module._forward_hooks


def visits(rng: random.Random, blocks: int, once: int, passes: int, mischief: float) -> list[int]:
    """The order of a run, with some visits left out, repeated, or out of turn."""
    order = [*range(blocks, blocks + once), *list(range(blocks)) * passes]
    found: list[int] = []
    for index in order:
        what = rng.random() / mischief if mischief else 4.0
        if what < 1:
            found.append(rng.randrange(blocks + once))
        elif what < 2:
            continue
        elif what < 3:
            found.append(index)
        found.append(index)
    return found


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("mischief", [0.0, 0.1, 0.3])
def test_late_copies_and_computations_never_meet(chance: float, mischief: float) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        blocks, once, passes = rng.randint(1, 9), rng.randint(0, 3), rng.randint(1, 4)
        rows = [rng.choice([1, 5, 16, 40, 64, 200]) for _ in range(blocks + once)]
        weights = layers_of(rows[:blocks], rows[blocks:], seed)
        order = visits(rng, blocks, once, passes, mischief)
        expected = computed(weights, order, None)
        weights.keep_resident(ACCELERATOR, rng.choice([0, 0, 0.3, 0.7]) * weights.total_bytes)
        ring = weights.largest_bytes + rng.choice([0, 0, rng.randrange(8 * weights.largest_bytes)])
        ring = rng.choice([ring, 0])
        card = LateCard(chance, seed)
        with weights.running_on(ACCELERATOR, None, passes, ring, transfers=card) as stream:
            found = computed(weights, order, card)
            assert torch.equal(found, expected), seed
        moved = 0 if weights.root.resident else weights.root.nbytes
        assert stream.moved_bytes == moved + card.copied_bytes
        assert card.closed
        assert_at_rest(weights)


@pytest.mark.parametrize("chance", [0.0, 0.6])
def test_residents_may_leave_in_the_middle_of_a_run(chance: float) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        weights = layers_of([rng.choice([5, 16, 64]) for _ in range(8)], [40, 7], seed)
        order = [8, 9, *list(range(8)) * 3]
        expected = computed(weights, order, None)
        weights.keep_resident(ACCELERATOR, rng.uniform(0.3, 1) * weights.total_bytes)
        card = LateCard(chance, seed)
        when = set(rng.sample(range(len(order)), 5))
        count = 0

        def before_block(weights=weights, when=when, rng=rng) -> None:
            nonlocal count
            if count in when:
                weights.release(rng.choice([1, 1000, float("inf")]))
            count += 1

        with weights.running_on(ACCELERATOR, before_block, 3, transfers=card):
            assert torch.equal(computed(weights, order, card), expected), seed
        assert count == len(order)
        assert_at_rest(weights)


Event = tuple[str, int]  # ("copy" or "compute", number of the block)


def watched_run(
    ring_blocks: float, passes: int = 2, rows: Sequence[int] = (16,) * 5
) -> list[Event]:
    """What happens in a run with a ring of so many times the largest block."""
    weights = layers_of(rows)
    numbers = {block.host_buffer: number for number, block in enumerate(weights.blocks)}
    log: list[Event] = []

    class Watched(LateCard):
        def copy(self, home: Tensor, place: Tensor, after: Sequence[int]) -> Copy:
            log.append(("copy", numbers[home]))
            return super().copy(home, place, after)

    ring = int(ring_blocks * weights.largest_bytes)
    with weights.running_on(ACCELERATOR, None, passes, ring, transfers=Watched()):
        for number, layer in enumerate(layer_sequence(weights)):
            layer.register_forward_pre_hook(
                lambda *_, number=number: log.append(("compute", number))
            )
        for _ in range(passes):
            for layer in layer_sequence(weights):
                layer(torch.ones(1, WIDTH))
    return log


def only(what: str, log: Sequence[Event]) -> list[int]:
    return [number for event, number in log if event == what]


def test_the_next_blocks_are_asked_for_while_one_computes() -> None:
    turn = [0, 1, 2, 3, 4] * 2
    for ring_blocks in (1, 2, 3, 4, 5):
        log = watched_run(ring_blocks)
        assert only("compute", log) == turn
        assert only("copy", log) == turn, "each once a pass"
        starts = [place for place, (what, _) in enumerate(log) if what == "compute"]
        for done, start in enumerate(starts):
            asked = len(only("copy", log[:start]))
            # A block of the ring's own has left only when it has computed.
            assert asked == min(len(turn), done + ring_blocks), (ring_blocks, done)


@pytest.mark.parametrize("ring_blocks", [1, 1.7, 2, 2.3, 3, 6])
def test_blocks_of_any_size_are_copied_once_a_pass(ring_blocks: float) -> None:
    log = watched_run(ring_blocks, 3, (16, 64, 5, 200, 180, 40))
    assert only("copy", log) == only("compute", log) == [0, 1, 2, 3, 4, 5] * 3


def test_the_end_of_a_pass_asks_for_the_beginning_of_the_next() -> None:
    log = watched_run(3)
    last = log.index(("compute", 4))
    assert log[last - 3 : last + 2] == [
        ("copy", 0),
        ("compute", 3),
        ("copy", 1),
        ("compute", 4),
        ("copy", 2),
    ]


def test_nothing_is_copied_that_no_pass_needs_any_more() -> None:
    assert only("copy", watched_run(10, passes=1)) == [0, 1, 2, 3, 4]


def test_the_first_copy_waits_for_who_had_the_memory_before() -> None:
    weights = layers_of([16] * 3)
    card = LateCard()
    card.launch(torch.zeros(3))
    first: list[list[int]] = []
    copy = card.copy

    def watched(home: Tensor, place: Tensor, after: Sequence[int]) -> Copy:
        first.append([*after])
        return copy(home, place, after)

    card.copy = watched  # pyright: ignore[reportAttributeAccessIssue]
    with weights.running_on(ACCELERATOR, transfers=card):
        computed(weights, [0, 1, 2], card)
    assert first[0]
    assert first[0][0] >= 1


def test_what_is_resident_or_at_home_on_the_device_is_not_moved() -> None:
    weights = layers_of([16, 40, 16], [64])
    weights.keep_resident(ACCELERATOR, float("inf"))
    with weights.running_on(ACCELERATOR, transfers=(card := LateCard())) as stream:
        computed(weights, [3, 0, 1, 2], card)
    assert (stream.moved_bytes, card.copies) == (0, 0)
    weights.release(float("inf"))
    device = torch.device("cpu")
    with weights.running_on(device, transfers=(card := LateCard())) as stream:
        computed(weights, [3, 0, 1, 2], card)
    assert (stream.moved_bytes, card.copies) == (0, 0)


@pytest.mark.parametrize("ring_blocks", [1, 2, 3.5, 20])
def test_moved_bytes_are_exact(ring_blocks: float) -> None:
    weights = layers_of([16, 200, 5, 64, 64], [40, 16])
    order, passes = [5, 6, *[0, 1, 2, 3, 4] * 3], 3
    ring = int(ring_blocks * weights.largest_bytes)
    for share in (0.0, 0.4, 0.8):
        weights.keep_resident(ACCELERATOR, share * weights.total_bytes)
        card = LateCard()
        with weights.running_on(ACCELERATOR, None, passes, ring, transfers=card) as stream:
            computed(weights, order, card)
        away = [b for b in weights.all_blocks if not b.resident]
        often = {b: passes if b in weights.blocks else 1 for b in away}
        assert stream.moved_bytes == sum(often[b] * b.nbytes for b in away), share


def test_a_block_that_is_larger_than_the_ring_is_refused() -> None:
    weights = layers_of([16, 64, 16])
    ring = weights.largest_bytes - 1
    expected = computed(weights, [0, 2, 1], None)
    card = LateCard()
    said = rf"a block of {weights.largest_bytes} bytes does not fit into a ring of {ring}"
    with (
        pytest.raises(RuntimeError, match=said),
        weights.running_on(ACCELERATOR, None, 1, ring, transfers=card),
    ):
        computed(weights, [0, 2, 1], card)
    assert_at_rest(weights)
    with weights.running_on(ACCELERATOR, None, 1, ring + 1, transfers=(card := LateCard())):
        assert torch.equal(computed(weights, [0, 2, 1], card), expected)


def fails_at(weights: OffloadedModule, arrange: Callable[[LateCard], dict[str, object]]) -> bool:
    """Whether a run fails; it leaves nothing behind, and the next one works."""
    order = [4, *[0, 1, 2, 3] * 2]
    expected = computed(weights, order, None)
    card = LateCard(0.3)
    options = arrange(card)
    try:
        with weights.running_on(ACCELERATOR, passes=2, transfers=card, **options):  # pyright: ignore[reportArgumentType]
            assert torch.equal(computed(weights, order, card), expected)
        failed = False
    except Trouble:
        failed = True
    assert_at_rest(weights)
    again = LateCard()
    with weights.running_on(ACCELERATOR, passes=2, transfers=again):
        assert torch.equal(computed(weights, order, again), expected)
    assert_at_rest(weights)
    return failed


@pytest.mark.parametrize("resident", [0.0, 0.5])
@pytest.mark.parametrize("what", ["copy", "wait", "before_block"])
def test_a_failure_anywhere_leaves_nothing_behind(what: str, resident: float) -> None:
    weights = layers_of([16, 40, 5, 64], [7])
    weights.keep_resident(ACCELERATOR, resident * weights.total_bytes)

    def arrange(card: LateCard, number: int) -> dict[str, object]:
        count = 0

        def counted(*_: object) -> None:
            nonlocal count
            count += 1
            if count == number + 1:
                raise Trouble(what)

        if what == "before_block":
            return {"before_block": counted}
        if what == "copy":
            card.fail_at_copy = number
            return {}
        wait = card.wait

        def waited(copied: Copy) -> None:
            counted()
            wait(copied)

        card.wait = waited  # pyright: ignore[reportAttributeAccessIssue]
        return {}

    outcomes = [fails_at(weights, lambda card, n=n: arrange(card, n)) for n in range(12)]
    least = {"before_block": 9}.get(what, 5 if resident else 9)
    assert outcomes[:4] == [True] * 4
    assert outcomes.count(True) >= min(least, 9) - 4 * bool(resident and what != "before_block")
    assert outcomes[-1] is False, "every place was tried"


def test_no_memory_for_the_ring_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = layers_of([16, 40, 5, 64], [7])

    def refuse(_: object) -> Tensor:
        monkeypatch.undo()
        raise Trouble("ring")

    def arrange(_: LateCard) -> dict[str, object]:
        monkeypatch.setattr(prefetch.PrefetchRing, "_new_ring", refuse)
        return {}

    assert fails_at(weights, arrange)


def test_no_memory_for_the_root_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = layers_of([16, 40, 5, 64], [7])

    def refuse(*_: object) -> None:
        monkeypatch.undo()
        raise Trouble("root")

    def arrange(_: LateCard) -> dict[str, object]:
        monkeypatch.setattr(WeightBlock, "stay_on", refuse)
        return {}

    assert fails_at(weights, arrange)


def test_an_end_that_fails_leaves_nothing_behind() -> None:
    """As when a card has an error that shows only once all of its work is waited for."""
    weights = layers_of([16, 40, 5, 64], [7])
    streams: list[prefetch.PrefetchRing] = []

    def arrange(card: LateCard) -> dict[str, object]:
        close = card.close

        def closed() -> None:
            close()
            raise Trouble("close")

        card.close = closed  # pyright: ignore[reportAttributeAccessIssue]
        return {}

    new = prefetch.PrefetchRing.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            prefetch.PrefetchRing, "__init__", lambda s, *a: (streams.append(s), new(s, *a))[0]
        )
        assert fails_at(weights, arrange)
    assert all(stream._ring is None and not stream._fetched for stream in streams)


def test_a_computation_that_fails_leaves_nothing_behind() -> None:
    weights = layers_of([16, 40, 5, 64], [7])
    for number in range(1, 14):

        def arrange(card: LateCard, number: int = number) -> dict[str, object]:
            launch = card.launch

            def launched(*read: Tensor) -> None:
                launch(*read)
                if card.launched == number:
                    raise Trouble("launch")

            card.launch = launched  # pyright: ignore[reportAttributeAccessIssue]
            return {}

        assert fails_at(weights, arrange), number


@pytest.mark.parametrize(("chance", "cfg"), [(0.0, 1.0), (0.7, 1.0), (0.7, 2.0)])
def test_a_late_card_paints_the_same(make_pipeline, monkeypatch, chance: float, cfg: float) -> None:
    given = {"seed": 2, "steps": 2, "guidance": 3.5, "width": 48, "height": 32, "cfg": cfg}
    request = GenerationRequest("a cat", **given)
    expected = paint(make_pipeline(device=ACCELERATOR), request, lambda *_: None, lambda: None)[1]
    cards: list[LateCard] = []

    def late(*_: object) -> LateCard:
        cards.append(LateCard(chance, len(cards)))
        return cards[-1]

    monkeypatch.setattr(prefetch, "transfers_to", late)
    pipeline = make_pipeline(device=ACCELERATOR)
    dit = pipeline.dit
    monkeypatch.setattr(dit.patcher, "load", lambda *_, **__: None)  # nothing becomes resident
    found = paint(pipeline, request, lambda *_: None, lambda: None)[1]
    assert torch.equal(found, expected)
    passes = 2  # of both prompts together
    assert cards[-2].copies == len(dit.weights.once) + passes * len(dit.weights.blocks)
    assert_at_rest(*(c.weights for c in pipeline.components))


def moved_for(dit: DiT, batch: int, steps: int, ring_blocks: int) -> int:
    """Bytes of weights that move in the denoising of a batch."""
    weights, geometry = dit.weights, dit.geometry
    text = TextEmbedding(
        torch.zeros(1, 16, geometry.text_width), torch.zeros(1, geometry.pooled_width)
    )
    task = SamplerInputs(diffsynth_sigmas(steps, 32, 32), torch.ones(batch, 16, 4, 4))
    module, computing = weights.module, ComputePrecision(torch.bfloat16)
    ring = ring_blocks * weights.largest_bytes
    with (
        torch.inference_mode(),
        weights.running_on(ACCELERATOR, None, steps, ring) as stream,
        computing.applied_to(module, ACCELERATOR),
    ):
        given = (computing.dtype, ACCELERATOR, torch.float32)
        (conditions,) = conditions_of(module, [text], 3.5, *given, task.sigmas)
        velocity = flux_velocity(module, conditions)
        sample(task, velocity, lambda _: None, *given[1:])
    return stream.moved_bytes


def test_a_batch_moves_no_more_weights_than_one_picture(make_pipeline) -> None:
    dit = make_pipeline().dit
    weights, steps = dit.weights, 3
    everything = weights.root.nbytes + sum(b.nbytes for b in weights.once)
    everything += steps * sum(b.nbytes for b in weights.blocks)
    for ring_blocks in (1, 2, 3):
        for batch in (1, 2, 3):
            assert moved_for(dit, batch, steps, ring_blocks) == everything, batch


def test_looking_ahead_costs_no_more_in_a_longer_run(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = layers_of([5] * 10)
    weights.keep_resident(ACCELERATOR, float("inf"))
    looked = 0
    at_hand_already = prefetch.PrefetchRing._at_hand

    def counted(stream: prefetch.PrefetchRing, block: WeightBlock) -> bool:
        nonlocal looked
        looked += 1
        return at_hand_already(stream, block)

    monkeypatch.setattr(prefetch.PrefetchRing, "_at_hand", counted)
    found = []
    for passes in (4, 40):
        looked = 0
        with weights.running_on(ACCELERATOR, None, passes):
            computed(weights, list(range(10)) * passes, None)
        found.append(looked / passes)
    assert found[1] <= 2 * found[0], "looks for each block, at each visit"
