"""What only a CUDA card can show. Skipped where there is none."""

import dataclasses
import functools
import gc
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from comfyui_server import Server
from file_layouts import sparse_file
from majicflux.benchmarks.card_counter import GIB, leaving_free
from majicflux.benchmarks.lora import random_lora
from majicflux.engine.flux.blocks import attend
from majicflux.engine.flux.geometry import FluxGeometry
from majicflux.engine.kernels import dispatch
from majicflux.engine.latents import to_vae_space
from majicflux.engine.plan.measure import ATTENTIONS
from majicflux.engine.plan.plan import Workload
from majicflux.engine.quant.attention import Attention
from majicflux.engine.quant.formats import INT8_ROTATED, PRECISIONS
from majicflux.engine.quant.linear import StoredLinear
from majicflux.engine.quant.methods import Dequantized, EightBit
from majicflux.engine.quant.quantize import quantize_rows
from majicflux.engine.run import pipeline_run
from majicflux.engine.run.attention import choose_attention, int8_obstacle
from majicflux.engine.run.pipeline import Pipeline, paint
from majicflux.engine.run.request import GenerationRequest
from majicflux.loaders import demo_models
from majicflux.loaders.convert_on_device import DeviceQuantizer
from majicflux.loaders.flux_dit import load_flux_dit
from majicflux.loaders.layouts import flux_dit_layout

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NOT TESTED ON A CARD: no CUDA device"
)
CUDA = torch.device("cuda", 0)
REQUEST = GenerationRequest("a cat", seed=1, steps=4, guidance=3.5, width=256, height=256)


def picture(make_pipeline, **options) -> torch.Tensor:
    pipeline = make_pipeline(precision=PRECISIONS["float8_e4m3fn"], **options)
    return paint(pipeline, REQUEST, lambda *_: None, lambda: None)[0]


def test_a_streamed_picture_equals_a_resident_one(make_pipeline) -> None:
    job = REQUEST.workload
    pipeline = make_pipeline(precision=PRECISIONS["float8_e4m3fn"], device=CUDA)
    smallest = pipeline.plan(job).smallest_bytes
    _, resident, _ = paint(pipeline, REQUEST, lambda *_: None, lambda: None)
    for pinned in (False, True):
        pipeline = make_pipeline(
            precision=PRECISIONS["float8_e4m3fn"], device=CUDA, budget_bytes=smallest
        )
        if pinned:
            for block in pipeline.dit.weights.all_blocks:
                block.live_in(block.host_buffer.pin_memory())
        _, streamed, report = paint(pipeline, REQUEST, lambda *_: None, lambda: None)
        assert torch.equal(resident, streamed)
        assert report.peak_bytes <= smallest


