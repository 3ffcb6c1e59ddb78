"""Small models in the real layouts, through the loaders."""

import json
import math
import os
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from majicflux.benchmarks import random_models
from majicflux.engine.quant import quantize as quantizing
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.host import standalone
from majicflux.loaders import demo_models
from majicflux.loaders.convert_on_device import DeviceQuantizer
from majicflux.loaders.flux_dit import load_flux_dit
from majicflux.loaders.safetensors_file import ModelFileError
from majicflux.loaders.text_encoders import load_text_encoders
from majicflux.loaders.tokenizers import CLIP_TOKENIZER, T5_TOKENIZER, load_tokenizer
from majicflux.loaders.vae import load_vae


def dit_with(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "dit.safetensors"
    save_file(tensors, path)
    return path


def parameters(weights) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in weights.module.named_parameters()}


def test_prefixed_and_unprefixed_files_load_alike(models: Path, tmp_path: Path) -> None:
    prefixed = models / demo_models.DIT_FILE
    plain = {n.removeprefix("model.diffusion_model."): t for n, t in load_file(prefixed).items()}
    one, geometry = load_flux_dit(prefixed, PRECISIONS["bfloat16"])
    other, other_geometry = load_flux_dit(dit_with(tmp_path, plain), PRECISIONS["bfloat16"])
    assert geometry == other_geometry == random_models.DIT
    theirs = parameters(other)
    assert all(torch.equal(p, theirs[name]) for name, p in parameters(one).items())


def test_bfloat16_weights_are_those_of_the_file(models: Path) -> None:
    """Against DiffSynth's converter on an ordinarily loaded state dict."""
    from diffsynth.utils.state_dict_converters.flux_dit import FluxDiTStateDictConverter

    path = models / demo_models.DIT_FILE
    expected = FluxDiTStateDictConverter(load_file(path))
    found = parameters(load_flux_dit(path, PRECISIONS["bfloat16"])[0])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("precision", "attention", "modulation"),
    [
        ("float8_e4m3fn", torch.float8_e4m3fn, torch.bfloat16),
        ("int8 rotated", torch.int8, torch.bfloat16),
    ],
)
def test_eight_bits_are_for_the_matrices_of_the_blocks(
    models: Path, precision: str, attention: torch.dtype, modulation: torch.dtype
) -> None:
    found = parameters(load_flux_dit(models / demo_models.DIT_FILE, PRECISIONS[precision])[0])
    for name, parameter in found.items():
        in_block = name.startswith(("blocks.", "single_blocks."))
        if name.endswith(".scale"):
            assert parameter.dtype == torch.float32
        elif in_block and parameter.ndim == 2:
            assert parameter.dtype == (modulation if ".linear." in name else attention), name
        else:
            assert parameter.dtype == torch.bfloat16, name


def test_the_published_recipe_casts_every_parameter(models: Path) -> None:
    path = models / demo_models.DIT_FILE
    published = parameters(load_flux_dit(path, PRECISIONS["float8_e4m3fn unscaled"])[0])
    plain = parameters(load_flux_dit(path, PRECISIONS["bfloat16"])[0])
    assert published.keys() == plain.keys()
    for name, parameter in published.items():
        assert parameter.dtype == torch.float8_e4m3fn, name
        assert torch.equal(parameter.float(), plain[name].to(torch.float8_e4m3fn).float()), name


@pytest.mark.parametrize("precision", ["float8_e4m3fn", "int8 rotated"])
@pytest.mark.parametrize("short_of_memory", [False, True])
def test_another_device_can_convert(models: Path, precision: str, short_of_memory: bool) -> None:
    path = models / demo_models.DIT_FILE
    device = torch.device("cpu", 0)  # another device than `cpu` to PyTorch's comparisons
    there = 0
    quantize, convert = DeviceQuantizer.quantize, quantizing.quantize_rows

    def watched(card: DeviceQuantizer, values: torch.Tensor, *into: torch.Tensor) -> None:
        nonlocal there
        there += 1
        refuse = [short_of_memory]

        def refused_once(*arguments) -> None:
            if refuse.pop() if refuse else False:
                raise torch.OutOfMemoryError
            convert(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantizing, "quantize_rows", refused_once)
            quantize(card, values, *into)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceQuantizer, "quantize", watched)
        patch.setattr("majicflux.loaders.convert.MOST_WORKERS", 1)  # what is patched is shared
        elsewhere = load_flux_dit(path, PRECISIONS[precision], device=device)[0]
    assert there
    here = parameters(load_flux_dit(path, PRECISIONS[precision])[0])
    for name, parameter in parameters(elsewhere).items():
        assert torch.equal(parameter.view(torch.uint8), here[name].view(torch.uint8)), name


