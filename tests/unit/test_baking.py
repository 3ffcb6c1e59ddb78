"""LoRAs baked into the weights while these are read, beside the same sums in float64."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from file_layouts import Tensors
from lora_dialects import LAYERS, PROJ, QKV, H, engine_names, written
from lora_kinds import KINDS, WEIGHT, low_rank, of, random, wanted_of
from majicflux.engine.quant.formats import FLOAT32, PRECISIONS, uniform
from majicflux.engine.quant.quantize import quantize_rows
from majicflux.loaders import convert, demo_models
from majicflux.loaders.flux_dit import load_flux_dit
from majicflux.loaders.safetensors_file import ModelFileError

EXACT = uniform(FLOAT32)
LINEAR2 = "single_blocks.2.linear2"


def parameters(path: Path, precision=EXACT, *baked: tuple[Path, float], **more) -> Tensors:
    weights, _ = load_flux_dit(path, precision, baked=baked, **more)
    return {name: p.detach() for name, p in weights.module.named_parameters()}


def differing(one: Tensors, other: Tensors) -> set[str]:
    return {n for n in one if not torch.equal(one[n].view(torch.uint8), other[n].view(torch.uint8))}


@pytest.fixture(scope="module")
def file(models: Path) -> Path:
    return models / demo_models.DIT_FILE


@pytest.fixture(scope="module")
def base(file: Path) -> Tensors:
    """Its weights in float32."""
    return parameters(file)


@pytest.fixture
def lora(saved: Callable[..., Path]) -> Callable[..., Path]:
    return lambda tensors, name="lora.safetensors": saved(tensors, name)


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_the_sum_in_float64(file, base, lora, kind: str, strength: float) -> None:
    found = parameters(file, EXACT, (lora(KINDS[kind][0]), strength))
    name, wanted = wanted_of(kind, base, strength)
    assert (found[name] - wanted).norm() < 1e-6 * wanted.norm()
    assert differing(found, base) == {name}


@pytest.mark.parametrize("precision", ["float8_e4m3fn", "int8 rotated"])
@pytest.mark.parametrize("kind", ["LoHa", "full LoKr", "diff", "DoRA of columns", "of a part"])
def test_8_bits_are_those_of_the_sum(file, lora, precision: str, kind: str) -> None:
    path = lora(KINDS[kind][0])
    name = KINDS[kind][1]
    exact = parameters(file, EXACT, (path, 0.7))[name]
    weights, _ = load_flux_dit(file, PRECISIONS[precision], baked=[(path, 0.7)])
    layer = weights.module.get_submodule(name.removesuffix(".weight"))
    into, scale = torch.empty_like(layer.weight), torch.empty_like(layer.scale)
    quantize_rows(exact, into, scale, layer.group)
    assert torch.equal(layer.weight.view(torch.uint8), into.view(torch.uint8))
    assert torch.equal(layer.scale, scale)
    plain = parameters(file, PRECISIONS[precision])
    found = {n: p.detach() for n, p in weights.module.named_parameters()}
    assert differing(found, plain) == {name, name.replace(".weight", ".scale")}


@pytest.mark.parametrize("kind", ["LoHa", "diff", "DoRA of rows"])
def test_bfloat16_is_rounded_once(file, lora, kind: str) -> None:
    path = lora(KINDS[kind][0])
    exact = parameters(file, EXACT, (path, 1.0))[WEIGHT]
    found = parameters(file, PRECISIONS["bfloat16"], (path, 1.0))[WEIGHT]
    assert torch.equal(found, exact.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_of_a_file(file, base, lora, dtype: torch.dtype) -> None:
    parts = {n: (t * 64).round() / 64 for n, t in low_rank(4, (H, H))[0].items()}
    path = lora({n: t.to(dtype) for n, t in of(PROJ, parts).items()})
    delta = parts["lora_B.weight"].double() @ parts["lora_A.weight"].double() * 3 / 4
    wanted = base[WEIGHT].double() + delta
    found = parameters(file, EXACT, (path, 1.0))[WEIGHT]
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


def scaled_float8(plain: Tensors) -> Tensors:
    """The blocks' matrices as float8 with one scale each."""
    tensors = dict(plain)
    for layer in (PROJ, QKV, LINEAR2):
        weight = plain[f"{layer}.weight"].float()
        scale = weight.abs().max() / 448
        tensors[f"{layer}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{layer}.scale_weight"] = scale
    return tensors


