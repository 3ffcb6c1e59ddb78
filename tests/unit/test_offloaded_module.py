"""Weights in CPU memory, block by block on a device: the same results, and nothing left there."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from majicflux.engine.flux.conditioning import conditions_of
from majicflux.engine.flux.text_encoders import TextEmbedding
from majicflux.engine.flux.velocity import flux_velocity
from majicflux.engine.offload import offloaded_module
from majicflux.engine.offload.offloaded_module import OffloadedModule
from majicflux.engine.offload.transfers import PlainTransfers
from majicflux.engine.offload.weight_block import CPU, WeightBlock
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.engine.run.pipeline import paint
from majicflux.engine.run.request import GenerationRequest

REQUEST = GenerationRequest("a cat", seed=1, steps=3, guidance=3.5, width=64, height=48)

# On a machine without an accelerator this is another device than `cpu` to PyTorch's comparisons,
# so weights are really copied to it and dropped again.
ACCELERATOR = torch.device("cpu", 0)


class Chain(nn.Module):
    def __init__(self, layers: int = 4, width: int = 8):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def offloaded_chain(seed: int = 0) -> OffloadedModule:
    with torch.device("meta"):
        chain = Chain()
    weights = OffloadedModule(chain, [[layer] for layer in chain.layers]).allocate()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return weights


def buffers(weights: OffloadedModule) -> list[int]:
    """The storage behind each parameter, in order of names."""
    return [p.untyped_storage().data_ptr() for p in weights.module.parameters()]


def test_each_block_is_one_contiguous_buffer() -> None:
    weights = offloaded_chain()
    module = weights.module
    for part in (module.first, *module.layers):
        assert len({p.untyped_storage().data_ptr() for p in part.parameters()}) == 1
    assert len(set(buffers(weights))) == 5
    assert weights.total_bytes == sum(
        {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
        .values()
    )  # fmt: skip


def test_blocks_are_away_from_home_only_while_they_run() -> None:
    weights = offloaded_chain()
    home = buffers(weights)
    seen: list[list[bool]] = []

    def look() -> None:
        seen.append([now == then for now, then in zip(buffers(weights), home, strict=True)])

    module = weights.module
    with weights.running_on(ACCELERATOR):
        for layer in module.layers:
            layer.register_forward_pre_hook(lambda *_: look())
        module(torch.zeros(1, 8))
    for step, at_home in enumerate(seen):
        # parameters: the root's two, then two for each layer
        away = [index for index, flag in enumerate(at_home) if not flag]
        assert away == [0, 1, 2 + 2 * step, 3 + 2 * step]
    assert buffers(weights) == home


@pytest.mark.parametrize("resident", [0.0, 0.5, 1.0])
def test_streamed_output_equals_resident_output_bit_for_bit(resident: float) -> None:
    weights = offloaded_chain()
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = weights.module(x)
        weights.keep_resident(ACCELERATOR, resident * weights.total_bytes)
        with weights.running_on(ACCELERATOR) as stream:
            assert torch.equal(weights.module(x), expected)
        assert stream.moved_bytes == weights.total_bytes - weights.resident_bytes


def test_residents_are_spread_evenly_over_the_pass() -> None:
    """Or the copies would stand still while the resident ones compute."""
    weights = offloaded_chain()
    block = weights.largest_bytes
    weights.keep_resident(ACCELERATOR, 3.9 * block)  # the root and two of four
    assert [b.resident for b in weights.blocks] == [True, False, True, False]
    assert weights.resident_bytes == 3 * block
    weights.keep_resident(ACCELERATOR, 2 * block)
    assert [b.resident for b in weights.blocks] == [True, False, False, False]


@pytest.mark.parametrize("count", [1, 2, 5, 30, 57, 90])
def test_no_stretch_of_visitors_is_much_longer_than_another(count: int) -> None:
    with torch.device("meta"):
        chain = nn.Sequential(*(nn.Linear(16, 16) for _ in range(95)))
    weights = OffloadedModule(chain, [[layer] for layer in chain])
    chosen = weights.fitting(count * weights.largest_bytes)[1:]  # less the empty root
    assert len(chosen) == count
    places = [index for index, b in enumerate(weights.blocks) if b in chosen]
    gaps = [b - a for a, b in zip(places, [*places[1:], places[0] + 95], strict=True)]
    assert max(gaps) <= 2.7 * 95 / count + 1


def test_residency_is_given_back_block_by_block() -> None:
    weights = offloaded_chain()
    home = buffers(weights)
    weights.keep_resident(ACCELERATOR, float("inf"))
    freed = weights.release(weights.largest_bytes + 1)
    assert freed == 2 * weights.largest_bytes
    assert [b.resident for b in weights.blocks].count(True) == 2
    weights.release(float("inf"))
    assert weights.resident_bytes == 0
    assert buffers(weights) == home


def test_an_interrupted_run_leaves_nothing_behind() -> None:
    weights = offloaded_chain()
    home = buffers(weights)
    ran: list[int] = []

    class Cancelled(BaseException):
        pass

    def before_block() -> None:
        if len(ran) == 2:
            raise Cancelled
        ran.append(1)

    with pytest.raises(Cancelled), weights.running_on(ACCELERATOR, before_block):
        weights.module(torch.zeros(1, 8))
    assert len(ran) == 2
    assert buffers(weights) == home
    with torch.no_grad(), weights.running_on(CPU):  # and it can run again
        assert weights.module(torch.zeros(1, 8)).shape == (1, 8)


def test_weights_can_move_inside_and_outside_inference_mode() -> None:
    weights = offloaded_chain()
    with torch.inference_mode():
        weights.keep_resident(ACCELERATOR, float("inf"))
    weights.release(float("inf"))
    weights.keep_resident(ACCELERATOR, float("inf"))
    with torch.inference_mode():
        weights.release(float("inf"))
        weights.module(torch.zeros(1, 8))


def test_modules_with_buffers_are_refused() -> None:
    with torch.device("meta"):
        module = nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match="BatchNorm1d has buffers"):
        OffloadedModule(module, [])


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_nothing_is_left_on_the_wrong_device(make_pipeline, share: float) -> None:
    """On the meta device every product of a CPU weight and a device tensor is an error."""
    meta = torch.device("meta")
    pipeline = make_pipeline(precision=PRECISIONS["float8_e4m3fn"])
    dit, encoders = pipeline.dit, pipeline.text_encoders
    for component in (dit, encoders):
        component.weights.keep_resident(meta, share * component.weights.total_bytes)
    with torch.inference_mode(), encoders.weights.running_on(meta):
        t5 = encoders.weights.module.t5  # its table looks tokens up on the CPU
        t5.encoder(torch.zeros(1, 512, t5.geometry.width, device=meta).bfloat16())
    text = TextEmbedding(
        torch.zeros(1, 512, dit.geometry.text_width), torch.zeros(1, dit.geometry.pooled_width)
    )
    module, sigmas = dit.weights.module, torch.tensor([0.5])
    latents = torch.zeros(2, 16, 8, 8, device=meta)
    with torch.inference_mode(), dit.weights.running_on(meta):
        given = (torch.bfloat16, meta, torch.float32, sigmas)
        (conditions,) = conditions_of(module, [text], 3.5, *given)
        out = flux_velocity(module, conditions)(latents, sigmas[0])
    assert out.device == meta
    assert out.shape == (2, 16, 8, 8)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("share", "cfg"), [(0.0, 1.0), (0.4, 1.0), (0.0, 2.0)])
def test_a_streamed_picture_equals_a_resident_one(make_pipeline, share: float, cfg: float) -> None:
    request = replace(REQUEST, cfg=cfg, negative="fog")

    def painted(**options: object) -> tuple[torch.Tensor, torch.Tensor]:
        pipeline = make_pipeline(precision=PRECISIONS["float8_e4m3fn"], **options)
        return paint(pipeline, request, lambda *_: None, lambda: None)[:2]

    picture, latents = painted(device=ACCELERATOR)
    assert torch.equal(latents, painted()[1])
    pipeline = make_pipeline(precision=PRECISIONS["float8_e4m3fn"], device=ACCELERATOR)
    smallest = pipeline.plan(request.workload).smallest_bytes
    budget = int(smallest + share * pipeline.dit.weights.total_bytes)
    streamed, streamed_latents = painted(device=ACCELERATOR, budget_bytes=budget)
    assert torch.equal(streamed_latents, latents)
    assert (streamed - picture).abs().max() < 0.02  # bands of rows, in bfloat16


@pytest.mark.usefixtures("narrow")
def test_modulation_travels_once(make_pipeline, monkeypatch) -> None:
    """Its layers are a quarter of the parameters, and depend on the step alone."""
    pipeline = make_pipeline(precision=PRECISIONS["int8 rotated"], device=ACCELERATOR)
    weights = pipeline.dit.weights
    weights.keep_resident(ACCELERATOR, 0.4 * weights.total_bytes)
    monkeypatch.setattr(pipeline.dit.patcher, "load", lambda *_, **__: None)
    moved: list[WeightBlock] = []
    point = WeightBlock.point_into

    def watched(block: WeightBlock, buffer: torch.Tensor) -> None:
        if block.host_buffer is not None and buffer is not block.host_buffer:
            moved.append(block)
        point(block, buffer)

    monkeypatch.setattr(WeightBlock, "point_into", watched)
    resident = [block for block in weights.all_blocks if block.resident]
    report = paint(pipeline, REQUEST, lambda *_: None, lambda: None)[2]
    geometry = pipeline.dit.geometry
    assert len(weights.once) == 2 * geometry.double_blocks + geometry.single_blocks + 2
    once = [block for block in weights.once if block not in resident]
    visiting = [block for block in weights.blocks if block not in resident]
    assert {moved.count(block) for block in once} == {1}
    assert {moved.count(block) for block in visiting} == {REQUEST.steps}
    visits = sum(b.nbytes for b in once) + REQUEST.steps * sum(b.nbytes for b in visiting)
    assert report.stages[1].moved_bytes == visits


def test_what_runs_once_is_the_last_to_become_resident() -> None:
    parts = [nn.Linear(8, 8, device="meta") for _ in range(4)]
    module = nn.Sequential(*parts)
    weights = OffloadedModule(module, [[parts[1]], [parts[2]]], once=[[parts[0]]]).allocate()
    first, second = weights.blocks
    assert (first.nbytes, second.nbytes, weights.once[0].nbytes) == (512, 512, 512)
    weights.keep_resident(ACCELERATOR, 3 * 512)
    everything = (weights.root, first, second, weights.once[0])
    assert [block.resident for block in everything] == [True] * 3 + [False]


def test_what_stays_at_home_never_travels() -> None:
    parts = [nn.Linear(8, 8, device="meta") for _ in range(2)]
    weights = OffloadedModule(nn.Sequential(*parts), [[parts[0]]], on_host=[parts[1]]).allocate()
    weights.keep_resident(ACCELERATOR, float("inf"))
    assert not weights.host_only.resident
    assert [block.resident for block in weights.blocks] == [True]
    assert weights.travelling_bytes == 512
    assert weights.total_bytes == 1024


def test_a_copy_that_fails_makes_nothing_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run would compute with whatever was in that memory."""

    class Failing(PlainTransfers):
        def wait(self, copied: object) -> None:
            raise RuntimeError("CUDA error: unspecified launch failure")

    parts = [nn.Linear(8, 8, device="meta") for _ in range(2)]
    weights = OffloadedModule(nn.Sequential(*parts), [[part] for part in parts]).allocate()
    monkeypatch.setattr(offloaded_module, "transfers_to", lambda *_: Failing())
    with pytest.raises(RuntimeError, match="unspecified"):
        weights.keep_resident(ACCELERATOR, float("inf"))
    assert not any(block.resident for block in weights.all_blocks)
    at_home = {block.host_buffer.data_ptr() for block in weights.blocks}
    assert {part.weight.data_ptr() for part in parts} == at_home
    monkeypatch.undo()
    weights.keep_resident(ACCELERATOR, float("inf"))
    assert all(block.resident for block in weights.blocks)
