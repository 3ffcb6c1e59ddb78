"""What a user is told about a file that cannot be used, and that nothing is kept of it."""

import json
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from file_layouts import int8_tensorwise, scaled, to_diffusers
from majicflux.engine.flux.geometry import ClipGeometry
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.lab.precision import measure
from majicflux.loaders import demo_models
from majicflux.loaders.flux_dit import inspect_flux_dit, load_flux_dit
from majicflux.loaders.layouts import clip_layout
from majicflux.loaders.lora_file import inspect_lora
from majicflux.loaders.recognise import FLUX_DIT
from majicflux.loaders.safetensors_file import ModelFileError, SafetensorsFile
from majicflux.loaders.text_encoders import inspect_clip, inspect_t5, load_text_encoders
from majicflux.loaders.vae import inspect_vae, load_vae


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
        ("lycoris_double_blocks_0_img_attn_qkv.lokr_w1", "a LoRA"),
        ("transformer.transformer_blocks.0.attn.to_q.lora.down.weight", "a LoRA"),
        ("double_blocks.0.img_attn.qkv.weight._data", "quantized by optimum-quanto"),
        ("transformer_blocks.0.attn.to_q._weight_qdata", "quantized by torchao"),
        ("double_blocks.0.img_attn.qkv.W_q", "quantized by HQQ"),
        ("transformer_blocks.0.attn.to_q.qzeros", "quantized by GPTQ / AWQ"),
        ("transformer_blocks.0.attn.to_q.weight_packed", "quantized by compressed-tensors"),
        ("blocks.0.cross_attn.norm_k.weight", "a transformer of Wan"),
        ("joint_blocks.0.x_block.attn.qkv.weight", "a transformer of Stable Diffusion 3"),
        ("double_stream_blocks.0.block.adaLN_modulation.1.weight", "a transformer of HiDream"),
        ("noise_refiner.0.attention.qkv.weight", "a transformer of Z-Image / Lumina"),
        ("model.layers.0.post_attention_layernorm.weight", "a language model"),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", "a CLIP vision model"),
        ("something.else", "none of its 1 tensors"),
        ("something.else", "\nIts names: something.else ..."),
    ],
)
def test_other_kinds_are_named(tmp_path: Path, name: str, said: str) -> None:
    assert said in refused(inspect_flux_dit, saved(tmp_path, name))


BFL, DIFFUSERS = FLUX_DIT.markers


# Names in published files, and what is said of them in one or two sentences.
BESIDE_A_MODEL = {
    "InstantX, converted": (
        ["image_proj.proj.0.weight", "image_proj.norm.weight", "ip_adapter.0.to_k_ip.weight"],
        r"is an IP-Adapter, not .*\. MajicFlux cannot apply it; .* FLUX\.1-Redux with ComfyUI's",
    ),
    "XLabs IP-Adapter": (
        ["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",
         "ip_adapter_proj_model.norm.weight", "ip_adapter_proj_model.proj.weight"],
        r"is an IP-Adapter of XLabs, not .*\. MajicFlux cannot apply it; ",
    ),
    "XLabs ControlNet": (
        ["controlnet_blocks.0.weight", "double_blocks.0.img_attn.norm.key_norm.scale",
         "double_blocks.0.img_attn.qkv.weight", "img_in.weight", "input_hint_block.0.weight",
         "pos_embed_input.weight"],
        r"is a ControlNet, not .*\. .*models/controlnet",
    ),
    "Union-Pro 2.0": (
        ["controlnet_blocks.0.weight", "controlnet_x_embedder.weight",
         "transformer_blocks.0.attn.add_q_proj.weight", "transformer_blocks.0.attn.norm_q.weight"],
        r"is a ControlNet, not .*\. .*models/controlnet",
    ),
    "SDXL ControlNet": (
        ["controlnet_cond_embedding.conv_in.weight", "controlnet_down_blocks.0.weight"],
        r"is a ControlNet for SDXL or Stable Diffusion, not .*\. MajicFlux runs Flux\.1 models",
    ),
    "old ControlNet": (
        ["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"],
        "is a ControlNet for SDXL or Stable Diffusion, not ",
    ),
    "PuLID 0.9": (
        ["pulid_ca.19.to_q.weight", "pulid_encoder.proj_out"],
        r"is a PuLID model, not .*\. MajicFlux cannot apply it: it needs further models, which",
    ),
    "PuLID 1.1": (["id_adapter_attn_layers.0.to_q.weight"], "is a PuLID model, not "),
    "InfiniteYou": (
        ["image_proj.latents", "image_proj.proj_in.weight"],
        r"is a part of InfiniteYou or of an IP-Adapter, not .*\. MajicFlux cannot apply it: ",
    ),
    "Redux": (
        ["redux_up.weight", "redux_up.bias", "redux_down.weight", "redux_down.bias"],
        r"is a Redux style model, not .*\. Choose it in ComfyUI's Load Style Model; it belongs in",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "inspect", [inspect_flux_dit, inspect_lora, inspect_clip, inspect_t5, inspect_vae]
)
@pytest.mark.parametrize("names_and_text", BESIDE_A_MODEL.values(), ids=BESIDE_A_MODEL)
def test_what_stands_beside_a_model_is_named_with_a_reason(
    tmp_path: Path, inspect: Callable[[Path], object], names_and_text: tuple[list[str], str]
) -> None:
    names, text = names_and_text
    assert re.search(text, refused(inspect, saved(tmp_path, *names)))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"image_proj": ["norm.weight"], "ip_adapter": ["0.to_k_ip.weight"]}, "is an IP-Adapter, "),
        ({"image_proj": ["latents", "proj_in.weight"]}, "is a part of InfiniteYou or of an IP-Ad"),
        ({"model": ["weight"]}, "is a PyTorch pickle, which can run code when opened; use the .sa"),
    ],
)
def test_pickles_of_which_there_are_no_safetensors(tmp_path, parts, said: str, old: bool) -> None:
    path = tmp_path / "ip-adapter.bin"
    state = {part: {name: torch.zeros(2, 2) for name in names} for part, names in parts.items()}
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    said = said.replace("PyTorch", "Python") if old else said
    for inspect in (inspect_flux_dit, inspect_lora):
        assert said in refused(inspect, path)


