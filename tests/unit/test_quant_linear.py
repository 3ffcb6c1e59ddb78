"""Weights in 8 bits: how they are quantized, and the layer that holds them."""

import pytest
import torch

from majicflux.engine.kernels.hadamard import rotate
from majicflux.engine.kernels.row_format import FLOAT8_DTYPE, LIMITS
from majicflux.engine.quant.formats import BFLOAT16, FLOAT8, INT8_ROTATED
from majicflux.engine.quant.linear import StoredLinear
from majicflux.engine.quant.quantize import float32_of, holds_nan, quantize_rows

FLOAT8_MAX = LIMITS[FLOAT8_DTYPE]
HALF_STEP = 2**-4  # e4m3 has 3 mantissa bits: a normal number is off by at most 1/16 of itself


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(weight.shape[0])
    quantize_rows(weight, stored, scale)
    return stored, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (4097, 8)])
@pytest.mark.parametrize("size", [1e-6, 0.02, 300.0])
def test_each_value_is_within_half_a_step_of_float64(dtype, shape, size) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) * size).to(dtype)
    stored, scale = quantized(weight)
    back = stored.double() * scale.double()[:, None]
    exact = weight.double()
    # Below 2^-6 of the scaled range the format has a fixed step of 2^-9.
    bound = (exact.abs() * HALF_STEP).maximum(scale.double()[:, None] * 2**-10) * (1 + 1e-6)
    assert ((back - exact).abs() <= bound).all()


def test_the_largest_value_of_a_row_uses_the_whole_range() -> None:
    stored, _ = quantized(torch.tensor([[1e-4, -2e-4], [50.0, 3.0]]))
    assert stored.float().abs().amax(dim=1).tolist() == [FLOAT8_MAX, FLOAT8_MAX]


def test_rows_do_not_share_their_scale() -> None:
    _, scale = quantized(torch.tensor([[0.001, 0.0], [1000.0, 0.0]]))
    assert scale[1] / scale[0] == pytest.approx(1e6)


def test_the_source_is_left_as_it_was() -> None:
    weight = torch.randn(4, 4)
    before = weight.clone()
    quantized(weight)
    assert torch.equal(weight, before)


def test_a_row_of_zeros_stays_zero() -> None:
    stored, scale = quantized(torch.zeros(2, 8))
    assert not stored.float().any()
    assert torch.isfinite(scale).all()


