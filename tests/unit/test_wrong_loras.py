"""LoRAs that are damaged, for another model or do not fit are refused in our own words."""

import json
import math
import os
import pickle
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from broken_headers import mutated, small_header
from lora_dialects import (
    AB,
    DOWN_UP,
    PROJ,
    QKV,
    H,
    Save,
    control_lora,
    full_size,
    kronecker,
    of_clip,
    random_factors,
    random_of,
    to_diffusers_names,
    written,
)
from lora_kinds import of
from majicflux import cli
from majicflux.benchmarks.random_models import CLIP, DIT
from majicflux.engine.diffsynth_files import diffsynth_module
from majicflux.engine.flux.geometry import ClipGeometry, FluxGeometry
from majicflux.loaders import demo_models
from majicflux.loaders.bake import changes_of
from majicflux.loaders.flux_dit import inspect_flux_dit
from majicflux.loaders.lora import describe_lora, load_lora
from majicflux.loaders.lora_file import inspect_lora
from majicflux.loaders.recognise import is_lora
from majicflux.loaders.safetensors_file import ModelFileError
from majicflux.loaders.tensor_sources import Sources


def refused(path: Path, flux: FluxGeometry | None = DIT) -> str:
    with pytest.raises(ModelFileError) as caught:
        inspect_lora(path, None) if flux is None else load_lora(path, flux, CLIP)
    message = str(caught.value)
    assert path.name in message
    first = message.partition("\n")[0]
    assert first.endswith(".")
    assert first.count(". ") <= 2, "one or two sentences"
    return message


ATTN2 = "attentions{}0{}transformer_blocks{}0{}attn2{}to_k"
OTHERS = {
    "SDXL": {
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k.lora_down.weight": (4, 2048),
    },
    "SDXL, Diffusers": {
        f"unet.down_blocks.1.{ATTN2.format(*'.....')}.lora_A.weight": (4, 2048),
    },
    "SDXL, text": {
        "lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": (4, 640),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 1280),
    },
    "Stable Diffusion 1.x / 2.x": {
        f"lora_unet_down_blocks_0_{ATTN2.format(*'_____')}.lora_down.weight": (4, 768),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 768),
    },
    "Flux.2": {"single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight": (4, 3072)},
    "Flux.2, 4B": {
        "diffusion_model.single_blocks.0.linear1.lora_A.weight": (4, 3072),
        "diffusion_model.single_blocks.0.linear1.lora_B.weight": (9 * 3072, 4),
    },
    "Flux.2, dev": {
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (4, 6144),
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": (3 * 6144, 4),
    },
    "Stable Diffusion 3": {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 1536),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": (1536, 4),
    },
    "Qwen-Image": {"lora_unet_transformer_blocks_0_img_mlp_net_0_proj.lora_down.weight": (4, 3072)},
    "HunyuanVideo": {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 3072),
        "lora_unet_double_blocks_0_img_mlp_fc1.lora_down.weight": (4, 3072),
    },
    "Chroma": {"diffusion_model.distilled_guidance_layer.layers.0.in_layer.lora_A.weight": (4, 64)},
    "Wan": {"diffusion_model.blocks.0.cross_attn.k.lora_A.weight": (4, 5120)},
    "Z-Image / Lumina": {"diffusion_model.layers.0.attention.to_q.lora_A.weight": (4, 3840)},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("flux", [DIT, FluxGeometry(), None], ids=["small", "dev", "none"])
def test_loras_of_other_models_are_named(saved: Save, name: str, flux) -> None:
    path = saved({n: torch.zeros(shape) for n, shape in OTHERS[name].items()})
    said = f"is a LoRA for {name.partition(',')[0]}, not a LoRA for Flux.1. MajicFlux runs"
    assert said in refused(path, flux)


