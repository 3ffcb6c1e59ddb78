"""Attention in 8 bits: when blocks take it, when they do not, and what is said of it.

comfy-kitchen's own needs a card; one that says what it was given stands in for it, and
`test_gpu.py` has the real one.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from majicflux.engine.flux import blocks
from majicflux.engine.flux.blocks import attend
from majicflux.engine.flux.conditioning import Conditions
from majicflux.engine.flux.controlnet import build_control_net
from majicflux.engine.flux.geometry import ControlGeometry, FluxGeometry
from majicflux.engine.flux.transformer import build_flux_dit
from majicflux.engine.flux.velocity import flux_velocity
from majicflux.engine.kernels import dispatch, probe
from majicflux.engine.offload.chunking import Chunking
from majicflux.engine.plan import measure
from majicflux.engine.quant.attention import PYTORCH, Attends, Attention
from majicflux.engine.quant.compute import ComputePrecision, choose_compute
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.engine.run import attention as choosing
from majicflux.engine.run.attention import choose_attention
from majicflux.nodes.pipeline import PipelineNode

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
SMALL = {"hidden": 256, "double_blocks": 1, "single_blocks": 1, "text_width": 64}
WORDS = 20
TOKENS = WORDS + 3 * 4


class Kitchen(SimpleNamespace):
    """A comfy-kitchen that attends as PyTorch does, and remembers the shapes and strides."""

    def __init__(self, works: bool = True, available: bool = True) -> None:
        super().__init__(works=works, available=available, seen=[])

    def int8_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen.append((tuple(q.shape), q.stride()))
        assert q.shape == k.shape == v.shape
        assert q.stride() == k.stride() == v.stride()
        found = scaled_dot_product_attention(q, k, v)
        return (found if self.works else -found).contiguous()

    def int8_attention_is_available(self, device: torch.device) -> bool:
        assert device == CARD
        return self.available


@pytest.fixture
def kitchen(monkeypatch: pytest.MonkeyPatch) -> Kitchen:
    made = Kitchen()
    monkeypatch.setitem(sys.modules, "comfy_kitchen", made)  # type: ignore
    return made


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, kitchen: Kitchen):
    """An RTX 30 by its name, whose kernels are tried on the CPU; its transformer."""
    monkeypatch.setattr(dispatch, "capability", lambda _: (8, 6))
    monkeypatch.setattr(dispatch, "_verdicts", {})
    trial = probe.int8_attention
    monkeypatch.setattr(probe, "int8_attention", lambda _, dtype: trial(CPU, dtype))
    allocator = SimpleNamespace(give_back=lambda: None)
    monkeypatch.setattr(choosing, "allocator_of", lambda _: allocator)
    dispatch.int8_attention_works.cache_clear()
    yield SimpleNamespace(
        weights=SimpleNamespace(resident_bytes=7),
        patcher=SimpleNamespace(device=CARD, load=lambda *_: None),
    )
    dispatch.int8_attention_works.cache_clear()


@cache
def transformer(precision: str) -> Any:
    """Small, of random weights."""
    module = build_flux_dit(FluxGeometry(**SMALL), PRECISIONS[precision]).allocate().module
    drawn = torch.Generator().manual_seed(4)
    for name, parameter in module.named_parameters():
        if parameter.dtype == torch.int8:
            parameter.data.random_(-99, 100, generator=drawn)
        else:
            values = torch.randn(parameter.shape, generator=drawn)
            parameter.data.copy_(values * (1e-3 if name.endswith("scale") else 0.06))
    return module


@torch.inference_mode()
def velocity(
    attention: Attention,
    precision: str = "bfloat16",
    pictures: int = 1,
    prompts: int = 1,
    chunking: Chunking | None = None,
) -> Tensor:
    """Of a step at random latents, in 8-bit products where the precision has them."""
    dit, some = transformer(precision), partial(torch.randn, generator=torch.manual_seed(5))
    computing = choose_compute(dit, CPU, "bfloat16", torch.bfloat16)
    if precision != "bfloat16":
        computing = choose_compute(dit, CPU, "8-bit", torch.bfloat16)
    modulation = {1.0: 0.3 * some(1, 1, (6 + 6 + 3 + 2) * 256)}
    told = [Conditions(some(1, WORDS, 256), modulation) for _ in range(prompts)]
    with replace(computing, attention=attention).applied_to(dit, CPU):
        step = flux_velocity(dit, told[0], chunking, *told[1:], cfg=2.0)
        return step(some(pictures, 16, 6, 8), torch.tensor(1.0))


@pytest.mark.parametrize("precision", ["bfloat16", "int8 rotated"])
def test_every_block_of_a_run_attends_as_was_chosen(kitchen, precision: str) -> None:
    """For each picture of a batch and each prompt; outside of a run they attend as ever."""
    for pictures, prompts in ((1, 1), (2, 1), (1, 2)):
        kitchen.seen.clear()
        plain = velocity(PYTORCH, precision, pictures, prompts)
        assert not kitchen.seen
        assert torch.equal(velocity(Attention(0), precision, pictures, prompts), plain)
        assert [shape for shape, _ in kitchen.seen] == [(1, 2, TOKENS, 128)] * (
            2 * pictures * prompts
        )
    # Rows of queries, keys and values, or of a single block's whole first product.
    assert {stride[2] for _, stride in kitchen.seen} == {3 * 256, 7 * 256}
    blocks = [m for m in transformer(precision).modules() if isinstance(m, Attends)]
    assert [block.attention for block in blocks] == [PYTORCH] * 2


def test_groups_of_heads_attend_so_too(kitchen) -> None:
    found = velocity(Attention(0), chunking=Chunking(256, 2))
    assert torch.equal(found, velocity(PYTORCH, chunking=Chunking(256, 2)))
    assert [shape for shape, _ in kitchen.seen] == [(1, 1, TOKENS, 128)] * 4


@pytest.mark.parametrize(("int8_from", "calls"), [(TOKENS, 1), (TOKENS + 1, 0)])
def test_fewer_tokens_than_pay_attend_as_ever(kitchen, int8_from: int, calls: int) -> None:
    attend(torch.randn(1, TOKENS, 3 * 256), 2, Attention(int8_from))
    assert len(kitchen.seen) == calls


def test_control_nets_attend_as_the_transformer_does() -> None:
    precision = PRECISIONS["float8_e4m3fn"]
    small = {"hidden": 256, "double_blocks": 1, "single_blocks": 1, "text_width": 64}
    nets = (
        build_control_net(ControlGeometry(**small), precision),
        build_flux_dit(FluxGeometry(**small), precision),
    )
    both = torch.nn.ModuleList(net.module for net in nets)
    chosen = ComputePrecision(torch.bfloat16, attention=Attention(0))
    with chosen.applied_to(both, torch.device("meta")):
        found = [m.attention for m in both.modules() if isinstance(m, Attends)]
    assert found == [Attention(0)] * 4


@pytest.mark.parametrize("mode", ["on", "auto"])
@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("no card", "int8 matrix units begin with compute capability 7.5"),
        ("GTX 10", "int8 matrix units begin with compute capability 7.5"),
        ("no library", "comfy-kitchen 0.2.29 or newer is not installed"),
        ("old library", "comfy-kitchen 0.2.29 or newer is not installed"),
        ("CUDA 12", "comfy-kitchen's kernels need a PyTorch for CUDA 13 or newer"),
        ("wrong", "that of comfy-kitchen gives wrong results here, or none"),
        ("kernels off", "MAJICFLUX_NO_FUSED_KERNELS is set"),
    ],
)
def test_where_it_cannot_be_had_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, card, kitchen, mode: str, state: str, reason: str
) -> None:
    without: dict[str, Callable[[], None]] = {
        "no card": lambda: monkeypatch.setattr(dispatch, "capability", lambda _: None),
        "GTX 10": lambda: monkeypatch.setattr(dispatch, "capability", lambda _: (6, 1)),
        "no library": lambda: monkeypatch.setitem(sys.modules, "comfy_kitchen", None),  # type: ignore
        "old library": lambda: monkeypatch.setitem(
            sys.modules, "comfy_kitchen", SimpleNamespace()  # type: ignore
        ),
        "CUDA 12": lambda: setattr(kitchen, "available", False),
        "wrong": lambda: setattr(kitchen, "works", False),
        "kernels off": lambda: monkeypatch.setenv(dispatch.OFF, "1"),
    }  # fmt: skip
    without[state]()
    found = choose_attention(card, mode, torch.bfloat16)
    assert found == Attention(obstacle=reason)
    assert not found.in_int8(10**6)
    said = ComputePrecision(torch.bfloat16, attention=found).report
    assert said == f"computes in bfloat16; no attention in int8: {reason}"


def test_it_is_tried_before_it_is_used_and_off_asks_nobody(card, kitchen) -> None:
    assert choose_attention(card, "off", torch.bfloat16) == PYTORCH
    assert not kitchen.seen
    assert ComputePrecision(torch.bfloat16).report == "computes in bfloat16"
    found = choose_attention(card, "on", torch.bfloat16)
    assert found == Attention(0)
    assert {shape[2] for shape, _ in kitchen.seen} == {*probe.ATTENDING}
    assert ComputePrecision(torch.bfloat16, attention=found).report == (
        "computes in bfloat16; attention in int8"
    )
    tried = len(kitchen.seen)
    assert choose_attention(card, "on", torch.bfloat16) == found
    assert len(kitchen.seen) == tried, "once"


# TFLOP/s of PyTorch's with 1024, 4096 and 16384 tokens, and of comfy-kitchen's.
MEASURED = {
    "faster throughout": ((60, 70, 70), (70, 120, 140), 1024),
    "faster with many tokens": ((60, 70, 70), (30, 72, 140), 16384),
    "hardly faster": ((60, 70, 70), (62, 72, 73), None),
    "slower on an H200": ((400, 659, 601), (100, 335, 434), None),
}


@pytest.mark.parametrize("name", MEASURED)
def test_auto_takes_it_from_the_size_on_at_which_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, card, name: str
) -> None:
    plain, in_int8, expected = MEASURED[name]

    def rate(device, dtype, attention: Attention, tokens: int) -> float:
        assert (device, dtype) == (CARD, torch.bfloat16)
        return (in_int8 if attention.in_int8(tokens) else plain)[measure.ATTENTIONS.index(tokens)]

    monkeypatch.setattr(measure, "_attention_rate", rate)
    found = choose_attention(card, "auto", torch.bfloat16)
    assert found.int8_from == expected
    said = ComputePrecision(torch.bfloat16, attention=found).report.partition("; ")[2]
    if expected:
        assert said == f"attention in int8 from {expected} tokens on"
        assert found.in_int8(expected)
        assert not found.in_int8(expected - 1)
    else:
        assert said == "no attention in int8: PyTorch's is no slower on this card"


def test_a_card_that_is_too_full_to_measure_keeps_pytorchs(
    monkeypatch: pytest.MonkeyPatch, card
) -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError("simulated")

    asked: list[tuple[int, int]] = []
    card.patcher.load = lambda *bytes_of: asked.append(bytes_of)
    monkeypatch.setattr(measure, "_attention_rate", full)
    found = choose_attention(card, "auto", torch.bfloat16)
    assert found.obstacle == "the card has no memory free to measure it"
    assert asked == [(measure.MEASURING_BYTES, 7)], "what is resident may stay"


def test_what_is_measured_is_what_a_block_does(monkeypatch: pytest.MonkeyPatch, kitchen) -> None:
    """With as many values at every size, and never in more memory than was asked for."""

    def seconds(run: Callable[[], Tensor], _: object) -> float:
        run()
        return 0.001

    def attending(qkv: Tensor, heads: int, chosen: Attention) -> None:
        sizes.append((*qkv.shape, heads, chosen))

    sizes: list[tuple[Any, ...]] = []
    monkeypatch.setattr(measure, "_seconds", seconds)
    monkeypatch.setattr(blocks, "attend", attending)
    measured = measure._attention_rate.__wrapped__
    rates = [measured(CPU, torch.float32, measure.INT8, tokens) for tokens in (1024, 4096)]
    assert sizes == [(1, tokens, 9216, 24, Attention(0)) for tokens in (1024, 4096)]
    assert rates == [4 * 3072 * tokens**2 / 0.001 for tokens in (1024, 4096)]
    for tokens in measure.ATTENTIONS:
        heads = min(24, 24 * 4096 // tokens)
        assert tokens * heads * 128 * (3 + 2) * 4 < measure.MEASURING_BYTES


@pytest.mark.parametrize("int8_from", [None, 0, 4096, 16384])
def test_a_step_is_predicted_by_the_attention_that_it_takes(
    monkeypatch: pytest.MonkeyPatch, int8_from: int | None
) -> None:
    """As it is at 1024x1024, from where the other sizes are told."""
    rates = {False: 70e12, True: 120e12}

    def rate(_device, _dtype, attention: Attention, tokens: int = measure.ATTENTION_TOKENS):
        return rates[attention.in_int8(tokens)]

    monkeypatch.setattr(measure, "_attention_rate", rate)
    monkeypatch.setattr(measure, "copy_rate", lambda _: 25e9)
    monkeypatch.setattr(measure, "_product_rate", lambda *_: 200e12)
    monkeypatch.setattr(measure, "allocator_of", lambda _: SimpleNamespace(give_back=lambda: None))
    monkeypatch.setattr(measure, "_measured", {})
    monkeypatch.setattr(dispatch, "triton_works", lambda _: False)
    computing = ComputePrecision(torch.bfloat16, attention=Attention(int8_from))
    found = measure.device_profile(CARD, computing, rates=True)
    assert found.attention_rate == rates[int8_from in (0, 4096)]
    assert measure.measured_profile(CARD, computing) == found
    assert measure.measured_profile(CARD, ComputePrecision(torch.bfloat16)) in (
        None if int8_from is not None else found,
    )


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("mode", ["off", "on", "auto"])
def test_without_a_card_the_node_says_so_and_nothing_changes(
    make_pipeline, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)  # type: ignore
    dit = make_pipeline().dit
    plain, found = (
        PipelineNode.execute(dit, compute_precision="bfloat16", **given).args[0].compute
        for given in ({}, {"int8_attention": mode})
    )
    assert plain.attention == PYTORCH, "what saved workflows get"
    assert ("no attention in int8: int8 matrix units" in found.report) == (mode != "off")
    assert not found.attention.in_int8(10**6)
