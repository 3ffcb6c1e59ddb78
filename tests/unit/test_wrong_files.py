"""What a user is told about a file that cannot be used, and that nothing is kept of it."""

import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from file_layouts import to_diffusers
from majicflux.engine.precision import PRECISIONS
from majicflux.engine.text_encoders import ClipGeometry
from majicflux.loaders import demo_models
from majicflux.loaders.flux_dit import inspect_flux_dit, load_flux_dit
from majicflux.loaders.layouts import clip_layout
from majicflux.loaders.safetensors_file import ModelFileError, SafetensorsFile
from majicflux.loaders.text_encoders import inspect_clip, inspect_t5
from majicflux.loaders.vae import inspect_vae


def refused(inspect: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        inspect(path)
    message = str(caught.value)
    assert path.name in message
    assert message.endswith(".")
    assert message.count(". ") <= 2, "one or two sentences"
    return message


def saved(folder: Path, *names: str, shape: tuple[int, ...] = (2, 2)) -> Path:
    path = folder / "model.safetensors"
    save_file({name: torch.zeros(shape) for name in names}, path)
    return path


def changed_dit(models: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    tensors = load_file(models / demo_models.DIT_FILE)
    for name, tensor in changes.items():
        full = next(n for n in tensors if n.endswith(name.replace("__", ".")))
        if tensor is None:
            del tensors[full]
        else:
            tensors[full] = tensor
    path = folder / "changed.safetensors"
    save_file(tensors, path)
    return path


def test_missing_file(tmp_path: Path) -> None:
    message = refused(inspect_flux_dit, tmp_path / "gone.safetensors")
    assert "cannot be opened: No such file" in message


def test_lora(tmp_path: Path) -> None:
    path = saved(tmp_path, "double_blocks.0.img_attn.qkv.lora_A.weight")
    message = refused(inspect_flux_dit, path)
    assert "is a LoRA, not a Flux.1 transformer" in message
    assert "models/loras" in message


def test_sdxl_checkpoint(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        "model.diffusion_model.label_emb.0.0.weight",
        "conditioner.embedders.1.model.ln_final.weight",
        "first_stage_model.decoder.mid.block_1.conv1.weight",
    )
    assert "is an SDXL checkpoint" in refused(inspect_flux_dit, path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion 1.x or 2.x"),
        ("double_stream_modulation_img.lin.weight", "a Flux.2 transformer"),
        ("transformer_blocks.0.mlp_fc1.qweight", "SVDQuant"),
        ("double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4", "NF4"),
        ("controlnet_x_embedder.weight", "a ControlNet"),
        ("something.else", "none of its 1 tensors"),
        ("something.else", "\nIts names: something.else ..."),
    ],
)
def test_other_kinds_are_named(tmp_path: Path, name: str, said: str) -> None:
    assert said in refused(inspect_flux_dit, saved(tmp_path, name))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "is a GGUF file"),
        (pickle.dumps({"weight": [1.0] * 100}), "is a Python pickle, which can run code"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"", "is not a safetensors file"),
        (b"\x00" * 100, "is not a safetensors file"),
        (b"\xff" * 8 + b"{" + bytes(100), "is not a safetensors file"),
        ((10_000).to_bytes(8, "little") + b'{"a":', "is cut off inside its header"),
        ((12).to_bytes(8, "little") + b'{"a": nope  ', "has a damaged header"),
    ],
)
def test_files_that_are_not_safetensors(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert said in refused(inspect_flux_dit, path)


def test_torch_pickle(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"weight": torch.zeros(2)}, path)
    assert "is a PyTorch pickle, which can run code" in refused(inspect_flux_dit, path)


def test_truncated_file_tells_how_much_is_there(models: Path, tmp_path: Path) -> None:
    whole = (models / demo_models.DIT_FILE).read_bytes()
    path = tmp_path / "majicflus_v134.safetensors"
    path.write_bytes(whole[: len(whole) // 2])
    message = refused(inspect_flux_dit, path)
    assert "is cut off: 0.01 GB of 0.02 GB are there. Download it again." in message


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [4, 12])}, "tensors overlap"),
        ({"a": ("F32", [3], [0, 8])}, "shape and length disagree"),
        ({"a": ("F32", [-2], [0, 8])}, "whole numbers"),
        ({"a": ("F32", [2], [0, 2**60])}, "shape and length disagree"),
        ({"a": ("F32", [2**58], [0, 2**60])}, "is cut off"),
        ({"a": ("Q4", [2], [0, 8])}, "as Q4, a format MajicFlux cannot read"),
    ],
)
def test_damaged_headers(tmp_path: Path, entries: dict, said: str) -> None:
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        for name, (dtype, shape, offsets) in entries.items()
    }
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    assert said in refused(SafetensorsFile, path)


def test_a_name_that_appears_twice(tmp_path: Path) -> None:
    entry = '"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = f"{{{entry},{entry}}}".encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert "a name appears twice" in refused(SafetensorsFile, path)


