"""What adapters add beside the stored weights."""

import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_terms import (
    CLIP_LAYER,
    COLUMNS,
    WIDTH,
    adapter_of,
    delta,
    latents,
    relative,
    term,
    with_adapters,
)

from majicflux.engine import kernels as kernels_package
from majicflux.engine.kernels import dispatch
from majicflux.engine.kernels.hadamard import rotate
from majicflux.engine.kernels.row_format import LIMITS
from majicflux.engine.offload.weight_block import CPU
from majicflux.engine.quant.adapters import adapted, row_gains, touched
from majicflux.engine.quant.compute import ComputePrecision
from majicflux.engine.quant.formats import (
    BFLOAT16,
    FLOAT8,
    INT8_ROTATED,
    PRECISIONS,
    Storage,
    uniform,
)
from majicflux.engine.quant.linear import StoredLinear
from majicflux.engine.quant.low_rank import Adapter
from majicflux.engine.quant.methods import Dequantized, EightBit
from majicflux.engine.quant.quantize import quantize_rows

FLOAT32 = uniform(Storage("float32"))


class OneLayer(torch.nn.Module):
    """A stored layer named `layer`, and its weights in float64."""

    def __init__(self, storage: Storage, columns: int = COLUMNS):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(columns, WIDTH, generator=generator) * 0.02
        self.layer = StoredLinear(WIDTH, columns, True, storage).to_empty(device="cpu")
        if self.layer.scale is None:
            self.layer.weight.data.copy_(weight)
        else:
            quantize_rows(weight, self.layer.weight.data, self.layer.scale.data, self.layer.group)
        self.layer.bias.data.copy_(torch.randn(columns, generator=generator))
        self.exact = weight.double()


def use(layer: StoredLinear, eight_bit: bool) -> None:
    plain = Dequantized([layer], CPU, torch.float32)
    layer.method = EightBit({layer.weight.dtype}, CPU, plain) if eight_bit else plain


CASES = [
    (BFLOAT16, False),
    (FLOAT8, False),
    (FLOAT8, True),
    (INT8_ROTATED, False),
    (INT8_ROTATED, True),
]


@pytest.mark.parametrize(("storage", "eight_bit"), CASES)
def test_error_with_adapters_is_that_without(storage: Storage, eight_bit: bool) -> None:
    """Two terms on all columns, one on some, in the format of the rows."""
    model = OneLayer(storage)
    layer, strengths = model.layer, (1.0, -0.7)
    use(layer, eight_bit)
    terms = [(term(8), term(5, columns=32, first=48, seed=1)), (term(16, seed=2),)]
    adapters = [
        (Adapter({"layer": some}), strength)
        for some, strength in zip(terms, strengths, strict=True)
    ]
    x = torch.randn(1, 160, WIDTH, generator=torch.Generator().manual_seed(1))
    bias = layer.bias.double()
    without = relative(layer(layer.rows(x)) - bias, x.double() @ model.exact.T)
    weight = model.exact.clone()
    for some, strength in zip(terms, strengths, strict=True):
        weight += sum(delta(each, COLUMNS, strength) for each in some)
    stored = layer.weight.clone().view(torch.uint8)
    exact = x.double() @ weight.T
    with adapted(model, adapters, ["layer"], torch.float32, CPU):
        rows = layer.rows(x)
        assert isinstance(rows, torch.Tensor) == (storage in (BFLOAT16, FLOAT8) and not eight_bit)
        found = layer(rows)
        assert relative(found - bias, exact) <= without * 1.01
        out = torch.empty(1, 160, COLUMNS)
        assert torch.equal(layer(rows, out=out), found)
        for columns in (slice(0, 40), slice(40, 64), slice(64, None)):
            part = layer(rows, columns=columns)
            assert relative(part, found[..., columns].double()) < 1e-6
        few = x[:, :1]
        assert relative(layer(few) - bias, few.double() @ weight.T) <= max(without, 1e-3) * 1.01
    assert layer.adapted is None
    assert torch.equal(layer.weight.view(torch.uint8), stored)
    assert relative(layer(layer.rows(x)) - bias, x.double() @ model.exact.T) == without