def test_a_whole_model_is_no_lora_that_replaces_norms(models: Path) -> None:
    message = refused(inspect_lora, models / demo_models.DIT_FILE)
    assert "is a Flux.1 transformer, not a LoRA for Flux.1" in message


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (BFL, "distilled_guidance_layer.norms.0.scale", "a transformer of Chroma"),
        (DIFFUSERS, "distilled_guidance_layer.layers.0.weight", "a transformer of Chroma"),
        (BFL, "double_stream_modulation_img.lin.weight", "a Flux.2 transformer"),
        (BFL, "controlnet_blocks.0.weight", "a ControlNet"),
        (BFL, "txt_in.individual_token_refiner.blocks.0.mlp.0.weight", "HunyuanVideo"),
        (DIFFUSERS, "context_embedder.token_refiner.0.weight", "HunyuanVideo"),
        (DIFFUSERS, "transformer_blocks.0.img_mod.1.weight", "a transformer of Qwen-Image"),
        ("joint_" + DIFFUSERS, "joint_transformer_blocks.0.ff.out", "a transformer of AuraFlow"),
        (DIFFUSERS, "pos_embed.proj.weight", "a transformer of Stable Diffusion 3"),
        (BFL, "double_blocks.0.img_mlp.gate_proj.weight", "a transformer of Ovis-Image"),
        (BFL, "double_blocks.0.img_attn.qkv.weight.absmax", "an NF4"),
        (BFL, "double_blocks.0.img_attn.qkv.weight_scale_2", "quantized by NVFP4"),
        (BFL, "double_blocks.0.img_attn.qkv.SCB", "quantized by bitsandbytes"),
    ],
)
def test_models_with_some_of_flux1s_names_are_named(saved, ours, theirs: str, said: str) -> None:
    path = saved({ours: torch.zeros(2, 2), theirs: torch.zeros(2)})
    message = refused(inspect_flux_dit, path)
    assert said in message
    assert "not a Flux.1 transformer" in message
    assert "ownload it again" not in message


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ("weight_scale_2", "quantized by NVFP4"),
        ("weight_scale_inv", "quantized by block-wise float8"),
        ("pre_quant_scale", "quantized by ModelOpt"),
        ("weight_s_rel", "quantized by W4A8"),
    ],
)
def test_a_multiplier_that_would_be_left_out_is_named(plain, saved, beside: str, said) -> None:
    """The file has everything that a float8 file has, and would paint noise."""
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in plain.items()}
    tensors[f"single_blocks.1.linear1.{beside}"] = torch.ones(2)
    message = refused(inspect_flux_dit, saved(tensors))
    assert said in message