def test_more_blocks_than_flux1_has_are_another_models(saved: Save) -> None:
    factors = (torch.zeros(4, 3072), torch.zeros(3072, 4), 4.0)
    for block in ("transformer_blocks.59", "single_transformer_blocks.39"):
        path = saved(written({f"{block}.attn.to_q": factors}, "transformer."))
        assert "a LoRA for a model of more blocks than Flux.1 has" in refused(path, FluxGeometry())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "is a Flux.1 transformer, not a LoRA for Flux.1"),
        ("decoder.mid.block_1.conv1.weight", "is a VAE, not a LoRA for Flux.1"),
        ("something.else", "is not a LoRA for Flux.1: none of its 1 tensors"),
        ("lora_unet_nothing.lora_down.weight", "is not a LoRA for Flux.1: none of its 1 tensors"),
        (f"{PROJ}.oft_blocks", f"does not know, as in {PROJ}.oft_blocks"),
        ("lora_te3_encoder_block_0_layer_1_DenseReluDense_wo.lora_up.weight", "changes T5 alone"),
        (f"{PROJ}.lora_A.weight", f"is incomplete: {PROJ}.up is missing"),
        (f"{PROJ}.hada_w1_a", f"is incomplete: {PROJ}.hada_w1_b is missing"),
        (f"{PROJ}.lokr_w1", f"is incomplete: {PROJ}.lokr_w2_a is missing"),
    ],
)
def test_files_with_nothing_for_the_model(saved: Save, name: str, said: str) -> None:
    assert said in refused(saved({name: torch.zeros(4, H)}))


GLORA = [f"{PROJ}.{part}.weight" for part in ("a1", "a2", "b1", "b2")]


@pytest.mark.parametrize(
    "names",
    [
        GLORA,
        [f"{PROJ}.{part}" for part in ("oft_blocks", "alpha", "rescale")],
        [f"{PROJ}.{part}.weight" for part in ("lora_mid", "lora_up", "lora_down")],
    ],
    ids=["GLoRA", "OFT", "of convolutions"],
)
def test_a_method_that_is_not_known_is_told_as_a_whole(saved: Save, names: list[str]) -> None:
    """By a name that is of no other method, and beside what is known."""
    strange = {name: torch.zeros(4, 4) for name in names}
    assert f"a method that MajicFlux does not know, as in {names[0]}." in refused(saved(strange))
    report = load_lora(saved(strange | written(random_factors([QKV]))), DIT, CLIP).report
    ((reason, unused),) = report.unused.items()
    assert reason == "a method that MajicFlux does not know"
    assert {*unused} == {*names}


@pytest.mark.parametrize(
    "name", [f"{PROJ}.lora_A", f"diffusion_model.{PROJ}.diff_b", f"{PROJ}.set_weight",
             "lycoris_transformer_blocks_0_attn_to_q.diff"],
)  # fmt: skip
def test_a_lora_without_the_usual_names_is_one(name: str) -> None:
    assert is_lora([name])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_A.weight": (4, 2 * H)},
         f"what it adds to {PROJ} has the shape [{H}, {2 * H}], where the model has [{H}, {H}]"),
        ({"lora_B.weight": (3 * H, 4)}, f"has the shape [{3 * H}, {H}]"),
        ({"lora_B.weight": (H, 5)}, f"lora_B.weight has the shape [{H}, 5] where [{H}, 4] follows"),
        ({"lora_A.weight": (4,)}, "lora_A.weight has the shape [4] where [n, m] follows"),
        ({"lora_A.weight": (4, H, 2)}, "where [n, m] follows"),
        ({"lora_A.weight": (0, H), "lora_B.weight": (H, 0)}, "_B.weight has rank 0. Download"),
        ({"alpha": (2,)}, "alpha has the shape [2] where [] follows"),
        ({"dora_scale": (5, 1)}, f"dora_scale has the shape [5, 1], where the model has [{H}]"),
        ({"lora_B.bias": (5,)}, f"lora_B.bias has the shape [5], where the model has [{H}]"),
    ],
)  # fmt: skip
def test_a_shape_that_does_not_fit(saved: Save, changes: dict, said: str) -> None:
    tensors = written(random_factors([PROJ]))
    tensors |= {f"{PROJ}.{name}": torch.zeros(shape) for name, shape in changes.items()}
    assert said in refused(saved(tensors))