def test_a_down_that_several_terms_share_is_kept_once() -> None:
    model = OneLayer(FLOAT8)
    use(model.layer, True)
    first = term(16, columns=32)
    shared = replace(first, first=64)
    adapters = [(Adapter({"layer": (first, shared)}), 1.0)]
    with adapted(model, adapters, ["layer"], torch.float32, CPU):
        bound = model.layer.adapted
        assert bound.down.weight.shape == (16, WIDTH)
        assert bound.down.weight.dtype == torch.float8_e4m3fn
        x = torch.randn(1, 160, WIDTH)
        y = model.layer(model.layer.rows(x))
    added = y - model.layer(model.layer.rows(x))
    assert relative(added[..., :32], added[..., 64:].double()) < 1e-4
    assert (added[..., 32:64] == 0).all()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What our own kernels for 8 bits say, in float64; the names of those that were started."""
    started: list[str] = []

    def low_rank_rows(x, x_scale, down, scale, out) -> None:
        started.append("low_rank_rows")
        out.copy_((x.double() * x_scale) @ (down.double() * scale[:, None]).T)

    def product(x, x_scale, weight, scale, bias, out, added=None) -> None:
        started.append("product" if added is None else "product with terms")
        y = (x.double() * x_scale) @ (weight.double() * scale[:, None]).T + bias
        if added is not None:
            add(y, added)
        out.copy_(y)

    def add_low_rank_(y, added) -> None:
        started.append("add_low_rank_")
        add(y, added)

    def add(y, added) -> None:
        low, up, first_ranks = added[0].sum(0), *added[1:]
        for tile, first in enumerate(first_ranks.tolist()):
            some = slice(128 * tile, min(128 * (tile + 1), len(up)))
            y[:, some] += low[:, first : first + up.shape[1]].double() @ up[some].double().T

    addmm_ = torch.Tensor.addmm_

    def counted(*given: Any) -> torch.Tensor:
        started.append("addmm_")
        return addmm_(*given)

    def dequantize(stored, scale, out) -> None:
        out.copy_(stored).mul_(scale[:, None])

    products = SimpleNamespace(
        low_rank_rows=low_rank_rows, product=product, add_low_rank_=add_low_rank_
    )
    fused = SimpleNamespace(dequantize=dequantize)
    for name, stand_in in (("triton_products", products), ("fused_triton", fused)):
        monkeypatch.setitem(sys.modules, f"majicflux.engine.kernels.{name}", stand_in)  # type: ignore
        monkeypatch.setattr(kernels_package, name, stand_in, raising=False)
    monkeypatch.setattr(dispatch, "fused", lambda x: x.dtype in LIMITS)
    monkeypatch.setattr(dispatch, "int8_product_works", lambda _: True)
    monkeypatch.setattr(dispatch, "low_rank_works", lambda *_: True)
    monkeypatch.setattr(torch.Tensor, "addmm_", counted)
    return started


SPLIT = [  # terms of queries, of keys and of values, each of 128 columns
    term(16, 128, first=0, seed=1),
    term(32, 128, first=128, seed=2),
    term(20, 128, first=256, seed=3),
]
TERMS = {  # of the LoRAs that are there at once
    "one": [(term(8, 384),)],
    "three": [(term(8, 384),), (term(16, 384, seed=1),), (term(3, 384, seed=2),)],
    "split": [SPLIT],
    "split, one down": [[replace(SPLIT[0], first=first) for first in (0, 128, 256)]],
    "three split": [SPLIT, SPLIT[::-1], SPLIT[:2]],
    "split beside whole": [SPLIT, (term(8, 384),)],
    "queries alone": [SPLIT[:1]],
}


@pytest.mark.parametrize("case", TERMS)
@pytest.mark.parametrize(
    ("storage", "joined"), [(INT8_ROTATED, True), (FLOAT8, True), (FLOAT8, False)], ids=str
)
def test_terms_are_few_products(
    kernels: list[str], monkeypatch: pytest.MonkeyPatch, storage: Storage, joined: bool, case: str
) -> None:
    """One of the rows for all columns and LoRAs, and one that joins the product or follows that
    of PyTorch, whatever columns are asked for, with the same bits."""
    monkeypatch.setattr(dispatch, "has_large_units", lambda _: joined)
    terms = TERMS[case]
    model = OneLayer(storage, 384)
    layer = model.layer
    use(layer, True)
    adapters = [(Adapter({"layer": tuple(some)}), 0.5) for some in terms]
    weight = model.exact + sum(delta(each, 384, 0.5) for some in terms for each in some)
    x = torch.randn(1, 160, WIDTH, generator=torch.Generator().manual_seed(1))
    bias = layer.bias.double()
    rows = layer.rows(x)
    without = relative(layer(rows) - bias, x.double() @ model.exact.T)
    with adapted(model, adapters, ["layer"], torch.float32, CPU):
        kernels.clear()
        found = layer(rows)
        assert relative(found - bias, x.double() @ weight.T) <= without * 1.01
        added = "product with terms" if joined else "add_low_rank_"
        assert kernels == ["low_rank_rows", added]
        kernels.clear()
        parts = torch.empty(3, 1, 160, 128)
        layer.write(rows, [*parts], [slice(first, first + 128) for first in (0, 128, 256)])
        assert kernels == ["low_rank_rows", *[added] * 3]
        close = torch.equal if joined else torch.allclose  # which a CPU's float8 is not
        assert close(torch.cat([*parts], dim=-1), found)
        few = layer.rows(x[:, 37:90])
        assert close(layer(few), found[:, 37:90])


def test_terms_follow_a_deep_float8_product(kernels: list[str], monkeypatch) -> None:
    """PyTorch's, which is faster than ours there."""
    monkeypatch.setattr(dispatch, "has_large_units", lambda _: True)
    model = OneLayer(FLOAT8, WIDTH // 2)
    use(model.layer, True)
    adapter = Adapter({"layer": (term(8, WIDTH // 2),)})
    rows = model.layer.rows(torch.randn(1, 160, WIDTH))
    with adapted(model, [(adapter, 1.0)], ["layer"], torch.float32, CPU):
        model.layer(rows)
    assert kernels == ["low_rank_rows", "add_low_rank_"]


@pytest.mark.parametrize("reason", ["a gain", "a bias", "terms within a tile"])
def test_what_comes_before_the_terms_keeps_them_apart(kernels: list[str], reason: str) -> None:
    model = OneLayer(INT8_ROTATED, 384)
    use(model.layer, True)
    vector = {"layer": torch.full((384,), 2.0)}
    adapter = {
        "a gain": Adapter({"layer": (term(8, 384),)}, gains=vector),
        "a bias": Adapter({"layer": (term(8, 384),)}, biases=vector),
        "terms within a tile": Adapter({"layer": (term(16, 64), term(16, 320, first=64, seed=1))}),
    }[reason]
    rows = model.layer.rows(torch.randn(1, 160, WIDTH))
    with adapted(model, [(adapter, 1.0)], ["layer"], torch.float32, CPU):
        kernels.clear()
        model.layer(rows)
    sums = 2 if reason == "terms within a tile" else 1
    assert kernels == ["low_rank_rows", "product", *["addmm_"] * sums]


@pytest.mark.usefixtures("narrow")
def test_a_bias_is_added_and_a_norm_replaced(make_pipeline) -> None:
    dit = make_pipeline().dit.weights.module
    name, norm = "blocks.0.attn.a_to_out", "blocks.0.attn.norm_q_a"
    layer, weight = dit.get_submodule(name), dit.get_submodule(norm).weight
    both = Adapter({}, {name: torch.arange(256.0)}, {norm: torch.full((128,), 3.0)})
    x = torch.randn(1, 4, 256)
    with ComputePrecision(torch.float32).applied_to(dit, CPU):
        plain = layer(x)
        names = touched([(both, 0.5)])
        with adapted(dit, [(both, 0.5)], names, torch.float32, CPU):
            assert torch.allclose(layer(x) - plain, 0.5 * torch.arange(256.0), atol=1e-5)
            assert (dit.get_submodule(norm).weight == 3).all()
    assert dit.get_submodule(norm).weight is weight


@pytest.mark.parametrize("storage", [BFLOAT16, FLOAT8, INT8_ROTATED], ids=str)
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_dora_gives_each_row_its_norm(storage: Storage, strength: float) -> None:
    """On half of the rows; PEFT's W' = m (W + D) / |W + D|, of which `strength` is the share."""
    model = OneLayer(storage)
    layer = model.layer
    use(layer, storage is FLOAT8)
    magnitude = torch.rand(COLUMNS) + 0.5
    magnitude[COLUMNS // 2 :] = torch.nan
    terms = (term(8), term(4, columns=16, first=8, seed=1))
    dora = Adapter({"layer": terms}, magnitudes={"layer": magnitude})
    dora = replace(dora, gains={"layer": row_gains(layer, dora, "layer")})
    weight = stored(layer)
    whole = weight + sum(delta(each, COLUMNS) for each in terms)
    normed = whole * (magnitude.double() / whole.norm(dim=1))[:, None]
    normed = torch.where(magnitude.isnan()[:, None], whole, normed)
    weight = weight + strength * (normed - weight)
    x = torch.randn(1, 160, WIDTH)
    exact = x.double() @ weight.T + layer.bias.double()
    with adapted(model, [(dora, strength)], ["layer"], torch.float32, CPU):
        assert relative(layer(layer.rows(x)), exact) < (0.05 if storage is FLOAT8 else 1e-3)


def stored(layer: StoredLinear) -> torch.Tensor:
    scale = 1 if layer.scale is None else layer.scale.double()[:, None]
    return rotate(layer.weight.double() * scale, layer.group)


@pytest.mark.usefixtures("narrow")
def test_clip_adds_its_terms(make_pipeline) -> None:
    encoders = make_pipeline(dtype=torch.float32).text_encoders
    module = encoders.weights.module
    name = CLIP_LAYER
    layer: Any = module.get_submodule(name)
    rows, width = layer.weight.shape
    low = term(4, rows, width)
    lora = Adapter({}, text_encoder={name: (low,)})
    plain, _ = encoders.encode("a cat")
    found, _ = replace(encoders, adapters=((lora, 0.5),)).encode("a cat")
    layer.weight.data += delta(low, rows, 0.5).float()
    merged, _ = replace(encoders).encode("a cat")
    assert torch.equal(found.tokens, plain.tokens)
    assert relative(found.pooled, merged.pooled.double()) < 1e-5
    assert relative(plain.pooled, merged.pooled.double()) > 1e-4


@pytest.mark.usefixtures("narrow")
def test_three_loras_are_as_many_products_as_one(make_pipeline, kernels: list[str]) -> None:
    pipeline = make_pipeline(precision=PRECISIONS["int8 rotated"], mode="8-bit")
    module, counts = pipeline.dit.weights.module, []
    for count in (1, 3):
        adapters = [(adapter_of(module, 8, seed), 0.5) for seed in range(count)]
        kernels.clear()
        latents(with_adapters(pipeline, *adapters))
        counts.append(Counter(kernels))
    one, three = counts
    assert one == three
    assert one["low_rank_rows"] == one["product with terms"] > 0