def test_a_missing_tensor(models: Path, tmp_path: Path) -> None:
    path = changed_dit(models, tmp_path, single_blocks__1__linear1__bias=None)
    message = refused(inspect_flux_dit, path)
    assert "1 of 100 tensors are missing, single_blocks.1.linear1.bias among them" in message


def test_a_tensor_of_another_shape(models: Path, tmp_path: Path) -> None:
    path = changed_dit(models, tmp_path, single_blocks__1__linear1__bias=torch.zeros(7))
    assert "has the shape [7] where [1792] follows" in refused(inspect_flux_dit, path)


def test_parts_that_do_not_stack(models: Path, tmp_path: Path) -> None:
    plain = load_file(models / demo_models.DIT_FILE)
    names = {n: n.removeprefix("model.diffusion_model.") for n in plain}
    tensors = to_diffusers({names[n]: t for n, t in plain.items()})
    tensors["transformer_blocks.1.attn.to_k.weight"] = torch.zeros(256, 128)
    path = tmp_path / "diffusers.safetensors"
    save_file(tensors, path)
    message = refused(inspect_flux_dit, path)
    assert "transformer_blocks.1.attn.to_k.weight has rows of [128] where [256]" in message


def test_a_clip_of_an_odd_width(tmp_path: Path) -> None:
    layout = clip_layout(ClipGeometry(width=100, mlp_width=8, layers=2, vocabulary=8))
    path = tmp_path / "clip.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in layout.items()}, path)
    assert "is 100 wide, which is no multiple of 64" in refused(inspect_clip, path)


def test_an_integer_quantisation(models: Path, tmp_path: Path) -> None:
    weight = torch.zeros(1792, 256, dtype=torch.int8)
    path = changed_dit(models, tmp_path, single_blocks__1__linear1__weight=weight)
    assert "as I8, a quantisation" in refused(inspect_flux_dit, path)


def test_a_scale_that_is_none_of_comfyuis(models: Path, tmp_path: Path) -> None:
    tensors = load_file(models / demo_models.DIT_FILE)
    name = "model.diffusion_model.single_blocks.1.linear1.weight"
    tensors[name.replace("weight", "weight_scale")] = torch.ones(1792, 8)
    path = tmp_path / "blocks_of_32.safetensors"
    save_file(tensors, path)
    message = refused(inspect_flux_dit, path)
    assert "with a scale of F32 and shape [1792, 8], which MajicFlux cannot read" in message


def test_a_damaged_weight_is_named(models: Path, tmp_path: Path) -> None:
    weight = torch.zeros(1792, 256)
    weight[3, 4] = float("nan")
    path = changed_dit(models, tmp_path, single_blocks__1__linear1__weight=weight)
    inspect_flux_dit(path)  # a header cannot tell
    with pytest.raises(ModelFileError, match=r"single_blocks\.1\.linear1\.weight.* a NaN"):
        load_flux_dit(path, PRECISIONS["float8_e4m3fn"])


def test_a_vae_as_text_encoder_and_the_other_way_round(models: Path) -> None:
    vae, clip, t5 = (
        models / name for name in (demo_models.VAE_FILE, demo_models.CLIP_FILE, demo_models.T5_FILE)
    )
    assert "is a VAE, not a T5 text encoder. Choose it in the Flux VAE" in refused(inspect_t5, vae)
    assert "is a T5 text encoder, not a CLIP text encoder" in refused(inspect_clip, t5)
    assert "is a CLIP text encoder, not a VAE" in refused(inspect_vae, clip)
    assert "is a VAE, not a Flux.1 transformer" in refused(inspect_flux_dit, vae)


def test_a_vae_of_another_model(models: Path, tmp_path: Path) -> None:
    tensors = load_file(models / demo_models.VAE_FILE)
    tensors["decoder.conv_in.weight"] = torch.zeros(512, 4, 3, 3)
    path = tmp_path / "sdxl_vae.safetensors"
    save_file(tensors, path)
    assert "its latents have 4 channels, Flux's have 16" in refused(inspect_vae, path)


def test_a_missing_t5_shard_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "text_encoder_2"
    folder.mkdir()
    save_file({"shared.weight": torch.zeros(2)}, folder / "model-00002-of-00002.safetensors")
    message = refused(inspect_t5, folder)
    assert "lacks model-00001-of-00002.safetensors. Download it into that folder." in message


@pytest.mark.parametrize(
    ("total", "said"), [(99999, "is one of 99,999 parts"), (0, "is one of 0 parts"), (900, "lacks")]
)
def test_no_number_of_shards_takes_long_or_fills_the_screen(
    tmp_path: Path, total: int, said: str
) -> None:
    path = tmp_path / f"{'n' * 150}-00001-of-{total:05}.safetensors"
    save_file({"shared.weight": torch.zeros(2)}, path)
    start = time.process_time()
    with pytest.raises(ModelFileError, match=said) as caught:
        inspect_t5(path)
    assert time.process_time() - start < 1
    assert len(str(caught.value)) < 1000


def test_an_empty_folder(tmp_path: Path) -> None:
    folder = tmp_path / "text_encoder_2"
    folder.mkdir()
    assert "holds no model parts" in refused(inspect_t5, folder)
