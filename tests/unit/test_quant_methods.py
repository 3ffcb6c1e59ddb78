"""The ways to multiply a stored weight, and which is chosen where."""

import pytest
import torch
from live_bytes import LiveBytes
from torch import _int_mm  # pyright: ignore[reportPrivateImportUsage]
from torch._subclasses.fake_tensor import FakeTensorMode

from majicflux.engine.flux.geometry import FluxGeometry
from majicflux.engine.flux.transformer import build_flux_dit
from majicflux.engine.kernels import dispatch, libraries, matmul
from majicflux.engine.kernels.hadamard import rotate
from majicflux.engine.kernels.libraries import kitchen_int8_product
from majicflux.engine.kernels.reference import quantize_activations
from majicflux.engine.kernels.row_format import QuantizedActivations
from majicflux.engine.quant import methods
from majicflux.engine.quant.compute import ComputePrecision, choose_compute
from majicflux.engine.quant.formats import (
    BFLOAT16,
    FLOAT8,
    FLOAT8_UNSCALED,
    INT8_ROTATED,
    PRECISIONS,
    Storage,
    uniform,
)
from majicflux.engine.quant.linear import StoredLinear
from majicflux.engine.quant.methods import Dequantized, EightBit
from majicflux.engine.quant.quantize import quantize_rows
from majicflux.engine.run.pipeline import paint
from majicflux.engine.run.request import GenerationRequest

CPU = torch.device("cpu")
INT8 = Storage("int8", scaled=True)
STORAGES = [FLOAT8, FLOAT8_UNSCALED, INT8_ROTATED, INT8]