def test_a_real_nvfp4_file_is_named(plain, saved) -> None:
    tensors = dict(plain)
    for name, tensor in plain.items():
        if tensor.ndim == 2 and "blocks." in name:
            rows, columns = tensor.shape
            tensors[name] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
            tensors[f"{name}_scale"] = torch.zeros(rows, columns // 16).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_2"] = torch.ones(())
    assert "is a file quantized by NVFP4, not" in refused(inspect_flux_dit, saved(tensors))


def test_text_encoders_of_other_models_are_named(models: Path, saved) -> None:
    t5 = load_file(models / demo_models.T5_FILE)
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    umt5 = saved(t5 | {bias.format(1): t5[bias.format(0)].clone()})
    assert "is a UMT5 text encoder, as Wan's, not a T5" in refused(inspect_t5, umt5)
    old = {name.replace("wi_0", "wi"): t for name, t in t5.items() if "wi_1" not in name}
    assert "is a T5 text encoder of the first version" in refused(inspect_t5, saved(old))
    qwen = saved({"model.layers.0.post_attention_layernorm.weight": torch.zeros(2)})
    for inspect in (inspect_t5, inspect_clip):
        message = refused(inspect, qwen)
        assert "is a language model" in message
        assert "t5xxl_fp16.safetensors" in message


@pytest.mark.parametrize("dtype", ["F8_E8M0", "U16", "F4", "I4", "TOMORROW"])
def test_a_needed_tensor_of_an_unknown_dtype_is_named(plain, saved, dtype: str) -> None:
    path = saved(plain)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header[MATRIX]["dtype"] = dtype
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    assert f"stores {MATRIX} as {dtype}, a quantisation" in refused(inspect_flux_dit, path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "is a GGUF file"),
        (pickle.dumps({"weight": [1.0] * 100}), "is a Python pickle, which can run code"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"", "is empty. Download it again."),
        (b"\x00" * 100, "begins with zeros alone, as a download that was broken off"),
        (
            b'{"error":"Invalid username"}',
            'is a text, not the model: “{"error":"Invalid username"}”',
        ),
        (b"\n  Access is restricted.\nLog in." + bytes(9), "is not a safetensors file"),
        (b"\n  Access is restricted.\nLog in.", "not the model: “Access is restricted.”"),
        ("文件不存在。".encode() * 40, "not the model: “文件不存在。"),
        (b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(64), "is an archive; unpack it"),
        (b"\x1f\x8b\x08\x00" + bytes(64), "is an archive; unpack it"),
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


@pytest.mark.parametrize("missing", [1, 10_000])
def test_a_truncated_file_tells_how_much_is_missing(models, tmp_path, missing: int) -> None:
    whole = (models / demo_models.DIT_FILE).read_bytes()
    path = tmp_path / "majicflus_v134.safetensors"
    path.write_bytes(whole[:-missing])
    message = refused(inspect_flux_dit, path)
    assert f"is cut off: {missing:,} of its {len(whole):,} bytes are missing." in message


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [4, 12])}, "tensors overlap"),
        ({"a": ("F32", [3], [0, 8])}, "shape and length disagree"),
        ({"a": ("F32", [-2], [0, 8])}, "whole numbers"),
        ({"a": ("F32", [2], [0, 2**60])}, "shape and length disagree"),
        ({"a": ("F32", [2**58], [0, 2**60])}, "is cut off"),
        ({"a": (["F32"], [2], [0, 8])}, "dtype must be a short text"),
        ({"a": ("F" * 500, [2], [0, 8])}, "dtype must be a short text"),
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


