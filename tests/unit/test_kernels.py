"""The operations between products: fused kernels against the plain ones, both against float64."""

import itertools

import pytest
import torch
from torch import _scaled_mm  # pyright: ignore[reportPrivateImportUsage]

from majicflux.engine.kernels import dispatch
from majicflux.engine.kernels.hadamard import hadamard, rotate
from majicflux.engine.kernels.matmul import (
    add_low_rank_,
    has_low_rank_kernels,
    low_rank_rows,
    product,
)
from majicflux.engine.kernels.ops import add_gated_, norm_modulate_quantize, rms_rope_
from majicflux.engine.kernels.row_format import LIMITS, ActivationFormat, QuantizedActivations
from majicflux.engine.quant.linear import StoredNorm

CUDA = pytest.param(
    torch.device("cuda", 0),
    marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason="NOT TESTED ON A CARD: no CUDA device"
    ),
)
DEVICES = [torch.device("cpu"), CUDA]


@pytest.fixture(autouse=True, params=["ours", "of comfy-kitchen"])
def whose(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card every test runs with each of the two sets of kernels; a CPU has none."""
    if request.param == "of comfy-kitchen":
        if not torch.cuda.is_available():
            pytest.skip("NOT TESTED ON A CARD: no CUDA device")
        monkeypatch.setattr(dispatch, "triton_works", lambda _: False)
        assert dispatch.kitchen_works(torch.device("cuda", 0))


WIDTH, TOKENS, BATCH = 512, 37, 2
FORMATS = [
    None,
    ActivationFormat(torch.int8, LIMITS[torch.int8], 256),
    ActivationFormat(torch.int8, LIMITS[torch.int8], 0),
    ActivationFormat(torch.float8_e4m3fn, LIMITS[torch.float8_e4m3fn], 0),
]
# What is prepared: rows alone, normed rows, GELU alone, rows beside GELU.
CASES = {"plain": (1, 0, 0), "norm": (1, 1, 0), "gelu": (0, 0, 1), "beside": (1, 0, 1)}


def random(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator)).to(device, torch.bfloat16)


def inputs(case: str, device: torch.device) -> tuple:
    """Strided, as slices of a wider product are."""
    with_x, with_norm, with_gelu = CASES[case]
    wide = random(BATCH, TOKENS + 3, 3 * WIDTH, device=device)
    x = wide[:, 3:, :WIDTH] if with_x else None
    gelu = wide[:, 3:, WIDTH:] if with_gelu else None
    modulation = random(BATCH, 1, 6 * WIDTH, device=device, seed=1).chunk(6, dim=-1)
    return x, modulation[1:3] if with_norm else None, gelu


def in_float64(x, norm, gelu, group: int) -> torch.Tensor:
    parts = []
    if x is not None:
        x = x.double()
        if norm is not None:
            shift, scale = (part.double() for part in norm)
            x = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        parts.append(x)
    if gelu is not None:
        parts.append(torch.nn.functional.gelu(gelu.double(), approximate="tanh"))
    return rotate(torch.cat(parts, dim=-1), group)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("case", "wanted"), list(itertools.product(CASES, FORMATS)))
def test_prepared_rows_are_those_of_float64(
    device, case: str, wanted: ActivationFormat | None
) -> None:
    x, norm, gelu = inputs(case, device)
    exact = in_float64(x, norm, gelu, wanted.group if wanted else 0)
    found = norm_modulate_quantize(x, norm, gelu, wanted)
    if wanted is None:
        assert isinstance(found, torch.Tensor)
        assert found.dtype == torch.bfloat16
        assert (found.double() - exact).norm() <= 5e-3 * exact.norm()
        return
    assert isinstance(found, QuantizedActivations)
    assert found.values.dtype == wanted.dtype
    # Every row uses the whole range of its format, and each value is off by half a step at most.
    assert (found.values.float().abs().amax(-1) >= 0.99 * wanted.limit).all()
    back = found.values.double() * found.scale.double()
    step = found.scale.double() if wanted.dtype == torch.int8 else (exact.abs() / 8 + found.scale)
    # The norm and GELU are rounded to bfloat16 where they are not fused.
    share = 0.008 if norm or gelu is not None else 1e-4
    rounding = share * exact.abs().amax(-1, keepdim=True)
    assert ((back - exact).abs() <= 0.501 * step + rounding).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", [*FORMATS, ActivationFormat(None, 0.0, 256)])
def test_a_float32_residual_is_rounded_once(device, wanted: ActivationFormat | None) -> None:
    """To the rows of a product in another dtype, and when what that gives is added."""
    x, norm, _ = inputs("norm", device)
    x, norm = 1.01 * x.float(), tuple(1.01 * part.float() for part in norm)
    exact = in_float64(x, norm, None, wanted.group if wanted else 0)
    rows = norm_modulate_quantize(x, norm, wanted=wanted, dtype=torch.bfloat16)
    if isinstance(rows, QuantizedActivations):
        assert rows.dtype == torch.bfloat16
        values, scale = rows.values.double(), 1 if rows.scale is None else rows.scale.double()
    else:
        values, scale = rows.double(), 1
    steps = {torch.int8: 1.0, torch.float8_e4m3fn: 32.0}
    if wanted is not None and wanted.dtype is not None:
        assert (values * scale - exact).abs().max() <= 0.501 * steps[wanted.dtype] * scale.max()
    else:
        assert (values - exact).norm() <= 2.5e-3 * exact.norm()
    y, gate = random(*x.shape, device=device, seed=7), norm[0]
    sums = x.clone()
    add_gated_(sums, gate, y.clone())
    assert torch.allclose(sums.double(), x.double() + gate.double() * y.double(), rtol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_zeros_and_outliers(device) -> None:
    for wanted in FORMATS[1:]:
        x = torch.zeros(1, 3, WIDTH, device=device, dtype=torch.bfloat16)
        x[0, 1, 7] = 1e4
        rows = norm_modulate_quantize(x, wanted=wanted)
        assert isinstance(rows, QuantizedActivations)
        back = rotate(rows.values.float() * rows.scale, wanted.group)
        assert torch.isfinite(back).all()
        assert not back[0, 0].any()
        assert back[0, 1, 7].item() == pytest.approx(1e4, rel=0.04)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 2])
def test_norm_and_rope_are_those_of_float64(device, batch: int) -> None:
    heads, half = 2, 64
    qkv = random(batch, TOKENS, 3 * heads * 2 * half + 64, device=device)[..., :-64]
    angle = torch.rand(1, 1, TOKENS, half, device=device) * 6
    rope = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1)
    rope = rope.unflatten(-1, (2, 2))
    norms = []
    for seed in (3, 4):
        norm = StoredNorm(2 * half, 1e-6, torch.bfloat16).to_empty(device=device)
        norm.weight.data.copy_(random(2 * half, device=device, seed=seed))
        norms.append(norm)
    exact = []
    for part, norm in zip(qkv.double().chunk(3, dim=-1), norms, strict=False):
        x = part.unflatten(-1, (heads, half, 2))
        x = x / (x.square().mean((-1, -2), keepdim=True) + 1e-6).sqrt()
        x = x * norm.weight.double().view(half, 2)
        cos, sin = (f(angle.double())[:, 0, :, None] for f in (torch.cos, torch.sin))
        turned = (cos * x[..., 0] - sin * x[..., 1], sin * x[..., 0] + cos * x[..., 1])
        exact.append(torch.stack(turned, -1).flatten(2))
    values = qkv.chunk(3, dim=-1)[2].clone()
    rms_rope_(qkv, *(norm.weight for norm in norms), rope, heads)
    q, k, v = qkv.double().chunk(3, dim=-1)
    for found, right in ((q, exact[0]), (k, exact[1])):
        assert (found - right).norm() <= 5e-3 * right.norm()
    assert torch.equal(v, values.double())


def test_the_hadamard_matrix_is_its_own_inverse_and_comfyuis() -> None:
    for size in (4, 16, 64, 256):
        matrix = hadamard(size, torch.device("cpu"), torch.float64)
        assert torch.allclose(matrix @ matrix, torch.eye(size, dtype=torch.float64))
        assert torch.equal(matrix, matrix.to(torch.bfloat16).double())
    utils = pytest.importorskip("comfy_kitchen.tensor.int8_utils")
    theirs = utils._build_hadamard(256, "cpu", torch.float64)
    assert torch.equal(hadamard(256, torch.device("cpu"), torch.float64), theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED ON A CARD: no CUDA device")
def test_every_byte_is_dequantized_as_pytorch_does() -> None:
    from majicflux.engine.kernels.fused_triton import dequantize

    every = torch.arange(256, dtype=torch.uint8, device="cuda").view(2, 128)
    scale = torch.tensor([0.3, 7.0], device="cuda")
    for dtype in (torch.int8, torch.float8_e4m3fn):
        found = torch.empty(2, 128, dtype=torch.bfloat16, device="cuda")
        dequantize(every.view(dtype), scale, found)
        right = (every.view(dtype).float() * scale[:, None]).bfloat16()
        assert torch.equal(found.nan_to_num(1e6), right.nan_to_num(1e6))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED ON A CARD: no CUDA device")
def test_a_kernel_that_was_found_once_is_not_taken_for_other_arguments() -> None:
    """Aligned, then a little beside; one row and many; strides of 16 and of other numbers."""
    from majicflux.engine.kernels import fused_triton

    if not dispatch.triton_works(torch.device("cuda", 0)):
        pytest.skip("tested with our own kernels")
    x = random(1, 40, WIDTH + 64, device=torch.device("cuda", 0))
    for rows, first, row in itertools.product(
        (1, 16, 37), (0, 1, 16), (WIDTH, WIDTH + 8, WIDTH + 9)
    ):
        for _ in range(2):
            some = x.flatten()[first:].as_strided((1, rows, WIDTH), (0, row, 1))
            found, _ = fused_triton.norm_modulate_quantize(some, None, None, 0.0, torch.float32)
            assert torch.equal(found, some.float())


def sums_of_units(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x weight^T as a card's units add it up, by PyTorch: those of float8 keep 13 binary places."""
    if x.dtype == torch.int8:
        return x.double() @ weight.double().T
    one = torch.ones((), device=x.device)
    given = x, weight.T, one, one
    return _scaled_mm(*given, out_dtype=torch.float32, use_fast_accum=True).double()


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("ranks", [16, 32, 48, 64, 96, 112, 160, 256])
@pytest.mark.parametrize("wanted", [FORMATS[1], FORMATS[3]], ids=["int8", "float8"])
def test_few_ranks_join_the_product(device, wanted, ranks: int) -> None:
    """Against the sums of PyTorch's product and float64 for all else, with other ranks in each
    tile of columns; the same bits for some rows or columns as for all."""
    x = norm_modulate_quantize(random(1, 1000, WIDTH, device=device), wanted=wanted)
    if not dispatch.triton_works(device) or not dispatch.terms_join_product(device, wanted.dtype):
        pytest.skip("tested with our own kernels")
    assert has_low_rank_kernels(x)
    columns = 2 * 128 + 48
    weight = random(columns, WIDTH, device=device, seed=1).mul(30).clamp(-127, 127)
    weight = weight.to(wanted.dtype)
    scale = random(columns, device=device, seed=2).float().abs() / 1000
    bias = random(columns, device=device, seed=3)
    low = random(1000, ranks + 32, device=device, seed=4)
    up = random(columns, ranks, device=device, seed=5)
    first_ranks = torch.tensor([32, 0, 16], dtype=torch.int32, device=device)
    given = weight, scale, bias
    found = product(x, *given, added=(low[None], up, first_ranks))[0]
    sums = sums_of_units(x.values[0], weight)
    of_float64 = x.values[0].double() @ weight.double().T
    assert (sums - of_float64).norm() <= 3e-3 * of_float64.norm()
    plain = sums * x.scale[0] * scale + bias
    exact = plain.clone()
    for tile, first in enumerate(first_ranks.tolist()):
        some = slice(128 * tile, 128 * (tile + 1))
        exact[:, some] += low[:, first : first + ranks].double() @ up[some].double().T
    of_terms = exact - plain
    assert ((found - exact).abs() <= 2**-8 * exact.abs() + 1e-3 * exact.std()).all()
    for rows in (slice(0, 1), slice(40, 77), slice(512, None)):
        few = QuantizedActivations(x.values[:, rows], x.scale[:, rows], x.dtype)
        part = product(few, *given, added=(low[None, rows], up, first_ranks))
        assert torch.equal(part[0], found[rows])
    some = slice(128, None)
    added = low[None], up[some], first_ranks[1:]
    part = product(x, weight[some], scale[some], bias[some], added=added)
    assert torch.equal(part[0], found[:, some])
    assert (product(x, *given)[0] - plain).norm() <= 3e-3 * plain.norm()
    for rows in (slice(None), slice(0, 1), slice(40, 77)):
        y = (plain - bias).bfloat16()[rows]
        exact = y.double() + of_terms[rows]
        add_low_rank_(y, (low[None, rows], up, first_ranks))
        assert ((y - exact).abs() <= 2**-8 * exact.abs() + 1e-3 * exact.std()).all()


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("wanted", [FORMATS[1], FORMATS[3]], ids=["int8", "float8"])
@pytest.mark.parametrize(
    ("ranks", "deep"),
    [(16, 0), (32, 0), (48, 0), (48, 8192), (64, 0), (96, 0), (96, 8192), (256, 0)],
)
def test_rows_of_few_ranks_are_those_of_float64(device, wanted, ranks: int, deep: int) -> None:
    """At a width that fills no step, and the same bits for some rows as for all."""
    width = deep + (1280 if wanted.group else 1232)
    x = norm_modulate_quantize(random(1, 1000, width, device=device), wanted=wanted)
    if not dispatch.triton_works(device):
        pytest.skip("tested with our own kernels")
    assert has_low_rank_kernels(x)
    down = random(ranks, width, device=device, seed=1).mul(30).clamp(-127, 127).to(wanted.dtype)
    scale = random(ranks, device=device, seed=2).float().abs() / 1000
    found = low_rank_rows(x, down, scale)
    exact = (x.values[0].double() * x.scale[0]) @ (down.double() * scale[:, None]).T
    assert len(found) == (2 if deep and ranks <= 64 else 1)
    assert (found.double().sum(0) - exact).norm() <= 3e-3 * exact.norm()
    for rows in (slice(0, 1), slice(40, 77), slice(512, None)):
        few = QuantizedActivations(x.values[:, rows], x.scale[:, rows], x.dtype)
        assert torch.equal(low_rank_rows(few, down, scale), found[:, rows])