def test_a_source_of_8_bits_is_changed_and_the_rest_stays(plain: Tensors, saved, lora) -> None:
    """Rows with a change are quantized anew, those without are the file's."""
    file = saved(scaled_float8(plain))
    path = lora(KINDS["of a part"][0] | KINDS["full LoKr"][0])
    exact, before = parameters(file, EXACT, (path, 1.0)), parameters(file)
    float8 = PRECISIONS["float8_e4m3fn"]
    found, kept = parameters(file, float8, (path, 1.0)), parameters(file, float8)
    for name, rows in ((WEIGHT, slice(0, H)), (KINDS["of a part"][1], slice(H, 2 * H))):
        _, wanted = wanted_of("full LoKr" if name == WEIGHT else "of a part", before, 1.0)
        assert (exact[name] - wanted).norm() < 1e-6 * wanted.norm()
        into, scale = torch.empty_like(found[name][rows]), torch.empty(H)
        quantize_rows(exact[name][rows], into, scale)
        of_scale = name.replace(".weight", ".scale")
        assert torch.equal(found[name][rows].view(torch.uint8), into.view(torch.uint8))
        assert torch.equal(found[of_scale][rows], scale)
        for rest in (slice(0, rows.start), slice(rows.stop, None)):
            bits = found[name][rest].view(torch.uint8), kept[name][rest].view(torch.uint8)
            assert torch.equal(*bits)
            assert torch.equal(found[of_scale][rest], kept[of_scale][rest])


def test_several_one_after_the_other(file, base, lora) -> None:
    """The norms of a later DoRA are those of what the earlier ones have left."""
    first, second, third = "full LoKr", "DoRA of columns", "DoRA of rows"
    paths = [lora(KINDS[kind][0], f"{i}.safetensors")
             for i, kind in enumerate((first, second, third, second))]  # fmt: skip
    strengths = (0.5, 1.0, 0.25, -1.0)
    wanted = base
    for kind, strength in zip((first, second, third, second), strengths, strict=True):
        name, value = wanted_of(kind, wanted, strength)
        wanted = {**wanted, name: value}
    found = parameters(file, EXACT, *zip(paths, strengths, strict=True))[WEIGHT]
    assert (found - wanted[WEIGHT]).norm() < 1e-6 * wanted[WEIGHT].norm()


@pytest.mark.parametrize("precision", ["float8_e4m3fn", "float8_e4m3fn unscaled", "bfloat16"])
def test_pieces_threads_and_devices_give_the_same_bits(
    file, lora, monkeypatch, precision: str
) -> None:
    tensors = KINDS["of a part"][0] | KINDS["DoRA of columns"][0] | KINDS["diff of a norm"][0]
    baked = (lora(tensors | of(LINEAR2, {"diff": random(H, 5 * H)})), 0.7)
    whole = parameters(file, PRECISIONS[precision], baked)
    device = torch.device("cpu", 0)
    assert not differing(whole, parameters(file, PRECISIONS[precision], baked, device=device))
    monkeypatch.setattr(convert, "BUFFER_BYTES", 2 * 7 * H * 2)
    monkeypatch.setattr(convert, "MOST_WORKERS", 1)
    assert not differing(whole, parameters(file, PRECISIONS[precision], baked))


@pytest.mark.parametrize("kind", ["rank 4", "diff", "full LoKr", "bias"])
def test_a_damaged_file_is_named(file, lora, kind: str) -> None:
    tensors = {n: t.clone() for n, t in KINDS[kind][0].items()}
    tensor = next(t for t in tensors.values() if t.numel() > 1)
    tensor.view(-1)[-1] = float("nan")
    with pytest.raises(ModelFileError, match=r"^lora.safetensors, tensor .* is damaged"):
        parameters(file, EXACT, (lora(tensors), 1.0))


def test_a_sum_that_no_weight_has_is_refused(file, lora) -> None:
    parts = {"lora_A.weight": torch.full((1, H), 1e15), "lora_B.weight": torch.full((H, 1), 1e15)}
    with pytest.raises(ModelFileError, match=r"^lora.safetensors"):
        parameters(file, PRECISIONS["float8_e4m3fn"], (lora(of(PROJ, parts)), 1.0))


def test_rows_of_zeros_stay_zeros(file, lora, base) -> None:
    """To which DoRA gives no direction."""
    row = base[WEIGHT][:1].clone()
    down, up = row, -torch.eye(H)[:, :1]
    tensors = written({PROJ: (down, up, 1.0)})
    tensors[f"{PROJ}.dora_scale"] = torch.full((H, 1), 5.0)
    found = parameters(file, EXACT, (lora(tensors), 1.0))[WEIGHT]
    assert not found[0].any()
    assert torch.isfinite(found).all()


def test_every_layer_at_once(file, base, lora) -> None:
    """Embedders and final layer too: each layer has its own change."""
    factors = {n: (random(2, s[1]), random(s[0], 2), 2.0) for n, s in LAYERS.items()}
    path = lora(written(factors))
    found = parameters(file, EXACT, (path, 1.0))
    for layer, ours in engine_names(LAYERS).items():
        down, up, _ = factors[layer]
        wanted = base[f"{ours}.weight"].double() + up.double() @ down.double()
        assert (found[f"{ours}.weight"] - wanted).norm() < 1e-6 * wanted.norm(), layer
