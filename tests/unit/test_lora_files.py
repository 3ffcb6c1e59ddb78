"""LoRA files of every dialect become the same terms; what is broken is refused in our own words."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from file_layouts import Tensors
from lora_dialects import (
    CLIP_LAYERS,
    DOWN_UP,
    LAYERS,
    PROJ,
    QKV,
    H,
    Save,
    dialects,
    engine_names,
    full_size,
    kronecker,
    of_clip,
    random_factors,
    random_of,
    to_diffusers_names,
    to_xlabs,
    written,
)
from majicflux import cli
from majicflux.benchmarks.random_models import CLIP, DIT, T5
from majicflux.engine.flux.geometry import FluxGeometry
from majicflux.engine.flux.text_encoders import build_text_encoders
from majicflux.engine.flux.transformer import build_flux_dit
from majicflux.engine.quant.formats import BFLOAT16, uniform
from majicflux.engine.quant.low_rank import Adapter, LowRankTerm
from majicflux.loaders.layouts import flux_dit_layout
from majicflux.loaders.lora import MOST_RANK, load_lora
from majicflux.loaders.lora_file import inspect_lora

FLOAT = torch.float32
LINEAR1 = "single_blocks.2.linear1"
OURS_QKV, OURS_LINEAR1 = "blocks.1.attn.a_to_qkv", "single_blocks.2.to_qkv_mlp"
OURS_PROJ = "blocks.0.attn.b_to_out"


def load(path: Path, dtype: torch.dtype | None = None) -> Adapter:
    return load_lora(path, DIT, CLIP, dtype)


def change(terms: Iterable[LowRankTerm], shape: tuple[int, int]) -> torch.Tensor:
    """What the terms add to a weight, in float64."""
    total = torch.zeros(shape, dtype=torch.float64)
    for term in terms:
        rows = slice(term.first, term.first + len(term.up))
        total[rows] += term.scale * term.up.double() @ term.down.double()
    return total


def same(one: Adapter, other: Adapter) -> bool:
    def plain(adapter: Adapter) -> list[tuple[str, list[tuple[Any, ...]]]]:
        return [
            (name, [(t.down.tolist(), (t.up * t.scale).tolist(), t.first) for t in terms])
            for name, terms in adapter.terms.items()
        ]

    return plain(one) == plain(other)


FACTORS = random_factors()


@pytest.mark.parametrize("dialect", dialects(random_factors([PROJ])))
def test_one_change_in_every_dialect_gives_the_same_terms(saved: Save, dialect: str) -> None:
    adapter = load(saved(dialects(FACTORS)[dialect]))
    assert same(adapter, load(saved(dialects(FACTORS)["kohya"])))
    assert len(adapter.terms) == len(LAYERS)
    for terms in adapter.terms.values():
        (term,) = terms
        assert (term.down.dtype, term.up.dtype, term.first) == (torch.bfloat16,) * 2 + (0,)
        assert term.down.is_contiguous()
        assert term.up.is_contiguous()
    assert adapter.report.dialect == dialect.partition(",")[0] or dialect == "OneTrainer, bare"
    assert adapter.report.ranks == (4,)
    assert adapter.report.layers == len(LAYERS)
    assert not adapter.report.unused
    assert not adapter.report.baking


def test_the_terms_are_those_of_the_file_by_the_names_of_the_engines_layers(saved: Save) -> None:
    adapter = load(saved(dialects(FACTORS)["kohya"]))
    module = build_flux_dit(DIT, uniform(BFLOAT16)).module
    for layer, name in engine_names(LAYERS).items():
        down, up, alpha = FACTORS[layer]
        assert tuple(module.get_submodule(name).weight.shape) == LAYERS[layer]
        expected = alpha / 4 * up.double() @ down.double()
        assert torch.equal(change(adapter.terms[name], LAYERS[layer]), expected)


def test_xlabs(saved: Save) -> None:
    """Image is 1 and text 2 there; some have single blocks, whose linear1 is query, key, value."""
    layers = [
        *(f"double_blocks.{i}.{s}_attn.{p}" for i in (0, 1) for s in ("img", "txt")
          for p in ("qkv", "proj")),
        "single_blocks.3.linear1", "single_blocks.3.linear2",
    ]  # fmt: skip
    factors = random_factors(layers)
    down, up, alpha = factors["single_blocks.3.linear1"]
    factors["single_blocks.3.linear1"] = down, up[: 3 * H], alpha
    adapter = load(saved(to_xlabs(factors)))
    assert adapter.report.dialect == "XLabs"
    padded = {**factors, "single_blocks.3.linear1": (down, up.clone(), alpha)}
    padded["single_blocks.3.linear1"][1][3 * H :] = 0
    expected = load(saved(written(padded, "diffusion_model.")))
    assert list(adapter.terms) == list(expected.terms)
    for name, terms in adapter.terms.items():
        shape = (terms[0].up.shape[0] * 3, terms[0].down.shape[1])
        assert torch.equal(change(terms, shape), change(expected.terms[name], shape))


@pytest.mark.parametrize("trailing", ["", "_"])
def test_kohya_with_diffusers_names_and_an_underscore(saved: Save, trailing: str) -> None:
    factors = to_diffusers_names(random_factors([QKV]))
    tensors = written({n + trailing: f for n, f in factors.items()}, "lora_unet_", DOWN_UP,
                      underscores=True)  # fmt: skip
    assert same(load(saved(tensors)), load(saved(written(random_factors([QKV])))))


def test_query_alone_and_unequal_ranks_keep_their_columns(saved: Save) -> None:
    tensors = {
        **written({"transformer_blocks.1.attn.to_k": (random_of(3, H), random_of(H, 3), 6.0)}),
        **written(
            {
                "single_transformer_blocks.2.attn.to_q": (random_of(2, H), random_of(H, 2), 2.0),
                "single_transformer_blocks.2.attn.to_v": (random_of(5, H), random_of(H, 5), 1.0),
                "single_transformer_blocks.2.proj_mlp": (random_of(7, H), random_of(4 * H, 7), 7.0),
            }
        ),
    }
    adapter = load(saved(tensors))
    (key,) = adapter.terms[OURS_QKV]
    assert (key.first, len(key.up), key.rank, key.scale) == (H, H, 3, 2.0)
    found = [(t.first, len(t.up), t.rank, t.scale) for t in adapter.terms[OURS_LINEAR1]]
    assert found == [(0, H, 2, 1.0), (2 * H, H, 5, 0.2), (3 * H, 4 * H, 7, 1.0)]
    assert adapter.report.ranks == (2, 3, 5, 7)
    assert adapter.report.layers == 2


def test_equal_downs_are_kept_once(saved: Save) -> None:
    down = random_of(4, H)
    tensors = {
        **written({"transformer_blocks.1.attn.to_q": (down, random_of(H, 4), 4.0)}),
        **written({"transformer_blocks.1.attn.to_v": (down, random_of(H, 4, seed=1), 8.0)}),
    }
    query, value = load(saved(tensors)).terms[OURS_QKV]
    assert query.down is value.down
    assert (query.first, value.first) == (0, 2 * H)


ALPHAS = [
    torch.tensor(8), torch.tensor([8], dtype=torch.int32), torch.tensor(8.0, dtype=torch.float16),
    torch.tensor([[8.0]], dtype=torch.float64), torch.tensor(8.0, dtype=torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("alpha", ALPHAS, ids=str)
def test_each_layer_has_an_alpha_of_its_own(saved: Save, alpha: torch.Tensor) -> None:
    factors = random_factors([QKV, PROJ])
    tensors = written(factors)
    tensors[f"{QKV}.alpha"] = alpha
    del tensors[f"{PROJ}.alpha"]
    adapter = load(saved(tensors))
    assert adapter.terms[OURS_QKV][0].scale == 2.0
    assert adapter.terms[OURS_PROJ][0].scale == 1.0


def declared(tensors: Tensors, path: Path, said: object) -> Path:
    text = said if isinstance(said, str) else json.dumps(said)
    save_file(tensors, path, {"lora_adapter_metadata": text})
    return path


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_the_scale_that_peft_describes(tmp_path: Path, prefix: str) -> None:
    factors = to_diffusers_names(random_factors([PROJ, LINEAR1], alpha=4.0))
    tensors = written(factors, "transformer.", alphas=False)
    said = {
        "r": 4, "lora_alpha": 8, "alpha_pattern": {"attn.to_k": 32, "0.attn.to_add_out": 2},
        "use_rslora": False, "target_modules": ["to_q"],
    }  # fmt: skip
    path = tmp_path / "a.safetensors"
    adapter = load(declared(tensors, path, {prefix + k: v for k, v in said.items()}))
    scales = {term.first: term.scale for term in adapter.terms[OURS_LINEAR1]}
    assert scales == {0: 2.0, H: 8.0, 2 * H: 2.0}
    assert adapter.terms[OURS_PROJ][0].scale == 0.5
    said["use_rslora"] = True
    adapter = load(declared(tensors, path, {prefix + k: v for k, v in said.items()}))
    assert adapter.terms[OURS_PROJ][0].scale == 1.0
    assert adapter.terms[OURS_LINEAR1][0].scale == 4.0


@pytest.mark.parametrize(
    "said",
    ["", "[]", "{", "null", "[" * 100_000, '{"lora_alpha": 1e999}', '{"lora_alpha": "8"}',
     '{"lora_alpha": null, "alpha_pattern": [1]}', '{"alpha_pattern": {"proj": {}}}',
     '{"lora_alpha": ' + "9" * 4000 + "}"],
)  # fmt: skip
def test_a_description_that_is_none_is_passed_over(tmp_path: Path, said: str) -> None:
    path = declared(written(random_factors([PROJ]), alphas=False), tmp_path / "a.safetensors", said)
    assert load(path).terms[OURS_PROJ][0].scale == 1.0


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
     torch.float8_e5m2],
)  # fmt: skip
def test_every_dtype(saved: Save, dtype: torch.dtype) -> None:
    factors = {QKV: (torch.tensor([[1.5, -0.25]]).repeat(4, H // 2), random_of(3 * H, 4).sign(), 4)}
    tensors = {n: t.to(dtype) if t.ndim else t for n, t in written(factors).items()}
    assert same(load(saved(tensors)), load(saved(written(factors))))


def test_float8_with_a_scale(saved: Save) -> None:
    tensors = written(random_factors([PROJ], alpha=4.0))
    for part in ("lora_A", "lora_B"):
        name = f"{PROJ}.{part}.weight"
        tensors[name] = (tensors[name] * 16).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = torch.tensor(1 / 16)
    adapter = load(saved(tensors))
    assert same(adapter, load(saved(written(random_factors([PROJ], alpha=4.0)))))
    assert not adapter.report.unused


def test_the_shape_of_a_convolution(saved: Save) -> None:
    tensors = written(random_factors([PROJ], rank=1))
    whole = {n: t[..., None, None] if t.ndim else t for n, t in tensors.items()}
    assert same(load(saved(whole)), load(saved(tensors)))


def test_factors_in_another_dtype_are_those_of_the_file(saved: Save) -> None:
    down, up = torch.randn(4, H), torch.randn(H, 4)
    (term,) = load(saved(written({PROJ: (down, up, 4.0)})), FLOAT).terms[OURS_PROJ]
    assert torch.equal(term.down, down)
    assert torch.equal(term.up, up)


@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("of_second", [0, 2])
def test_loha_is_a_product_of_low_rank(saved: Save, rank: int, of_second: int) -> None:
    other = rank if rank == 16 else rank + of_second
    matrices = {
        "hada_w1_a": random_of(3 * H, rank, seed=1), "hada_w1_b": random_of(rank, H, seed=2),
        "hada_w2_a": random_of(3 * H, other, seed=3), "hada_w2_b": random_of(other, H, seed=4),
    }  # fmt: skip
    tensors = {f"lycoris_double_blocks_1_img_attn_qkv.{n}": t for n, t in matrices.items()}
    tensors["lycoris_double_blocks_1_img_attn_qkv.alpha"] = torch.tensor(0.5)
    adapter = load(saved(tensors))
    w1a, w1b, w2a, w2b = (matrix.double() for matrix in matrices.values())
    expected = (w1a @ w1b) * (w2a @ w2b) * 0.5 / rank
    found = change(adapter.terms[OURS_QKV], (3 * H, H))
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
    assert adapter.report.ranks == (rank * other,)
    assert adapter.report.methods == ("LoHa",)


def matrix_of(parts: Tensors) -> torch.Tensor:
    parts = {name.rpartition(".")[2]: part.double() for name, part in parts.items()}
    one, two = (
        parts[f"lokr_w{n}"]
        if f"lokr_w{n}" in parts
        else parts[f"lokr_w{n}_a"] @ parts[f"lokr_w{n}_b"]
        for n in (1, 2)
    )
    return torch.kron(one, two)


@pytest.mark.parametrize(
    ("whole", "first", "rank", "expected_rank"),
    [
        ((True, False), (16, 16), 4, 64),
        ((True, False), (4, 16), 4, 16),
        ((True, False), (16, 4), 4, 16),
        ((False, False), (16, 16), 2, 4),
        ((False, True), (128, 128), 3, 6),  # a second matrix that is small as a whole
        ((True, True), (H, 1), 1, 1 * 1),
    ],
)
def test_lokr_is_kroneckers_product(saved: Save, whole, first, rank: int, expected_rank) -> None:
    parts = kronecker(whole, first, rank)
    tensors = {f"{PROJ}.{n}": t for n, t in parts.items()}
    tensors[f"{PROJ}.alpha"] = torch.tensor(0.5)
    adapter = load(saved(tensors))
    scale = 1.0 if all(whole) else 0.5 / rank  # alpha is of the factors
    expected = matrix_of(parts) * scale
    found = change(adapter.terms[OURS_PROJ], (H, H))
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert adapter.report.ranks == (expected_rank,)
    assert adapter.report.methods == ("LoKr",)
    assert adapter.terms[OURS_PROJ][0].rank == expected_rank


def test_lokr_of_a_part_in_lycoris_names(saved: Save) -> None:
    parts = kronecker((True, False), (8, 8), 2)
    name = "lycoris_transformer_blocks_1_attn_to_k"
    adapter = load(saved({f"{name}.{n}": t for n, t in parts.items()}))
    found = change(adapter.terms[OURS_QKV], (3 * H, H))
    assert torch.equal(found[H : 2 * H], matrix_of(parts))
    assert not found[:H].any()
    assert adapter.report.dialect == "LyCORIS"


def test_what_has_no_low_rank_needs_baking(saved: Save) -> None:
    tensors = {
        f"{QKV}.diff": random_of(3 * H, H),
        "single_blocks.0.linear2.set_weight": random_of(H, 5 * H),
        "double_blocks.0.img_attn.norm.key_norm.diff": random_of(128),
        **written(random_factors([LINEAR1])),
        **written(random_factors(["single_blocks.1.linear1"], rank=MOST_RANK + 1)),
        **written(random_factors(["single_blocks.1.linear2"], rank=MOST_RANK)),
    }
    adapter = load(saved(tensors))
    assert list(adapter.terms) == ["single_blocks.1.proj_out", OURS_LINEAR1]
    assert adapter.report.layers == 6
    assert adapter.report.baking == {
        "of full rank": (
            "blocks.0.attn.norm_k_a", OURS_QKV, "single_blocks.0.proj_out",
        ),
        "a rank above 256": ("single_blocks.1.to_qkv_mlp",),
    }  # fmt: skip
    changes = inspect_lora(saved(tensors), DIT).changes
    of_qkv = next(c for c in changes if c.target.layer == OURS_QKV)
    assert of_qkv.tensors["diff"].name == f"{QKV}.diff"


def test_a_lokr_of_two_whole_matrices_needs_baking_where_it_is_large(saved: Save) -> None:
    wide = replace(DIT, hidden=384)
    tensors = {f"{PROJ}.lokr_w1": random_of(16, 24), f"{PROJ}.lokr_w2": random_of(24, 16)}
    adapter = load_lora(saved(tensors), wide)
    assert adapter.terms[OURS_PROJ][0].rank == MOST_RANK == 256
    assert torch.equal(change(adapter.terms[OURS_PROJ], (384, 384)), matrix_of(tensors))
    tensors = {f"{PROJ}.lokr_w1": random_of(16, 16), f"{PROJ}.lokr_w2": random_of(24, 24)}
    adapter = load_lora(saved(tensors), wide)
    assert not adapter.terms
    assert adapter.report.baking == {"of full rank": (OURS_PROJ,)}


def test_a_rank_is_counted_where_terms_meet(saved: Save) -> None:
    def tensors(rank: int) -> Tensors:
        query = random_of(rank, H), random_of(H, rank), 1.0
        whole = random_factors([QKV], rank=200)
        return written({**whole, "transformer_blocks.1.attn.to_q": query})

    apart = {f"transformer_blocks.1.attn.to_{n}": (random_of(200, H), random_of(H, 200), 1.0 + i)
             for i, n in enumerate("qkv")}  # fmt: skip
    assert not load(saved(written(apart))).report.baking
    assert not load(saved(tensors(40))).report.baking
    assert "a rank above 256" in load(saved(tensors(57))).report.baking


@pytest.mark.parametrize("name", ["dora_scale", "lora_magnitude_vector",
                                  "lora_magnitude_vector.weight",
                                  "lora_magnitude_vector.default.weight"])  # fmt: skip
def test_dora_on_the_output_axis(saved: Save, name: str) -> None:
    shape = (H, 1) if name == "dora_scale" else (H,)
    tensors = written(random_factors([PROJ]))
    tensors[f"{PROJ}.{name}"] = 5 + random_of(*shape)
    adapter = load(saved(tensors))
    assert torch.equal(adapter.magnitudes[OURS_PROJ], 5 + random_of(H))
    assert len(adapter.terms[OURS_PROJ]) == 1
    assert adapter.report.methods == ("LoRA", "DoRA")


def test_dora_of_some_columns_leaves_the_others(saved: Save) -> None:
    factors = to_diffusers_names(random_factors([QKV]))
    tensors = written(factors)
    tensors["transformer_blocks.1.attn.to_k.dora_scale"] = 5 + random_of(H, 1)
    (found,) = load(saved(tensors)).magnitudes.values()
    assert torch.equal(found[H : 2 * H], 5 + random_of(H))
    assert found[:H].isnan().all()
    assert found[2 * H :].isnan().all()


def test_dora_on_the_input_axis_needs_baking(saved: Save) -> None:
    tensors = written(random_factors([PROJ, LINEAR1]))
    tensors[f"{PROJ}.dora_scale"] = random_of(1, H)
    adapter = load(saved(tensors))
    assert adapter.report.baking == {"DoRA on the input axis": (OURS_PROJ,)}
    assert list(adapter.terms) == [OURS_LINEAR1]
    assert not adapter.magnitudes


def test_norms_and_biases(saved: Save) -> None:
    """As in the control LoRAs of Black Forest Labs, and ComfyUI's own names for the same."""
    tensors = {
        **written(random_factors([QKV])),
        f"{QKV}.lora_B.bias": random_of(3 * H),
        "double_blocks.0.img_attn.norm.query_norm.scale": 1 + random_of(128),
        "single_blocks.1.norm.key_norm.set_weight": 2 + random_of(128),
        "transformer.single_transformer_blocks.3.attn.norm_q.weight": 3 + random_of(128),
        "diffusion_model.single_blocks.0.linear2.diff_b": 4 + random_of(H),
        "transformer.single_transformer_blocks.0.attn.to_v.diff_b": 5 + random_of(H),
    }
    adapter = load(saved(tensors))
    assert torch.equal(adapter.biases[OURS_QKV], random_of(3 * H) / 2), "scaled as the layer is"
    assert torch.equal(adapter.biases["single_blocks.0.proj_out"], 4 + random_of(H))
    of_part = adapter.biases["single_blocks.0.to_qkv_mlp"]
    assert torch.equal(of_part[2 * H : 3 * H], 5 + random_of(H))
    assert of_part.count_nonzero() == (5 + random_of(H)).count_nonzero()
    norms = {
        "blocks.0.attn.norm_q_a": 1, "single_blocks.1.norm_k_a": 2, "single_blocks.3.norm_q_a": 3,
    }  # fmt: skip
    assert adapter.norms.keys() == norms.keys()
    for name, first in norms.items():
        assert torch.equal(adapter.norms[name], first + random_of(128))
    assert not adapter.report.unused
    module = build_flux_dit(DIT, uniform(BFLOAT16)).module
    for name in [*norms, *adapter.biases]:
        module.get_submodule(name)