BAD = [float("nan"), float("inf"), float("-inf"), 3e38, -3e38]
MATRIX, BIAS = "single_blocks.1.linear1.weight", "double_blocks.0.img_mlp.0.bias"
NORM = "single_blocks.2.norm.key_norm.scale"


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", [MATRIX, BIAS, NORM])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_damaged_weight_is_named(plain, saved, bad: float, name: str, precision: str) -> None:
    weight = plain[name].clone()
    weight.view(-1)[-3] = bad
    path = saved(plain | {name: weight})
    inspect_flux_dit(path)  # a header cannot tell
    said = f"model.safetensors, tensor {re.escape(name)}: it holds a NaN, an inf"
    if abs(bad) == 3e38 and "unscaled" in precision and name == MATRIX:
        said = "too large for float8|" + said
    with pytest.raises(ModelFileError, match=said):
        load_flux_dit(path, PRECISIONS[precision])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.float8_e4m3fn,
                                   torch.float8_e5m2])  # fmt: skip
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_nan_is_found_in_every_format(plain, saved, dtype: torch.dtype, precision: str) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in plain.items()}
    weight = tensors[MATRIX].float()
    weight[3, 4] = float("nan")
    path = saved(tensors | {MATRIX: weight.to(dtype)})
    with pytest.raises(ModelFileError, match=rf"{re.escape(MATRIX)}: it holds a NaN"):
        load_flux_dit(path, PRECISIONS[precision])
    inspect = inspect_flux_dit(path)
    with pytest.raises(ModelFileError, match=rf"{re.escape(MATRIX)}: it holds a NaN"):
        measure(*inspect, rows=10**6)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_damaged_scale_of_float8_is_named(plain, saved, bad, per_row, precision: str) -> None:
    tensors = scaled(plain, "new", per_row)
    scale = tensors[f"{MATRIX}_scale"].clone()
    scale.view(-1)[-1] = bad
    path = saved(tensors | {f"{MATRIX}_scale": scale})
    with pytest.raises(ModelFileError, match=rf"tensor {re.escape(MATRIX)}_scale: it holds a NaN"):
        load_flux_dit(path, PRECISIONS[precision])


def test_a_damaged_scale_of_int8_is_named(plain, saved) -> None:
    pytest.importorskip("comfy_kitchen")
    tensors = int8_tensorwise(plain, 64)
    tensors[f"{MATRIX}_scale"][5] = float("nan")
    with pytest.raises(ModelFileError, match=rf"tensor {re.escape(MATRIX)}_scale: it holds a NaN"):
        load_flux_dit(saved(tensors), PRECISIONS["int8 rotated"])


def test_a_scale_that_makes_a_value_too_large_is_found(plain, saved) -> None:
    tensors = scaled(plain, "new", per_row=False)
    tensors[f"{MATRIX}_scale"].fill_(1e16)
    with pytest.raises(ModelFileError, match=rf"tensor {re.escape(MATRIX)}: it holds a NaN"):
        load_flux_dit(saved(tensors), PRECISIONS["float8_e4m3fn"])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["text_model.embeddings.token_embedding.weight",
                                  "encoder.block.1.layer.0.layer_norm.weight",
                                  "decoder.mid.attn_1.q.weight"])  # fmt: skip
def test_a_damaged_encoder_or_vae_is_named(models: Path, saved, bad: float, name: str) -> None:
    files = (demo_models.CLIP_FILE, demo_models.T5_FILE, demo_models.VAE_FILE)
    clip, t5, vae = (models / file for file in files)
    for path in (clip, t5, vae):
        tensors = load_file(path)
        if name in tensors:
            tensors[name].view(-1)[0] = bad
            clip, t5, vae = (saved(tensors) if p == path else p for p in (clip, t5, vae))

    def load() -> None:
        load_text_encoders(clip, t5, torch.bfloat16)
        load_vae(vae, torch.bfloat16)

    with pytest.raises(ModelFileError, match=rf"tensor {re.escape(name)}: it holds a NaN"):
        load()


def test_large_values_that_models_have_are_kept(plain, saved) -> None:
    weight = plain[MATRIX].clone()
    weight[0, 0] = 1e6
    load_flux_dit(saved(plain | {MATRIX: weight}), PRECISIONS["bfloat16"])


def test_a_vae_as_text_encoder_and_the_other_way_round(models: Path) -> None:
    vae, clip, t5 = (
        models / name for name in (demo_models.VAE_FILE, demo_models.CLIP_FILE, demo_models.T5_FILE)
    )
    assert "is a VAE, not a T5 text encoder. Choose it in the Flux VAE" in refused(inspect_t5, vae)
    assert "is a T5 text encoder, not a CLIP text encoder" in refused(inspect_clip, t5)
    assert "is a CLIP text encoder, not a VAE" in refused(inspect_vae, clip)
    assert "is a VAE, not a Flux.1 transformer" in refused(inspect_flux_dit, vae)


@pytest.mark.parametrize("shape", [(), (4,), (512, 4), (512, 16, 3, 3, 1, 2)])
def test_a_vae_whose_first_tensor_is_of_no_shape(models: Path, saved, shape) -> None:
    tensors = load_file(models / demo_models.VAE_FILE)
    tensors["decoder.conv_in.weight"] = torch.zeros(shape)
    assert "decoder.conv_in.weight has the shape" in refused(inspect_vae, saved(tensors))


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
