import pytest
import torch
from torch import nn

from majicflux.engine.offload import CPU, OffloadedModule, WeightBlock
from majicflux.engine.pipeline import Request, paint
from majicflux.engine.precision import PRECISIONS

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
    weights = OffloadedModule(chain, list(chain.layers)).allocate()
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

    with weights.running_on(ACCELERATOR) as module:
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
        with weights.running_on(ACCELERATOR) as module:
            assert torch.equal(module(x), expected)


def test_as_many_of_the_first_blocks_are_resident_as_the_budget_holds() -> None:
    weights = offloaded_chain()
    block = weights.largest_block_bytes
    weights.keep_resident(ACCELERATOR, 3.9 * block)
    assert [b.resident for b in weights.blocks] == [True, True, False, False]
    assert weights.resident_bytes == 3 * block
    weights.keep_resident(ACCELERATOR, 2 * block)
    assert [b.resident for b in weights.blocks] == [True, False, False, False]


def test_residency_is_given_back_from_the_end() -> None:
    weights = offloaded_chain()
    home = buffers(weights)
    weights.keep_resident(ACCELERATOR, float("inf"))
    freed = weights.release(weights.largest_block_bytes + 1)
    assert freed == 2 * weights.largest_block_bytes
    assert [b.resident for b in weights.blocks] == [True, True, False, False]
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

    with pytest.raises(Cancelled), weights.running_on(ACCELERATOR, before_block) as module:
        module(torch.zeros(1, 8))
    assert len(ran) == 2
    assert buffers(weights) == home
    with torch.no_grad(), weights.running_on(CPU) as module:  # and it can run again
        assert module(torch.zeros(1, 8)).shape == (1, 8)


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


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_nothing_is_left_on_the_wrong_device(make_pipeline, share: float) -> None:
    """On the meta device every product of a CPU weight and a device tensor is an error."""
    meta = torch.device("meta")
    pipeline = make_pipeline(precision=PRECISIONS["float8_e4m3fn"])
    dit, encoders = pipeline.dit, pipeline.text_encoders
    for component in (dit, encoders):
        component.weights.keep_resident(meta, share * component.weights.total_bytes)
    with torch.inference_mode(), encoders.weights.running_on(meta) as module:
        module.t5(torch.zeros(1, 512, dtype=torch.int64, device=meta))
    from majicflux.engine.denoise import flux_velocity
    from majicflux.engine.text_encoders import TextEmbedding

    text = TextEmbedding(
        torch.zeros(1, 512, dit.geometry.text_width), torch.zeros(1, dit.geometry.pooled_width)
    )
    with torch.inference_mode(), dit.weights.running_on(meta) as module:
        velocity = flux_velocity(module, text, 3.5, torch.bfloat16)
        out = velocity(torch.zeros(2, 16, 8, 8, device=meta), torch.tensor(0.5))
    assert out.device == meta
    assert out.shape == (2, 16, 8, 8)


def test_a_streamed_picture_equals_a_resident_one(make_pipeline) -> None:
    request = Request("a cat", seed=1, steps=2, guidance=3.5, width=64, height=48)

    def picture(**options: object) -> torch.Tensor:
        pipeline = make_pipeline(precision=PRECISIONS["float8_e4m3fn"], **options)
        return paint(pipeline, request, lambda *_: None, lambda: None)[0]

    resident = picture(device=ACCELERATOR)
    streamed = picture(device=ACCELERATOR, budget_bytes=1)
    assert torch.equal(resident, streamed)
    assert torch.equal(resident, picture())


def test_modulation_travels_once_and_changes_nothing(make_pipeline, monkeypatch) -> None:
    """Its layers are a quarter of the parameters, and depend on the step alone."""
    pipeline = make_pipeline(precision=PRECISIONS["int8 rotated"], device=ACCELERATOR,
                             budget_bytes=1)  # fmt: skip
    weights = pipeline.dit.weights
    moved: list[WeightBlock] = []
    move = WeightBlock.move_to
    monkeypatch.setattr(
        WeightBlock, "move_to", lambda self, device: (moved.append(self), move(self, device))
    )
    request = Request("a cat", seed=1, steps=3, guidance=3.5, width=64, height=48)
    _, latents = paint(pipeline, request, lambda *_: None, lambda: None)
    geometry = pipeline.dit.geometry
    each_step = weights.blocks[: geometry.double_blocks + geometry.single_blocks]
    rare = weights.blocks[len(each_step) :]
    assert len(rare) == 2 * geometry.double_blocks + geometry.single_blocks
    assert [moved.count(block) for block in each_step] == [3] * len(each_step)
    assert [moved.count(block) for block in rare] == [1] * len(rare)

    monkeypatch.setattr("majicflux.engine.pipeline.modulation_of_steps", lambda *_: {})
    assert torch.equal(paint(pipeline, request, lambda *_: None, lambda: None)[1], latents)
    assert [moved.count(block) for block in rare] == [1 + 3] * len(rare)


def test_what_runs_rarely_is_the_last_to_become_resident() -> None:
    parts = [torch.nn.Linear(8, 8, device="meta") for _ in range(4)]
    inner = torch.nn.Sequential(parts[0], parts[1])
    module = torch.nn.Sequential(inner, parts[2], parts[3])
    weights = OffloadedModule(module, [inner, parts[2]], rare=[parts[0]]).allocate()
    outer, last, rare = weights.blocks
    assert (outer.nbytes, last.nbytes, rare.nbytes) == (512, 512, 512)  # weight, bias, aligned
    weights.keep_resident(ACCELERATOR, 3 * 512)
    assert [block.resident for block in (weights.root, outer, last, rare)] == [True] * 3 + [False]