def test_the_last_shift_and_scale_of_diffusers_change_places(saved: Save) -> None:
    ours, theirs = "final_layer.adaLN_modulation.1", "norm_out.linear"

    def tensors(name: str, swap: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
        down, up, alpha = random_factors([ours])[ours]
        return {
            **written({name: (down, swap(up), alpha)}),
            f"{name}.diff_b": swap(random_of(2 * H)),
            f"{name}.dora_scale": swap(3 + random_of(2 * H, 1)),
        }

    one = load(saved(tensors(ours, lambda rows: rows)))
    other = load(saved(tensors(theirs, lambda rows: rows.roll(H, 0))))
    assert same(one, other)
    for kind in ("biases", "magnitudes"):
        (expected,), (found,) = getattr(one, kind).values(), getattr(other, kind).values()
        assert torch.equal(expected, found)


@pytest.mark.parametrize(
    "prefix",
    ["lora_te1_text_model_", "lora_te_text_model_", "text_encoder.text_model.", "text_encoder.",
     "text_encoders.clip_l.transformer.text_model.", "base_model.model.text_model."],
)  # fmt: skip
def test_terms_of_clip(saved: Save, prefix: str) -> None:
    adapter = load(saved({**written(random_factors([QKV])), **of_clip(prefix)}))
    assert list(adapter.terms) == [OURS_QKV]
    module = build_text_encoders(CLIP, T5, torch.bfloat16).module
    assert len(adapter.text_encoder) == len(CLIP_LAYERS)
    for name, (term,) in adapter.text_encoder.items():
        assert module.get_submodule(name).weight.shape == (len(term.up), term.down.shape[1])
        assert term.scale == 0.5
    assert (adapter.report.layers, adapter.report.text_layers) == (1, 4)
    assert not load(saved(of_clip(prefix))).terms, "for CLIP alone"


def test_what_is_not_used_is_told_with_its_reason(saved: Save) -> None:
    tensors = {
        **written(random_factors([QKV])),
        **written({"single_blocks.37.linear2": (random_of(2, 5 * H), random_of(H, 2), 1.0)}),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": random_of(2, 64),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": random_of(64, 2),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha": torch.tensor(1.0),
        "lora_unet_double_blocks_0_img_attn_proj.oft_blocks": random_of(2, 4, 4),
        "lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight": random_of(3, H),
        "lora_unet_double_blocks_1_img_attn_qkv.lora_up.weight": random_of(3 * H, 3),
        "bundle_emb.word.string_to_param": random_of(3, 64),
        "double_blocks.1.img_mlp.0.weight": random_of(4 * H, H),
        f"{QKV}.lora_A.second.weight": random_of(4, H),
    }  # fmt: skip
    adapter = load(saved(tensors))
    assert adapter.report.layers == 1
    assert {reason: len(names) for reason, names in adapter.report.unused.items()} == {
        "layers that this model does not have": 3,
        "T5": 3,
        "a method that MajicFlux does not know": 1,
        "a second time": 3,
        "unknown names": 2,
    }
    lines = str(adapter.report).splitlines()
    assert len(lines) == 6
    assert lines[0] == (
        "model.safetensors: LoRA in the names of Black Forest Labs, rank 4; layers of the "
        "transformer: 1, of CLIP-L: 0"
    )
    assert "tensors not used (T5): 3, as lora_te3_encoder_block_0" in str(adapter.report)


@pytest.mark.parametrize("dialect", ["kohya", "Diffusers"])
def test_the_header_of_a_real_file(tmp_path: Path, dialect: str) -> None:
    """All layers of the blocks at full size: what kohya and Diffusers write by default."""
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in flux_dit_layout(FluxGeometry()).items()
        if "blocks" in name and name.endswith(".weight")
    }
    shapes: dict[str, tuple[int, ...]] = {}
    if dialect == "kohya":
        for name, (rows, columns) in layers.items():
            module = f"lora_unet_{name.replace('.', '_')}"
            shapes |= {f"{module}.lora_down.weight": (16, columns), f"{module}.alpha": (),
                       f"{module}.lora_up.weight": (rows, 16)}  # fmt: skip
    else:
        meta = {n: (torch.empty(16, c, device="meta"), torch.empty(r, 16), 16.0)
                for n, (r, c) in layers.items() if n.startswith("single_blocks.0")}  # fmt: skip
        for name, (down, up, _) in to_diffusers_names(meta).items():
            for index in range(38):
                module = "transformer." + name.replace("blocks.0", f"blocks.{index}")
                shapes |= {f"{module}.lora_A.weight": tuple(down.shape),
                           f"{module}.lora_B.weight": tuple(up.shape)}  # fmt: skip
    path = full_size(shapes, tmp_path / "big.safetensors")
    start = time.process_time()
    found = inspect_lora(path, FluxGeometry())
    assert time.process_time() - start < 1.5
    assert found.dialect == dialect
    assert found.ranks == (16,)
    assert len({change.target.layer for change in found.changes}) == (
        len(layers) if dialect == "kohya" else 38 * 3
    )


def test_inspect_tells_what_is_in_a_lora(saved: Save, capsys: pytest.CaptureFixture) -> None:
    tensors = {**dialects(FACTORS)["kohya"], **of_clip("lora_te1_text_model_")}
    assert cli.main(["inspect", str(saved(tensors, "style.safetensors"))]) == 0
    assert capsys.readouterr().out == (
        "style.safetensors: LoRA in the names of kohya, rank 2 – 4; layers of the transformer: "
        "42, of CLIP-L: 4\n"
    )