def test_a_damaged_weight_is_named_by_another_device_too(models: Path, tmp_path: Path) -> None:
    tensors = load_file(models / demo_models.DIT_FILE)
    tensors["model.diffusion_model.single_blocks.1.linear1.weight"][3, 5] = float("inf")
    path = dit_with(tmp_path, tensors)
    with pytest.raises(ModelFileError, match=r"1\.linear1\.weight: it holds a NaN, an inf"):
        load_flux_dit(path, PRECISIONS["float8_e4m3fn"], device=torch.device("cpu", 0))


def test_both_text_encoders_count_in_the_progress(models: Path) -> None:
    clip, t5 = models / demo_models.CLIP_FILE, models / demo_models.T5_FILE
    told: list[tuple[int, int, str]] = []
    load_text_encoders(clip, t5, torch.bfloat16, lambda *t: told.append(t))
    tensors = {**load_file(clip), **load_file(t5)}
    total = sum(t.nbytes for n, t in tensors.items() if "position_ids" not in n)
    assert told[0][:2] == (0, total)
    assert told[-1][:2] == (total, total)


def test_a_float8_file_is_not_rounded_a_second_time(models: Path, tmp_path: Path) -> None:
    source = load_file(models / demo_models.DIT_FILE)
    cast = {n: t.to(torch.float8_e4m3fn) for n, t in source.items()}
    path = dit_with(tmp_path, cast)
    as_float8 = parameters(load_flux_dit(path, PRECISIONS["float8_e4m3fn"])[0])
    as_bfloat16 = parameters(load_flux_dit(path, PRECISIONS["bfloat16"])[0])
    for name, exact in as_bfloat16.items():
        assert torch.equal(as_float8[name].to(torch.bfloat16), exact), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_source_precisions_load(models: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    source = load_file(models / demo_models.DIT_FILE)
    path = dit_with(tmp_path, {n: t.to(dtype) for n, t in source.items()})
    before = path.read_bytes()
    load_flux_dit(path, PRECISIONS["float8_e4m3fn"])
    assert path.read_bytes() == before


def test_a_transformer_without_guidance_loads(models: Path, tmp_path: Path) -> None:
    tensors = load_file(models / demo_models.DIT_FILE)
    schnell = {name: t for name, t in tensors.items() if "guidance_in" not in name}
    weights, geometry = load_flux_dit(dit_with(tmp_path, schnell), PRECISIONS["bfloat16"])
    assert not geometry.guidance
    assert weights.module.guidance_embedder is None


def test_t5_shards_load_like_the_single_file(models: Path, tmp_path: Path) -> None:
    clip, t5 = models / demo_models.CLIP_FILE, models / demo_models.T5_FILE
    folder = tmp_path / "text_encoder_2"
    folder.mkdir()
    tensors = list(load_file(t5).items())
    save_file(dict(tensors[:9]), folder / "model-00001-of-00002.safetensors")
    save_file(dict(tensors[9:]), folder / "model-00002-of-00002.safetensors")
    # ComfyUI's single file repeats the token table under a second name.
    single = tmp_path / "t5xxl.safetensors"
    table = load_file(t5)["shared.weight"].clone()
    save_file({**load_file(t5), "encoder.embed_tokens.weight": table}, single)

    expected = parameters(load_text_encoders(clip, t5, torch.bfloat16))
    for path in (folder, single):
        found = parameters(load_text_encoders(clip, path, torch.bfloat16))
        assert all(torch.equal(found[name], p) for name, p in expected.items())


def test_every_vae_weight_comes_from_the_file(models: Path) -> None:
    path = models / demo_models.VAE_FILE
    found = parameters(load_vae(path, torch.bfloat16))
    assert len(found) == 244
    expected = sorted(t.float().sum().item() for t in load_file(path).values())
    assert sorted(p.float().sum().item() for p in found.values()) == expected


def test_loading_keeps_no_second_copy(models: Path) -> None:
    """The weights are views of the blocks' buffers: nothing else of their size is alive."""
    weights, _ = load_flux_dit(models / demo_models.DIT_FILE, PRECISIONS["float8_e4m3fn"])
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for p in weights.module.parameters()
    }
    assert len(storages) == len(weights.blocks) + len(weights.once) + 1
    assert sum(storages.values()) == weights.total_bytes