def test_a_control_lora_fits_models_that_take_a_picture_alone_or_none(saved: Save) -> None:
    told = {"img_in.reshape_weight": torch.tensor([H, 128])}  # as ComfyUI would write it
    path = saved(control_lora() | told)
    assert describe_lora(path).takes_picture
    assert not describe_lora(path).unused
    for channels, beside_noise in ((64, True), (128, False)):
        lora = load_lora(path, replace(DIT, in_channels=channels), CLIP)
        assert lora.report.takes_picture == beside_noise
    of_fill = replace(DIT, in_channels=384)
    said = f"adds to img_in has the shape [{H}, 128], where the model has [{H}, 384]"
    assert said in refused(path, of_fill)
    decomposed = control_lora() | {"img_in.dora_scale": torch.ones(H, 1)}
    assert f"img_in has the shape [{H}, 128], where" in refused(saved(decomposed))
    wide = written({"img_in": (torch.zeros(4, 384), torch.zeros(H, 4), 1.0)})
    assert f"img_in has the shape [{H}, 384], where" in refused(saved(wide))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "alpha", "dora_scale"])
def test_what_is_no_number_is_refused(saved: Save, part: str, value: float) -> None:
    tensors = written(random_factors([PROJ]))
    tensors[f"{PROJ}.dora_scale"] = torch.ones(H, 1)
    tensors[f"{PROJ}.{part}"].view(-1)[-1] = value
    assert f"{part}: it holds a NaN, an infinity" in refused(saved(tensors))


def test_a_format_that_is_not_read(saved: Save) -> None:
    tensors = written(random_factors([PROJ]))
    tensors[f"{PROJ}.lora_A.weight"] = torch.zeros(4, H, dtype=torch.int8)
    assert "stores double_blocks.0.txt_attn.proj.lora_A.weight as I8" in refused(saved(tensors))


