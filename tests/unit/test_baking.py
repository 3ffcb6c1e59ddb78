"""LoRAs baked into the weights while these are read, beside the same sums in float64."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from file_layouts import Tensors
from lora_dialects import LAYERS, PROJ, QKV, H, engine_names, kronecker, written
from majicflux.engine.quant.formats import FLOAT32, PRECISIONS, uniform
from majicflux.engine.quant.quantize import quantize_rows
from majicflux.loaders import convert, demo_models
from majicflux.loaders.flux_dit import load_flux_dit
from majicflux.loaders.safetensors_file import ModelFileError

EXACT = uniform(FLOAT32)
LINEAR2, FINAL = "single_blocks.2.linear2", "final_layer.adaLN_modulation.1"
NORM = "double_blocks.0.img_attn.norm.key_norm"
OURS_NORM = "blocks.0.attn.norm_k_a"
WEIGHT, BIAS = f"{engine_names([PROJ])[PROJ]}.weight", f"{engine_names([PROJ])[PROJ]}.bias"
Change = Callable[[torch.Tensor], torch.Tensor]  # of a weight in float64, at strength 1


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 16


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


def of(layer: str, parts: Tensors) -> Tensors:
    return {f"{layer}.{name}": tensor for name, tensor in parts.items()}


def added(delta: torch.Tensor) -> Change:
    return lambda weight: weight + delta


def plain(rank: int, shape: tuple[int, int]) -> tuple[Tensors, torch.Tensor]:
    up, down = random(shape[0], rank), random(rank, shape[1])
    parts = {"lora_A.weight": down, "lora_B.weight": up, "alpha": torch.tensor(3.0)}
    return parts, up.double() @ down.double() * 3 / rank


def loha() -> tuple[Tensors, torch.Tensor]:
    parts = {"hada_w1_a": random(H, 3), "hada_w1_b": random(3, H) * 16,
             "hada_w2_a": random(H, 5), "hada_w2_b": random(5, H)}  # fmt: skip
    one, two = (parts[f"hada_w{n}_a"].double() @ parts[f"hada_w{n}_b"].double() for n in (1, 2))
    return {**parts, "alpha": torch.tensor(1)}, one * two / 3


def lokr(*whole: bool) -> tuple[Tensors, torch.Tensor]:
    parts = kronecker(whole, (8, 16), 4)
    one, two = (
        parts[f"lokr_w{n}"].double()
        if f"lokr_w{n}" in parts
        else parts[f"lokr_w{n}_a"].double() @ parts[f"lokr_w{n}_b"].double()
        for n in (1, 2)
    )
    scale = 1.0 if all(whole) else 2 / 4
    return {**parts, "alpha": torch.tensor(2.0)}, torch.kron(one, two) * scale


def dora(axis: int) -> tuple[Tensors, Change]:
    """Weight and change together get the norms of the file, of their rows or their columns."""
    parts, delta = plain(4, (H, H))
    magnitude = 1 + random(H, 1).abs() if axis == 1 else 1 + random(1, H).abs()

    def decomposed(weight: torch.Tensor) -> torch.Tensor:
        whole = weight + delta
        return whole * magnitude.double() / whole.norm(dim=axis, keepdim=True)

    return {**parts, "dora_scale": magnitude}, decomposed


def kinds() -> dict[str, tuple[Tensors, str, Change]]:
    """Of each: tensors of the file, the parameter that they change, how."""
    found = {}
    factors = {"rank 4": plain(4, (H, H)), "rank 300": plain(300, (H, H)), "LoHa": loha(),
               "LoKr": lokr(True, False), "LoKr of four": lokr(False, False),
               "full LoKr": lokr(True, True),
               "diff": ({"diff": random(H, H)}, random(H, H))}  # fmt: skip
    for name, (parts, delta) in factors.items():
        found[name] = of(PROJ, parts), WEIGHT, added(delta.double())
    found["set_weight"] = of(PROJ, {"set_weight": random(H, H)}), WEIGHT, lambda _: random(H, H)
    found["bias"] = of(PROJ, {"diff_b": random(H)}), BIAS, added(random(H).double())
    found["norm"] = of(NORM, {"set_weight": random(128)}), f"{OURS_NORM}.weight", (
        lambda _: random(128)
    )  # fmt: skip
    found["diff of a norm"] = (
        of(NORM, {"diff": random(128)}), f"{OURS_NORM}.weight", added(random(128).double()),
    )  # fmt: skip
    for name, axis in (("DoRA of rows", 1), ("DoRA of columns", 0)):
        parts, change = dora(axis)
        found[name] = of(PROJ, parts), WEIGHT, change
    parts, delta = plain(4, (H, H))
    of_key = torch.zeros(3 * H, H, dtype=torch.float64)
    of_key[H : 2 * H] = delta
    qkv = f"{engine_names([QKV])[QKV]}.weight"
    found["of a part"] = of("transformer_blocks.1.attn.to_k", parts), qkv, added(of_key)
    parts, delta = plain(4, (2 * H, H))
    parts["lora_B.weight"] = parts["lora_B.weight"].roll(H, 0)
    final = f"{engine_names([FINAL])[FINAL]}.weight"
    found["halves that change places"] = of("norm_out.linear", parts), final, added(delta)
    whole = random(2 * H, H)
    found["a diff whose halves change places"] = (
        of("norm_out.linear", {"diff": whole.roll(H, 0)}), final, added(whole.double()),
    )  # fmt: skip
    return found


KINDS = kinds()
REPLACED = ("set_weight", "norm")  # whatever the strength, as by ComfyUI


def expected(kind: str, base: Tensors, strength: float) -> tuple[str, torch.Tensor]:
    """The changed parameter and its value in float64."""
    _, name, change = KINDS[kind]
    before = base[name].double()
    after = change(before).double()
    return name, after if kind in REPLACED else before + strength * (after - before)


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_the_sum_in_float64(file, base, lora, kind: str, strength: float) -> None:
    found = parameters(file, EXACT, (lora(KINDS[kind][0]), strength))
    name, wanted = expected(kind, base, strength)
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
    parts = {n: (t * 64).round() / 64 for n, t in plain(4, (H, H))[0].items()}
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
        _, wanted = expected("full LoKr" if name == WEIGHT else "of a part", before, 1.0)
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
        name, value = expected(kind, wanted, strength)
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