def filled(storage: Storage, width: int = 512, columns: int = 48, bias: bool = True):
    """A layer with heavy-tailed weights, and these weights in float64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(columns, width, generator=generator) * 0.02
    weight[:, 5] *= 20
    layer = StoredLinear(width, columns, bias, storage).to_empty(device="cpu")
    if layer.scale is None:
        layer.weight.data.copy_(weight)
    else:
        quantize_rows(weight, layer.weight.data, layer.scale.data, layer.group)
    if layer.bias is not None:
        layer.bias.data.copy_(torch.randn(columns, generator=generator))
    return layer, weight.double()


def stored_weight(layer: StoredLinear) -> torch.Tensor:
    """What the layer stands for, in float64 and unrotated."""
    scale = 1 if layer.scale is None else layer.scale.double()[:, None]
    return rotate(layer.weight.double() * scale, layer.group)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("storage", [BFLOAT16, *STORAGES], ids=str)
def test_float32_rows_stay_so_in_a_run_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, storage: Storage, eight_bit: bool
) -> None:
    """The modulation's and the last layer's: in pieces, so that no whole weight is converted."""
    monkeypatch.setattr(methods, "FEW_ROWS", 1)
    monkeypatch.setattr(methods, "CONVERTED_AT_ONCE", 10 * 512)
    layer, _ = filled(storage)
    with LiveBytes("cpu") as live:
        layer.method = Dequantized([layer], CPU, torch.bfloat16)
        if eight_bit:
            layer.method = EightBit([layer.weight.dtype], CPU, layer.method)
        x = torch.randn(1, 3, 512, generator=torch.Generator().manual_seed(1))
        found = layer(x)
    assert found.dtype == torch.float32
    exact = x.double() @ stored_weight(layer).T + layer.bias.double()
    assert relative(found, exact) < 1e-6
    assert relative(layer(x, columns=slice(5, 40)), exact[..., 5:40]) < 1e-6
    # A piece and little else, not all 48 rows.
    assert live.peak < 2 * 10 * 512 * 4


def in_8_bits(layer: StoredLinear) -> EightBit:
    return EightBit([layer.weight.dtype], CPU, Dequantized([layer], CPU, torch.float32))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_dequantized_is_the_product_of_float64(storage: Storage, bias: bool) -> None:
    layer, _ = filled(storage, bias=bias)
    layer.method = Dequantized([layer], CPU, torch.float32)
    x = torch.randn(2, 5, 512)
    exact = x.double() @ stored_weight(layer).T + (layer.bias.double() if bias else 0)
    assert relative(layer(layer.rows(x)), exact) < 1e-6
    assert relative(layer(x), exact) < 1e-6
    out = torch.empty(2, 5, 48)
    layer(layer.rows(x), out=out)
    assert relative(out, exact) < 1e-6


def test_one_buffer_serves_every_matrix() -> None:
    """No second copy of a weight in the dtype of the activations, whatever its size."""
    layers = [filled(FLOAT8, width, columns)[0] for width, columns in ((64, 32), (512, 48))]
    product = Dequantized(layers, CPU, torch.float32)
    assert product.buffer.numel() == 512 * 48
    for layer in layers:
        layer.method = product
        layer(torch.randn(1, 3, layer.weight.shape[1]))
        kept = product.buffer[: layer.weight.numel()].view(layer.weight.shape)
        assert torch.equal(kept, layer.weight.float() * layer.scale[:, None])
    layer, _ = filled(BFLOAT16)
    layer.method = Dequantized([layer], CPU, torch.bfloat16)
    layer(torch.randn(1, 3, 512).bfloat16())
    assert "buffer" not in vars(layer.method)  # nothing had to be converted


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_8_bits_are_the_product_of_what_was_rounded(storage: Storage, bias: bool) -> None:
    layer, weight = filled(storage, bias=bias)
    layer.method = in_8_bits(layer)
    x = torch.randn(2, 80, 512)
    rows = layer.rows(x)
    assert isinstance(rows, QuantizedActivations)
    assert rows.values.dtype == layer.weight.dtype
    scale = 1 if layer.scale is None else layer.scale.double()[:, None]
    exact = (rows.values.double() * rows.scale.double()) @ (layer.weight.double() * scale).T
    exact += layer.bias.double() if bias else 0
    assert relative(layer(rows), exact) < 1e-5
    assert relative(layer(x), exact) < 1e-5  # rows that come as they are, are quantized
    assert relative(rotate(rows.values.double() * rows.scale, layer.group), x.double()) < 0.04
    assert relative(stored_weight(layer), weight) < 0.06


def test_sums_of_int8_are_exact() -> None:
    layer, _ = filled(INT8, width=4096, columns=8, bias=False)
    layer.weight.data.fill_(127)
    layer.scale.data.fill_(1.0)
    layer.method = in_8_bits(layer)
    values = torch.full((1, 2000, 4096), -127, dtype=torch.int8)
    rows = QuantizedActivations(values, torch.ones(1, 2000, 1), torch.float32)
    assert (layer(rows) == -127 * 127 * 4096).all()


def test_a_few_rows_are_not_rounded() -> None:
    """The modulation layers act on one: rounding it would save nothing."""
    layer, _ = filled(INT8_ROTATED)
    layer.method = in_8_bits(layer)
    x = torch.randn(1, 1, 512)
    assert relative(layer(x), x.double() @ stored_weight(layer).T + layer.bias.double()) < 1e-6


def test_a_shape_that_the_units_do_not_take_is_dequantized() -> None:
    layer = StoredLinear(24, 40, True, INT8_ROTATED).to_empty(device=CPU)
    weight = torch.randn(40, 24)
    quantize_rows(weight, layer.weight.data, layer.scale.data, layer.group)
    layer.bias.data.zero_()
    layer.method = in_8_bits(layer)
    x = torch.randn(1, 160, 24)
    assert isinstance(layer.rows(x), torch.Tensor) or layer.rows(x).scale is None
    assert relative(layer(layer.rows(x)), x.double() @ stored_weight(layer).T) < 1e-5


@pytest.mark.parametrize("message", ["CUBLAS_STATUS_ALLOC_FAILED when calling", "no such kernel"])
def test_one_bad_moment_costs_nothing_later(monkeypatch, message: str) -> None:
    layer, _ = filled(INT8_ROTATED)
    layer.method = in_8_bits(layer)
    x = torch.randn(1, 160, 512)
    before = layer(layer.rows(x))
    with monkeypatch.context() as patched:

        def fail(*_: object) -> torch.Tensor:
            raise RuntimeError(message)

        patched.setattr(matmul, "_int_mm", fail)
        with pytest.raises(RuntimeError, match=message):
            layer(layer.rows(x))
    assert torch.equal(layer(layer.rows(x)), before)


@pytest.mark.usefixtures("products_as_they_are")
@pytest.mark.parametrize("rows", [1, 12, 16, 1024 + 12, 2 * 1024 + 1])
def test_a_product_of_int8_takes_any_number_of_rows(monkeypatch, rows: int) -> None:
    """cuBLAS refuses 16 rows and fewer, also as the tail of many."""
    multiply = matmul._int_mm

    def as_on_a_card(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert len(a) > 16
        return multiply(a, b)

    monkeypatch.setattr(matmul, "_int_mm", as_on_a_card)
    layer, _ = filled(INT8_ROTATED)
    layer.method = in_8_bits(layer)
    x = torch.randn(1, rows, 512)
    found = quantize_activations(x, layer.method.wanted(layer), x.dtype)
    exact = (found.values.double() * found.scale) @ (
        layer.weight.double() * layer.scale[:, None]
    ).T + layer.bias.double()
    assert relative(layer(found), exact) < 1e-6


SMALL = FluxGeometry(hidden=256, double_blocks=1, single_blocks=1, text_width=64)
CARD = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch):
    """A card of some compute capability, with or without the libraries of kernels."""

    def make(capability: tuple[int, int] | None, triton: bool, kitchen: bool) -> None:
        monkeypatch.setattr(dispatch, "capability", lambda _: capability)
        monkeypatch.setattr(dispatch, "triton_works", lambda _: triton)
        monkeypatch.setattr(dispatch, "int8_product_works", lambda _: triton)
        monkeypatch.setattr(dispatch, "kitchen_works", lambda _: kitchen)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Card")

    return make


@pytest.mark.parametrize(
    ("capability", "triton", "kitchen", "float8", "int8"),
    [
        ((9, 0), True, True, True, True),  # H200
        ((12, 0), True, True, True, True),  # RTX 50
        ((8, 9), True, True, True, True),  # RTX 40
        ((8, 9), False, True, True, True),  # RTX 40 on Windows without Triton
        ((8, 9), False, False, True, False),
        ((8, 6), True, True, False, True),  # RTX 30
        ((7, 5), False, True, False, True),  # RTX 20
        ((6, 1), False, True, False, False),  # GTX 10
        (None, False, False, False, False),  # not NVIDIA
    ],
)
def test_auto_takes_8_bits_where_the_card_is_fast_in_them(
    card, capability, triton: bool, kitchen: bool, float8: bool, int8: bool
) -> None:
    card(capability, triton, kitchen)
    for name, expected in (("float8_e4m3fn", float8), ("int8 rotated", int8)):
        module = build_flux_dit(SMALL, PRECISIONS[name]).module
        dtype = getattr(torch, name.split(" ")[0])
        found = choose_compute(module, CARD, "auto", torch.bfloat16)
        assert found.eight_bit == (frozenset([dtype]) if expected else frozenset()), name
        assert found.dtype == torch.bfloat16
        assert (str(dtype)[6:] if expected else "bfloat16") in found.report.split(" on ")[0]
        slow = name == "float8_e4m3fn" and not triton
        assert ("(" in found.report) == (not expected or slow)
        if expected and slow:
            assert found.report.endswith(
                "(no fused kernels for float8_e4m3fn: Triton is not installed or does not work)"
            )
    plain = choose_compute(build_flux_dit(SMALL, PRECISIONS["bfloat16"]).module, CARD, "auto",
                   torch.float32)  # fmt: skip
    assert (plain.dtype, plain.eight_bit) == (torch.float32, frozenset())


def test_the_report_names_the_better_format_for_the_card(card) -> None:
    card((8, 6), True, True)
    module = build_flux_dit(SMALL, PRECISIONS["float8_e4m3fn"]).module
    assert choose_compute(module, CARD, "auto", torch.bfloat16).report == (
        "computes in bfloat16 on Some Card, compute capability 8.6 (float8_e4m3fn matrix units "
        "begin with compute capability 8.9, int8 rotated weights would be faster)"
    )


@pytest.mark.usefixtures("narrow")
def test_8_bits_can_be_had_on_a_cpu_and_need_8_bits(make_pipeline) -> None:
    module = build_flux_dit(SMALL, PRECISIONS["int8 rotated"]).module
    assert choose_compute(module, CPU, "8-bit", torch.float32).eight_bit == {torch.int8}
    assert not choose_compute(module, CPU, "auto", torch.float32).eight_bit
    plain = choose_compute(module, CPU, "bfloat16", torch.float32)
    assert plain == ComputePrecision(torch.bfloat16)
    assert plain.report == "computes in bfloat16"
    with pytest.raises(ValueError, match="takes weights in 8 bits, and this transformer has none"):
        choose_compute(build_flux_dit(SMALL, uniform(BFLOAT16)).module, CPU, "8-bit", torch.float32)


def test_kitchens_product_is_left_to_cards_that_it_was_made_for(card) -> None:
    for capability, expected in (((7, 5), True), ((8, 6), True), ((8, 9), True), ((9, 0), False),
                                 ((10, 0), False), ((12, 0), True)):  # fmt: skip
        card(capability, True, True)
        assert dispatch.kitchen_is_faster(CARD) == expected
        card(capability, True, False)
        assert not dispatch.kitchen_is_faster(CARD)
    card((9, 0), False, True)
    assert dispatch.kitchen_is_faster(CARD)


def test_products_of_int8_in_the_tests_are_pytorchs() -> None:
    a, b = (torch.randint(-127, 128, (40, 15360), dtype=torch.int8) for _ in range(2))
    a[0] = b[0] = 127
    assert torch.equal(matmul._int_mm(a, b.T), _int_mm(a, b.T))


@pytest.mark.parametrize("group", [256, 0])
def test_kitchens_product_is_ours(group: int) -> None:
    """The library that ComfyUI ships, on its plain back end, with our weights."""
    pytest.importorskip("comfy_kitchen")
    layer, _ = filled(Storage("int8", scaled=True, rotated=group))
    x = torch.randn(1, 160, 512)
    layer.method = in_8_bits(layer)
    assert relative(kitchen_int8_product(x, *layer.matrix(), layer.group), layer(x).double()) < 2e-3


# Peak signal to noise against bfloat16, in dB, of a picture that random weights paint.
LEAST = {
    ("float8_e4m3fn", "bfloat16"): 42,
    ("float8_e4m3fn", "8-bit"): 41,
    ("int8 rotated", "bfloat16"): 47,
    ("int8 rotated", "8-bit"): 46,
    ("float8_e4m3fn unscaled", "bfloat16"): 35,
}


def test_a_picture_in_each_precision(make_pipeline) -> None:
    request = GenerationRequest("a cat", seed=3, steps=4, guidance=3.5, width=128, height=128)

    def latents(precision: str, mode: str) -> torch.Tensor:
        pipeline = make_pipeline(precision=PRECISIONS[precision], mode=mode)
        return paint(pipeline, request, lambda *_: None, lambda: None)[0]

    exact = latents("bfloat16", "bfloat16")
    found = {key: (-10 * (latents(*key) - exact).square().mean().log10()).item() for key in LEAST}
    assert all(found[key] >= least for key, least in LEAST.items()), found
    assert found["int8 rotated", "bfloat16"] > found["float8_e4m3fn", "bfloat16"]
    assert found["float8_e4m3fn", "bfloat16"] > found["float8_e4m3fn unscaled", "bfloat16"]
    assert found["int8 rotated", "8-bit"] > found["float8_e4m3fn", "8-bit"]


@pytest.mark.parametrize("row_scales", [True, False], ids=["row scales", "rescaled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_card_adds_a_bias_that_is_kept_in_float8(monkeypatch, row_scales: bool, dtype) -> None:
    """As files without scales have it, which no product of a card takes."""
    monkeypatch.setattr(dispatch, "float8_takes_row_scales", lambda _: row_scales)
    monkeypatch.setattr(dispatch, "fused", lambda _: False)
    biases = []

    def scaled(x, weight, *scales, out, bias=None, **_):
        assert bias is None or out.dtype != torch.float32  # of PyTorch's product on a card
        biases.append(bias)

    monkeypatch.setattr(libraries, "_scaled_mm", scaled)
    monkeypatch.setattr(matmul, "_scaled_mm", scaled)
    monkeypatch.setattr(matmul, "rescale_", lambda *given: biases.append(given[-1]))
    layer = StoredLinear(512, 48, True, FLOAT8_UNSCALED)
    assert layer.bias.dtype == layer.weight.dtype
    with FakeTensorMode():  # a card of which only dtypes and shapes are known
        parts = layer.weight, layer.bias
        on_card = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in parts]
        monkeypatch.setattr(layer, "matrix", lambda _: (on_card[0], None, on_card[1]))
        values = torch.empty(1, 40, 512, device="cuda", dtype=layer.weight.dtype)
        rows = QuantizedActivations(values, torch.ones(1, 40, 1, device="cuda"), dtype)
        plain = Dequantized([layer], CPU, rows.dtype)
        EightBit([layer.weight.dtype], CPU, plain)(layer, rows, None, slice(None))
    assert biases[-1].dtype == dtype