def test_files_that_are_no_safetensors(tmp_path: Path, saved: Save) -> None:
    path = saved(written(random_factors([PROJ])))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert "is cut off: 1 of its" in refused(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "pickle, which can run code" in refused(path)
    torch.save({"a": torch.zeros(2)}, path)
    assert "pickle, which can run code" in refused(path)
    assert "No such file" in refused(tmp_path / "gone.safetensors")


def small_files(folder: Path) -> list[bytes]:
    """Small LoRAs of all methods and several dialects."""
    layers = [PROJ, QKV, "final_layer.adaLN_modulation.1"]
    factors = random_factors(layers, rank=2)
    apart = to_diffusers_names(factors)
    kinds = [
        written(factors, "lora_unet_", DOWN_UP, underscores=True),
        written(apart, "transformer.", AB, alphas=False),
        {**written(apart, "lycoris_", underscores=True), **of_clip("text_encoder.text_model.")},
        {f"{PROJ}.{n}": t for n, t in kronecker((True, False), (16, 16), 2).items()},
        {f"{PROJ}.{n}": t for n, t in kronecker((False, False), (16, 16), 2).items()},
        {f"lycoris_double_blocks_0_txt_attn_proj.hada_w{n}_{part}": random_of(*shape)
         for n in (1, 2) for part, shape in (("a", (H, 2)), ("b", (2, H)))},
        {**written(random_factors([PROJ], rank=2)), f"{PROJ}.dora_scale": 1 + random_of(H, 1),
         f"{PROJ}.lora_B.bias": random_of(H),
         "double_blocks.0.img_attn.norm.key_norm.scale": random_of(128)},
        {f"{PROJ}.diff": random_of(H, H), f"{PROJ}.diff_b": random_of(H)},
        {**of(PROJ, kronecker((True, True), (8, 16), 1)), f"{QKV}.set_weight": random_of(3 * H, H)},
        {**written(random_factors([PROJ], rank=2)), f"{PROJ}.dora_scale": random_of(1, H)},
    ]  # fmt: skip
    wholes = []
    for tensors in kinds:
        path = folder / "small.safetensors"
        save_file({n: t.contiguous() for n, t in tensors.items()}, path,
                  {"lora_adapter_metadata": '{"lora_alpha": 8}'})  # fmt: skip
        wholes.append(path.read_bytes())
    return wholes


def renamed(chance: random.Random, whole: bytes) -> bytes:
    """The file with one name changed: of another layer, part or method, or a letter of it."""
    header, body = small_header(whole)
    name = chance.choice([n for n in header if n != "__metadata__"])
    other = chance.choice([n for n in header if n != "__metadata__"])
    module, _, last = name.partition(".")
    at = chance.randrange(len(name))
    new = chance.choice(
        [
            name[:at] + chance.choice("._0a\u00e9") + name[at + 1 :],
            name.replace("0", "7777"),
            name.replace("blocks", "single_blocks"),
            f"{module}.{other.rpartition('.')[2]}",
            f"transformer.{name}",
            f"base_model.model.{name}",
            ".".join(chance.sample(name.split("."), name.count(".") + 1)),
            last,
        ]
    )
    header[new or "x"] = header.pop(name)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def bake(path: Path, sources: Sources) -> None:
    """Into zeros, which become finite values."""
    for name, changes in changes_of([(inspect_lora(path, DIT, CLIP), 1.0)], sources).items():
        for change in changes:
            values = torch.zeros(change.rows, math.prod(sources[name].shape[1:]))
            change.apply(0, values)
            assert values.isfinite().all()


def test_every_broken_lora_is_refused_in_our_own_words(
    tmp_path: Path, models: Path, one_thread: None, caplog: pytest.LogCaptureFixture
) -> None:
    names = diffsynth_module("utils.state_dict_converters.flux_dit")
    sources = inspect_flux_dit(models / demo_models.DIT_FILE)[1]
    sources = names.FluxDiTStateDictConverter(sources)
    chance = random.Random(0)
    wholes = small_files(tmp_path)
    path = tmp_path / "model.safetensors"
    cases = int(os.environ.get("MAJICFLUX_FUZZ_CASES", "1500"))
    refusals = 0
    for case in range(cases):
        whole = chance.choice(wholes)
        kind = chance.randrange(4)
        if kind == 0:
            changed = renamed(chance, whole)
        elif kind == 1:  # bytes of the numbers
            bytes_ = bytearray(whole)
            for _ in range(chance.randint(1, 8)):
                bytes_[-chance.randint(1, min(5000, len(bytes_)))] = chance.randrange(256)
            changed = bytes(bytes_)
        else:
            changed = mutated(chance, whole)
        path.write_bytes(changed)
        try:
            adapter = load_lora(path, DIT, CLIP)
            bake(path, sources)
        except ModelFileError:
            refusals += 1
            continue
        except Exception as error:
            pytest.fail(f"case {case}: {error!r} is not our own error")
        for terms in (*adapter.terms.values(), *adapter.text_encoder.values()):
            for term in terms:
                assert math.isfinite(term.scale)
                assert term.down.isfinite().all()
                assert term.up.isfinite().all()
    assert refusals > cases * 0.4


HOSTILE = {
    "dots": {"." * 200 + f"{i}": (0,) for i in range(9000)},
    "underscores": {"lora_unet_" + "_" * 200 + f"{i}.alpha": () for i in range(9000)},
    "prefixes": {"transformer." * 20 + f"{i}.lora_A.weight": (1, 1) for i in range(9000)},
    "blocks": {f"double_blocks.{i}.img_attn.qkv.lora_A.weight": (1, 1) for i in range(9000)},
    "patterns": {f"{PROJ}{'.a' * 40}.{i}.lora_A.weight": (1, 1) for i in range(9000)},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_header_of_a_lora_takes_long(tmp_path: Path, kind: str) -> None:
    path = full_size(HOSTILE[kind], tmp_path / "model.safetensors")
    start = time.process_time()
    with pytest.raises(ModelFileError) as caught:
        inspect_lora(path, DIT)
    assert time.process_time() - start < 2
    assert len(str(caught.value)) < 1000


def test_a_file_for_another_clip_does_not_fit(saved: Save) -> None:
    path = saved(of_clip("lora_te1_text_model_"))
    with pytest.raises(ModelFileError, match="does not fit this model"):
        load_lora(path, DIT, ClipGeometry())


def test_inspect_refuses_the_lora_of_another_model(saved: Save, capsys) -> None:
    path = saved({n: torch.zeros(shape) for n, shape in OTHERS["SDXL"].items()})
    assert cli.main(["inspect", str(path)]) == 1
    assert "is a LoRA for SDXL, not a LoRA for Flux.1" in capsys.readouterr().err