def test_a_tokenizer_with_another_vocabulary_is_passed_over(models: Path) -> None:
    """The demo's tokenizer lies beside the file, but a real T5 has 32128 entries."""
    t5 = models / demo_models.T5_FILE
    assert load_tokenizer(T5_TOKENIZER, t5, random_models.T5.vocabulary, None)
    with pytest.raises(ModelFileError, match=r"No T5 tokenizer with 32128 entries .* tokenizer_2"):
        load_tokenizer(T5_TOKENIZER, t5, 32128, None)


def damage(path: Path, chance: Random) -> None:
    whole = bytearray(path.read_bytes())
    kind = chance.randrange(6)
    if kind < 2:
        whole = whole[: chance.randrange(len(whole))]
    elif kind == 2:
        for _ in range(chance.randint(1, 30)):
            whole[chance.randrange(len(whole))] = chance.randrange(256)
    elif kind == 3 and path.suffix == ".json":
        values = json.loads(whole)
        values[chance.choice([*values])] = chance.choice([None, [], {}, 1, "x"])
        whole = json.dumps(values).encode()
    else:
        whole = chance.choice([b"", b"{}", b"[]", b"<html>", b"null"])
    path.write_bytes(bytes(whole))


def test_a_damaged_tokenizer_is_named_or_works(models: Path, tmp_path: Path) -> None:
    chance, said = Random(0), []
    for case in range(120):
        kind, geometry = chance.choice(
            [(CLIP_TOKENIZER, random_models.CLIP), (T5_TOKENIZER, random_models.T5)]
        )
        rows = geometry.vocabulary
        folder = tmp_path / str(case) / kind.folder
        shutil.copytree(models / "text_encoders" / kind.folder, folder)
        damage(chance.choice(sorted(folder.iterdir())), chance)
        try:
            tokenizer = load_tokenizer(kind, folder.parent / "model.safetensors", rows, None)
        except ModelFileError as error:
            said.append(str(error))
            continue
        for text in ("", "a cat", "鸡 (x) 🐈"):
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            assert all(0 <= token < rows for token in ids)
    assert len(said) > 80
    assert all(f"{tmp_path}{os.sep}" in line and "\n" not in line for line in said)


def test_tokenizers_come_from_the_comfyui_that_the_models_belong_to(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "comfy" / "text_encoders" / "t5_tokenizer"
    shutil.copytree(models / demo_models.T5_TOKENIZER_FOLDER, bundle)
    monkeypatch.setattr(standalone, "models_folder", tmp_path / "models")
    assert standalone.bundled_folder(*T5_TOKENIZER.bundled) == bundle
    assert standalone.bundled_folder(*CLIP_TOKENIZER.bundled) is None
    alone = tmp_path / "models" / "text_encoders" / "t5.safetensors"
    rows = random_models.T5.vocabulary
    assert load_tokenizer(
        T5_TOKENIZER, alone, rows, standalone.bundled_folder(*T5_TOKENIZER.bundled)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [480.0, -1000.0, math.inf, -math.inf, math.nan])
def test_a_value_too_large_for_a_plain_cast_is_refused(
    models: Path, tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    tensors = load_file(models / demo_models.DIT_FILE)
    name = "model.diffusion_model.single_blocks.0.linear1.weight"
    tensors[name] = tensors[name].to(dtype)
    tensors[name][3, 5] = value
    path = dit_with(tmp_path, tensors)
    said = "a value is too large for float8" if math.isfinite(value) else "it holds a NaN"
    with pytest.raises(ModelFileError, match=rf"linear1\.weight: {said}"):
        load_flux_dit(path, PRECISIONS["float8_e4m3fn unscaled"])
    if math.isfinite(value):
        weights = load_flux_dit(path, PRECISIONS["float8_e4m3fn"])[0]
        layer = weights.module.single_blocks[0].to_qkv_mlp
        assert layer.weight[3, 5].float() * layer.scale[3] == pytest.approx(value, rel=0.07)


@pytest.mark.parametrize("value", [448.0, -448.0, 464.0])
def test_a_value_that_rounds_to_the_largest_is_cast_plainly(
    models: Path, tmp_path: Path, value: float
) -> None:
    tensors = load_file(models / demo_models.DIT_FILE)
    tensors["model.diffusion_model.single_blocks.0.linear1.weight"][3, 5] = value
    weights = load_flux_dit(dit_with(tmp_path, tensors), PRECISIONS["float8_e4m3fn unscaled"])[0]
    cast = weights.module.single_blocks[0].to_qkv_mlp.weight[3, 5].float()
    assert cast == math.copysign(448.0, value)