def test_what_is_float32_besides_the_products_takes_most_of_the_error_off(make_pipeline) -> None:
    request = dataclasses.replace(REQUEST, steps=1, guidance=4.0)  # which bfloat16 latents hold too

    def latents(mode: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        pipeline = make_pipeline(precision=PRECISIONS["bfloat16"], device=CUDA, mode=mode)
        return paint(pipeline, request, lambda *_: None, lambda: None, latents_dtype=dtype)[1]

    exact = latents("float32")
    error = (latents("bfloat16") - exact).norm()
    assert error < 0.5 * (latents("bfloat16", torch.bfloat16) - exact).norm()


def test_the_card_paints_what_the_cpu_paints(make_pipeline) -> None:
    on_card = picture(make_pipeline, device=CUDA, dtype=torch.float32)
    on_cpu = picture(make_pipeline, dtype=torch.float32)
    assert (on_card - on_cpu).abs().mean() < 1e-3


@pytest.mark.parametrize("mode", ["bfloat16", "8-bit", "auto"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_paints_on_the_card_what_it_paints_on_the_cpu(
    make_pipeline, precision: str, mode: str
) -> None:
    if mode == "8-bit" and not PRECISIONS[precision].eight_bit:
        pytest.skip("there is nothing in 8 bits")

    def latents(device: torch.device, precision: str = precision, mode: str = mode):
        options = {"precision": PRECISIONS[precision], "mode": mode, "device": device}
        return paint(make_pipeline(**options), REQUEST, lambda *_: None, lambda: None)[1]

    on_card, on_cpu = latents(CUDA), latents(torch.device("cpu"))
    exact = latents(torch.device("cpu"), "bfloat16", "bfloat16")
    # Both round, at other places: they differ by no more than their own error.
    error = (on_cpu - exact).norm() + 0.02 * exact.norm()
    assert (on_card - on_cpu).norm() <= 1.5 * error


@pytest.mark.parametrize("rank", [0, 16])  # of a LoRA
@pytest.mark.parametrize(
    ("precision", "kitchen"),
    [("float8_e4m3fn", False), ("int8 rotated", False), ("int8 rotated", True)],
)
def test_8_bits_beside_float32_are_those_of_the_cpu(
    monkeypatch, make_pipeline, precision: str, kitchen: bool, rank: int
) -> None:
    """As with --force-fp32. kitchen: whether comfy-kitchen multiplies, as on other cards."""
    if kitchen:
        pytest.importorskip("comfy_kitchen")
        monkeypatch.setattr(dispatch, "kitchen_is_faster", lambda device: device.type == "cuda")

    def latents(device: torch.device, mode: str = "8-bit") -> torch.Tensor:
        options = {"precision": PRECISIONS[precision], "mode": mode, "dtype": torch.float32}
        pipeline = with_lora(make_pipeline(device=device, **options), rank)
        return paint(pipeline, REQUEST, lambda *_: None, lambda: None)[1]

    on_card, on_cpu = latents(CUDA), latents(torch.device("cpu"))
    exact = latents(torch.device("cpu"), "float32")
    error = (on_cpu - exact).norm() + 0.02 * exact.norm()
    assert (on_card - on_cpu).norm() <= 1.5 * error


def with_lora(pipeline: Pipeline, rank: int) -> Pipeline:
    """And a random one of this rank, unless that is 0."""
    if not rank:
        return pipeline
    torch.manual_seed(0)
    lora = random_lora(pipeline.dit.weights.module, rank)
    return dataclasses.replace(
        pipeline, dit=dataclasses.replace(pipeline.dit, adapters=((lora, 1.0),))
    )


@pytest.mark.parametrize(
    ("precision", "lacking"),
    [
        ("float8_e4m3fn", ()),
        ("float8_e4m3fn", ("float8_takes_row_scales",)),  # Windows
        ("float8_e4m3fn", ("float8_takes_row_scales", "triton_works")),
        ("int8 rotated", ()),
        ("int8 rotated", ("triton_works", "kitchen_works")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_product_in_8_bits_is_that_of_float64(
    monkeypatch, precision: str, lacking, dtype: torch.dtype
) -> None:
    for name in lacking:
        monkeypatch.setattr(dispatch, name, lambda *_: False)
    storage = PRECISIONS[precision].mlp
    layer = StoredLinear(512, 384, True, storage).to_empty(device=CUDA)
    generator = torch.Generator(CUDA).manual_seed(0)
    weight = torch.randn(384, 512, device=CUDA, generator=generator)
    quantize_rows(weight, layer.weight.data, layer.scale.data, layer.group)
    layer.bias.data.normal_(generator=generator)
    x = torch.randn(1, 40, 512, device=CUDA, dtype=dtype, generator=generator)
    plain = Dequantized([layer], CUDA, x.dtype)
    layer.method = EightBit([layer.weight.dtype], CUDA, plain)
    rows = layer.rows(x)
    found = layer(rows)
    exact = (rows.values.double() * rows.scale.double()) @ (
        layer.weight.double() * layer.scale.double()[:, None]
    ).T + layer.bias.double()
    assert (found.double() - exact).norm() <= (6e-3 if lacking else 4e-3) * exact.norm()
    assert torch.equal(found, layer(layer.rows(x), out=torch.empty_like(found)))


def test_a_shape_that_the_units_do_not_take_is_dequantized() -> None:
    layer = StoredLinear(24, 40, True, INT8_ROTATED).to_empty(device=CUDA)
    weight = torch.randn(40, 24, device=CUDA)
    quantize_rows(weight, layer.weight.data, layer.scale.data, layer.group)
    layer.bias.data.zero_()
    x = torch.randn(1, 64, 24, device=CUDA, dtype=torch.bfloat16)
    layer.method = EightBit([torch.int8], CUDA, Dequantized([layer], CUDA, x.dtype))
    layer(layer.rows(x))
    found = layer(layer.rows(x))
    exact = x.double() @ weight.double().T
    assert (found.double() - exact).norm() <= 0.03 * exact.norm()


@pytest.mark.parametrize("card_is_full", [False, True])
@pytest.mark.parametrize("precision", ["float8_e4m3fn", "int8 rotated"])
def test_the_card_converts_to_the_weights_of_the_cpu(
    models: Path, precision: str, card_is_full: bool
) -> None:
    path = models / demo_models.DIT_FILE
    on_cpu, _ = load_flux_dit(path, PRECISIONS[precision])
    torch.empty(1, device=CUDA)
    torch.cuda.empty_cache()
    if card_is_full:  # then the CPU does it
        torch.cuda.set_per_process_memory_fraction(0.0)
    try:
        on_card, _ = load_flux_dit(path, PRECISIONS[precision], device=CUDA)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    theirs = dict(on_card.module.named_parameters())
    for name, parameter in on_cpu.module.named_parameters():
        assert parameter.device == theirs[name].device
        if precision == "float8_e4m3fn" or card_is_full:
            bits = theirs[name].view(torch.uint8)
            assert torch.equal(parameter.view(torch.uint8), bits), name
        difference = (parameter.float() - theirs[name].float()).abs().mean()
        assert difference <= 1e-3 * parameter.float().abs().mean(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_rows_in_pinned_memory_come_back_as_the_cpu_quantizes_them(dtype: torch.dtype) -> None:
    card = DeviceQuantizer(CUDA)
    exact = (torch.randn(1000, 3072) * torch.logspace(-9, 2, 1000)[:, None]).to(dtype)
    expected, scale = torch.empty(1000, 3072, dtype=torch.float8_e4m3fn), torch.empty(1000)
    quantize_rows(exact, expected, scale)

    def convert(_: int) -> bool:
        values = card.buffer()[: exact.nbytes].view(dtype).view(exact.shape).copy_(exact)
        found, found_scale = torch.empty_like(expected), torch.empty(1000)
        card.quantize(values, found, found_scale, 0)
        bits = torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
        return bits and torch.equal(found_scale, scale)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(convert, range(64)))


@pytest.mark.parametrize("precision", ["float8_e4m3fn", "int8 rotated"])
def test_converting_takes_little_of_the_card_and_gives_it_back(
    tmp_path: Path, precision: str
) -> None:
    layout = flux_dit_layout(FluxGeometry(double_blocks=1, single_blocks=2))
    path = sparse_file(tmp_path / "wide.safetensors", layout)
    torch.empty(1, device=CUDA)
    gc.collect()  # what other tests have left
    torch.cuda.empty_cache()
    before, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    load_flux_dit(path, PRECISIONS[precision], device=CUDA)
    # cudaMallocAsync reserves more than it uses
    assert 2**20 < torch.cuda.max_memory_allocated() - allocated < 200e6
    assert torch.cuda.memory_reserved() <= before + 2 * 2**20


def test_streaming_holds_less_of_the_card(make_pipeline) -> None:
    peaks = []
    smallest = make_pipeline(device=CUDA).plan(REQUEST.workload).smallest_bytes
    for budget in (None, smallest):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        picture(make_pipeline, device=CUDA, budget_bytes=budget)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]


def test_fifty_runs_of_mixed_sizes_leave_the_card_as_they_found_it(make_pipeline) -> None:
    pipeline = make_pipeline(precision=PRECISIONS["float8_e4m3fn"], mode="auto", device=CUDA)
    budget = int(1.2 * pipeline.plan(Workload(512, 512, 2, 2)).smallest_bytes)
    pipeline = dataclasses.replace(pipeline, budget_bytes=budget)
    held = []
    for run in range(50):
        side, batch = (128, 256, 384, 512)[run % 4], 1 + run % 2
        request = GenerationRequest(f"cat {run % 3}", run, 2, 3.5, side, side, batch)
        report = paint(pipeline, request, lambda *_: None, lambda: None)[2]
        assert report.peak_bytes <= budget
        if run % 8 == 7:  # the same sizes have run since
            torch.cuda.empty_cache()
            held.append(torch.cuda.memory_reserved())
    assert held[-1] <= held[1]


def test_memory_taken_in_the_middle_of_a_run_costs_residency_only(make_pipeline, caplog) -> None:
    """By another program, which leaves the third step too little."""
    request = dataclasses.replace(REQUEST, width=2048, height=2048, steps=5)
    options = {"precision": PRECISIONS["float8_e4m3fn"], "device": CUDA, "mode": "8-bit"}
    pipeline = make_pipeline(**options)
    allocated, taken, resident = [], ExitStack(), []

    def measure(_: torch.Tensor | None) -> None:
        allocated.append(torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())
        torch.cuda.reset_peak_memory_stats()

    def take(_: torch.Tensor | None) -> None:
        for other in (pipeline.text_encoders, pipeline.vae):  # which would give way first
            other.weights.release(float("inf"))
        torch.cuda.empty_cache()  # or the run had no need to ask for memory again
        resident.append(pipeline.dit.weights.resident_bytes)
        if len(resident) == 2:
            # What the allocator has may have holes of 20 MB, and the ring needs as much.
            taken.enter_context(leaving_free(0.6 * allocated[2] / GIB))
        elif len(resident) == 4:
            taken.close()

    expected = paint(pipeline, request, measure, lambda: None)[1]
    with taken:
        latents = paint(pipeline, request, take, lambda: None)[1]
    assert torch.equal(latents, expected)
    assert resident[1] == pipeline.dit.weights.travelling_bytes
    assert resident[2] < resident[1]
    assert "The card has less memory than planned" in caplog.text


@pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="needs ComfyUI: set COMFYUI_PATH")
@pytest.mark.parametrize("flags", [[], ["--disable-dynamic-vram"]], ids=["default", "static"])
def test_in_turns_with_comfyuis_own_flux(
    models: Path, make_pipeline, tmp_path: Path, flags: list[str]
) -> None:
    comfyui, base = Path(os.environ["COMFYUI_PATH"]), tmp_path / "base"
    server = Server(comfyui, base, models, flags, runs_tests=True)
    test = "tests/host/inside/test_on_a_card.py::test_in_turns_with_comfyuis_own_flux"
    try:
        server.begin_tests([test])
        outcome, said = server.outcome(test)
    finally:
        server.stop()
    assert outcome == "passed", said
    alone = paint(make_pipeline(device=CUDA), REQUEST, lambda *_: None, lambda: None)[1]
    expected = to_vae_space(alone)  # but that ComfyUI lets attention with a bias add up in 16 bits
    latents = torch.load(base / "latents.pt")
    assert (latents - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("precision", ["float8_e4m3fn", "int8 rotated"])
@pytest.mark.parametrize("rank", [0, 16, 64])
def test_the_bits_do_not_depend_on_how_much_is_computed_at_once(
    monkeypatch, make_pipeline, precision: str, rank: int
) -> None:
    """Within a picture that has more tokens than the smallest chunks. rank: of a LoRA."""
    request = dataclasses.replace(REQUEST, width=1024, height=1024, steps=1)
    options = {"precision": PRECISIONS[precision], "device": CUDA, "mode": "8-bit"}

    def painted() -> torch.Tensor:
        pipeline = with_lora(make_pipeline(**options), rank)
        return paint(pipeline, request, lambda *_: None, lambda: None)[1]

    made, found = pipeline_run.Chunking, []
    for tokens, groups in ((0, 1), (2048, 1), (256, 1), (256, 2)):
        forced = functools.partial(made, tokens, groups)
        monkeypatch.setattr(pipeline_run, "Chunking", lambda *rest, forced=forced: forced(rest[2]))
        found.append(painted())
    assert all(torch.equal(latents, found[0]) for latents in found)


@pytest.fixture
def int8_attention() -> Attention:
    if obstacle := int8_obstacle(CUDA, torch.bfloat16):
        pytest.skip(obstacle)
    return Attention(0)


@pytest.mark.parametrize("tokens", [48, 640, 1536, 4608])
@pytest.mark.parametrize("width", [3 * 3072, 7 * 3072])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_in_int8_is_that_of_float64(
    int8_attention: Attention, tokens: int, width: int, dtype: torch.dtype
) -> None:
    """Of normed queries and keys with outlying channels; and each head by itself is the same."""
    drawn = torch.Generator(CUDA).manual_seed(0)
    rows = torch.randn(1, tokens, width, device=CUDA, generator=drawn)
    qkv = rows[..., : 3 * 3072].unflatten(-1, (3, 24, 128))
    qkv[:, :, :2, :, 5] *= 4
    rows = rows.to(dtype)
    qkv = rows[..., : 3 * 3072]
    found = attend(qkv, 24, int8_attention)
    q, k, v = (x.transpose(1, 2).double() for x in qkv.unflatten(-1, (3, 24, 128)).unbind(2))
    exact = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert found.dtype == dtype
    assert (found - exact).norm() < 0.025 * exact.norm()
    one = torch.cat([part[..., :128] for part in qkv.chunk(3, dim=-1)], dim=-1)
    assert torch.equal(attend(one, 1, int8_attention), found[..., :128])


@pytest.mark.parametrize("precision", ["float8_e4m3fn", "int8 rotated"])
def test_a_picture_by_attention_in_int8_is_as_large_as_planned_and_like_the_other(
    make_pipeline, int8_attention: Attention, precision: str
) -> None:
    request = dataclasses.replace(REQUEST, width=1024, height=1024, steps=2)
    made = make_pipeline(precision=PRECISIONS[precision], device=CUDA, mode="8-bit")
    plain = paint(made, request, lambda *_: None, lambda: None)[1]
    compute = dataclasses.replace(made.compute, attention=int8_attention)
    pipeline = dataclasses.replace(made, compute=compute)
    first, again = (paint(pipeline, request, lambda *_: None, lambda: None) for _ in range(2))
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], plain)
    assert (first[1] - plain).norm() < 0.05 * plain.norm()
    smallest = pipeline.plan(request.workload).smallest_bytes
    limited = dataclasses.replace(pipeline, budget_bytes=smallest)
    _, latents, report = paint(limited, request, lambda *_: None, lambda: None)
    assert torch.equal(latents, first[1])
    assert report.peak_bytes <= smallest


def test_auto_finds_out_whether_int8_is_faster_here(make_pipeline) -> None:
    dit = make_pipeline(device=CUDA).dit
    found = choose_attention(dit, "auto", torch.bfloat16)
    assert (found.int8_from in ATTENTIONS) == (found.obstacle == "")
    assert choose_attention(dit, "auto", torch.bfloat16) == found, "measured once"