def test_float8_weights_pass_through_exactly() -> None:
    weight = torch.randn(64, 64).to(torch.float8_e4m3fn)
    stored, scale = quantized(weight)
    assert torch.equal(stored.view(torch.uint8), weight.view(torch.uint8))
    assert (scale == 1).all()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_no_scale_can_save_is_refused(bad: float) -> None:
    weight = torch.ones(3, 3)
    weight[1, 1] = bad
    with pytest.raises(ValueError, match="infinity or a NaN"):
        quantized(weight)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_float8_is_what_pytorch_makes_of_it(dtype: torch.dtype) -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    for chosen in (bits, bits[~bits.view(dtype).float().isnan()]):
        values = chosen.view(dtype)
        found = float32_of(values)
        assert torch.equal(found.nan_to_num(1000.0), values.float().nan_to_num(1000.0))
        if dtype == FLOAT8_DTYPE:
            assert holds_nan(values) == found.isnan().any()
    assert torch.equal(chosen, values.view(torch.uint8)), "the source is left as it was"


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_dequantized_weight_in_float64(bias: bool) -> None:
    layer = StoredLinear(32, 16, bias, FLOAT8).to_empty(device="cpu")
    with torch.no_grad():
        quantize_rows(torch.randn(16, 32), layer.weight, layer.scale)
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(16))
    x = torch.randn(5, 32)
    exact = x.double() @ (layer.weight.double() * layer.scale.double()[:, None]).T
    if layer.bias is not None:
        exact += layer.bias.double()
    assert torch.allclose(layer(x).double(), exact, atol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_a_bfloat16_weight_is_multiplied_as_torch_does() -> None:
    plain = torch.nn.Linear(32, 16).bfloat16()
    layer = StoredLinear(32, 16, True, BFLOAT16).to_empty(device="cpu")
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(5, 32).bfloat16()
    assert torch.equal(layer(x), plain(x))


def test_the_product_leaves_the_stored_weight_as_it_was() -> None:
    layer = StoredLinear(8, 8, False, FLOAT8).to_empty(device="cpu")
    with torch.no_grad():
        quantize_rows(torch.randn(8, 8), layer.weight, layer.scale)
    before = layer.weight.view(torch.uint8).clone()
    layer(torch.randn(2, 8))
    assert torch.equal(layer.weight.view(torch.uint8), before)


def rotated_int8(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    stored, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(weight.shape[0])
    quantize_rows(weight, stored, scale, group)
    return stored, scale


@pytest.mark.parametrize("group", [0, 4, 64, 256])
@pytest.mark.parametrize("shape", [(1, 256), (5, 512), (3000, 256)])
@pytest.mark.parametrize("size", [1e-35, 1e-6, 0.02, 1e4])
def test_int8_is_within_half_a_step_of_float64(group: int, shape, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * size
    stored, scale = rotated_int8(weight, group)
    exact = rotate(weight.double(), group)
    back = stored.double() * scale.double()[:, None]
    # The rotation is done in float32.
    bound = scale.double()[:, None] * 0.5 + 1e-6 * exact.abs().amax(dim=1, keepdim=True)
    assert ((back - exact).abs() <= bound).all()
    assert (stored.int().abs().amax(dim=1) == 127).all()


@pytest.mark.parametrize("group", [0, 256])
def test_int8_of_zeros_denormals_and_one_outlier(group: int) -> None:
    weight = torch.zeros(4, 256)
    weight[1] = 1e-44  # a denormal: as good as zero
    weight[2, 3] = 1000.0
    weight[3] = torch.finfo(torch.float32).max / 512
    stored, scale = rotated_int8(weight, group)
    back = rotate(stored.double() * scale.double()[:, None], group)
    assert torch.isfinite(scale).all()
    assert not back[0].any()
    assert back[1].abs().max() < 1e-30
    assert back[2, 3] == pytest.approx(1000.0, rel=0.01)
    assert (back - weight.double()).norm() <= 0.01 * weight.double().norm()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_no_scale_can_save_is_refused_rotated_too(bad: float) -> None:
    weight = torch.ones(3, 256)
    weight[1, 1] = bad
    with pytest.raises(ValueError, match="infinity or a NaN"):
        rotated_int8(weight, 256)


def test_a_rotation_spreads_an_outlier() -> None:
    """Why int8 needs it: beside one outlier, small weights would round to zero."""
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[:, 9] = 5.0
    error = {}
    for group in (0, 256):
        stored, scale = rotated_int8(weight, group)
        back = rotate(stored.double() * scale.double()[:, None], group)
        error[group] = (back - weight).norm().item()
    assert error[256] < 0.2 * error[0]


def test_a_rotation_turns_back_and_keeps_its_length() -> None:
    x = torch.randn(3, 5, 768, dtype=torch.float64)
    for group in (4, 16, 64, 256):
        assert torch.allclose(rotate(rotate(x, group), group), x)
        assert torch.allclose(rotate(x, group).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize(
    ("width", "group"), [(3072, 256), (15360, 256), (192, 64), (24, 4), (30, 0), (7, 0)]
)
def test_the_widest_rotation_that_fits(width: int, group: int) -> None:
    assert StoredLinear(width, 8, False, INT8_ROTATED).group == group


def test_float8_of_a_denormal_is_as_good_as_zero() -> None:
    stored, scale = quantized(torch.full((2, 4), 1e-44))
    assert torch.isfinite(stored.float() * scale[:, None]).all()
