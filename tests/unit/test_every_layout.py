"""Every layout that people have their files in, through the loaders, against the plain one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from file_layouts import (
    FLOAT8,
    Tensors,
    clip_to_openai,
    clip_without_prefix,
    declared_in_header,
    dequantized,
    int8_tensorwise,
    longer_clip,
    marked,
    scaled,
    to_diffusers,
    vae_to_diffusers,
)
from majicflux.benchmarks import random_models
from majicflux.engine.kernels.hadamard import rotate
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.loaders import demo_models
from majicflux.loaders.flux_dit import inspect_flux_dit, load_flux_dit
from majicflux.loaders.safetensors_file import ModelFileError
from majicflux.loaders.text_encoders import inspect_clip, load_text_encoders
from majicflux.loaders.vae import load_vae

PREFIX = "model.diffusion_model."


def parameters(weights) -> Tensors:
    return {name: p.detach() for name, p in weights.module.named_parameters()}


def bits(tensors: Tensors) -> dict[str, bytes]:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def loaded(path: Path, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    precision = PRECISIONS[str(dtype).removeprefix("torch.")]
    return parameters(load_flux_dit(path, precision)[0])


@pytest.mark.parametrize("prefix", ["", PREFIX, "diffusion_model.", "net."])
def test_any_prefix(plain: Tensors, saved, prefix: str) -> None:
    path = saved({prefix + name: tensor for name, tensor in plain.items()})
    assert bits(loaded(path)) == bits(loaded(saved(plain, "plain.safetensors")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8])
def test_diffusers_names_in_one_file(plain: Tensors, saved, dtype: torch.dtype) -> None:
    path = saved(to_diffusers(plain))
    expected = loaded(saved(plain, "plain.safetensors"), dtype)
    assert bits(loaded(path, dtype)) == bits(expected)


def test_our_reading_of_diffusers_names_is_diffsynths(plain: Tensors, saved) -> None:
    from diffsynth.utils.state_dict_converters.flux_dit import (
        FluxDiTStateDictConverterFromDiffusers,
    )

    tensors = to_diffusers(plain)
    # DiffSynth's converter swaps the halves of a 3072-wide model only; at this width by hand.
    for kind in ("weight", "bias"):
        scale, shift = tensors[f"norm_out.linear.{kind}"].chunk(2)
        halves = torch.cat([shift, scale])
        tensors[f"norm_out.linear.{kind}"] = halves
    expected = FluxDiTStateDictConverterFromDiffusers(tensors)
    assert bits(loaded(saved(to_diffusers(plain)))) == bits(expected)


def test_diffusers_shards_in_a_folder(plain: Tensors, saved) -> None:
    tensors = list(to_diffusers(plain).items())
    cuts = [0, 40, 90, len(tensors)]
    name = "transformer/diffusion_pytorch_model-{:05d}-of-00003.safetensors"
    parts = [
        saved(dict(tensors[cuts[index] : cuts[index + 1]]), name.format(index + 1))
        for index in range(3)
    ]
    last = parts[-1]
    (last.parent / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({}))
    expected = bits(loaded(saved(plain, "plain.safetensors")))
    assert bits(loaded(last.parent)) == expected
    assert bits(loaded(last)) == expected
    last.unlink()
    with pytest.raises(ModelFileError, match=r"lacks .*-00003-of-00003\.safetensors"):
        inspect_flux_dit(last.parent)


@pytest.mark.parametrize("precision", ["int8 rotated", "float8_e4m3fn"])
@pytest.mark.parametrize(("group", "per_row"), [(256, True), (64, True), (0, True), (0, False)])
def test_comfyuis_int8_is_used_as_it_is(plain, saved, group, per_row, precision: str) -> None:
    pytest.importorskip("comfy_kitchen")
    tensors = int8_tensorwise(plain, group, per_row)
    weights, _ = load_flux_dit(saved(tensors), PRECISIONS[precision])
    for theirs, ours in (
        ("double_blocks.1.img_mlp.0", weights.module.blocks[1].ff_a[0]),
        ("double_blocks.0.img_mod.lin", weights.module.blocks[0].norm1_a.linear),
        ("single_blocks.1.linear1", weights.module.single_blocks[1].to_qkv_mlp),
    ):
        assert torch.equal(ours.weight, tensors[f"{theirs}.weight"])
        scale = tensors[f"{theirs}.weight_scale"].reshape(-1)
        assert torch.equal(ours.scale, scale.expand(len(ours.weight)))
        assert ours.group == group
    # In bfloat16 they are the values that the file stands for.
    plain_layer = load_flux_dit(saved(tensors), PRECISIONS["bfloat16"])[0].module.blocks[1].ff_a[0]
    before = plain["double_blocks.1.img_mlp.0.weight"].float()
    difference = (plain_layer.weight.float() - before).norm() / before.norm()
    assert 0 < difference < 0.02


@pytest.mark.parametrize("named", ["as in the file", "without the prefix"])
@pytest.mark.parametrize("group", [64, 0])
def test_int8_that_the_header_declares(plain, tmp_path: Path, saved, group: int, named) -> None:
    pytest.importorskip("comfy_kitchen")
    marked_beside = int8_tensorwise(plain, group)
    tensors, metadata = declared_in_header(marked_beside)
    path = tmp_path / "header.safetensors"
    if named == "as in the file":
        tensors, metadata = declared_in_header({PREFIX + n: t for n, t in marked_beside.items()})
    else:
        tensors = {PREFIX + n: t for n, t in tensors.items()}
    save_file(tensors, path, metadata)
    for dtype in (FLOAT8, torch.bfloat16):
        assert bits(loaded(path, dtype)) == bits(loaded(saved(marked_beside), dtype))


@pytest.mark.parametrize("as_bytes", [False, True])
def test_float8_that_the_header_declares(plain, tmp_path: Path, saved, as_bytes: bool) -> None:
    marked_beside = scaled(plain, "new", per_row=True)
    tensors, metadata = declared_in_header(marked_beside)
    if as_bytes:  # as the format allows
        tensors = {n: t.view(torch.uint8) if t.dtype == FLOAT8 else t for n, t in tensors.items()}
    path = tmp_path / "header.safetensors"
    save_file(tensors, path, metadata)
    assert bits(loaded(path, FLOAT8)) == bits(loaded(saved(marked_beside), FLOAT8))


@pytest.mark.parametrize("declared", ["nvfp4", "mxfp8", "convrot_w4a4", "tomorrow's"])
def test_other_formats_that_the_header_declares_are_named(plain, tmp_path, declared: str) -> None:
    tensors = scaled(plain, "new", per_row=True)
    tensors["single_blocks.1.linear1.comfy_quant"] = marked({"format": declared})
    path = tmp_path / "header.safetensors"
    tensors, metadata = declared_in_header(tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(ModelFileError, match=f"linear1.*{declared}.*cannot read"):
        inspect_flux_dit(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"layers": 5}', '{"layers": {"single_blocks.1.linear1": 5}}',
             "[" * 10**5, '{"layers": ' + "9" * 5000]
)  # fmt: skip
def test_a_header_that_declares_nonsense_harms_no_file_that_needs_none(
    plain, tmp_path, saved, text: str
) -> None:
    path = tmp_path / "header.safetensors"
    save_file(plain, path, {"_quantization_metadata": text})
    if "linear1" in text:
        with pytest.raises(ModelFileError, match=r"damaged comfy_quant marker .*linear1"):
            inspect_flux_dit(path)
    else:
        assert bits(loaded(path)) == bits(loaded(saved(plain)))


LEFT_OVER = {
    "double_blocks.0.img_attn.qkv.lora_A.weight": torch.zeros(4, 4),
    "double_blocks.18.img_attn.qkv.lora_A.weight": torch.zeros(4, 4),
    "single_blocks.37.linear1.diff_b": torch.zeros(4),
    "text_model.encoder.layers.11.mlp.fc1.lora_up.weight": torch.zeros(4, 4),
    "encoder.block.23.layer.0.SelfAttention.q.lora_up.weight": torch.zeros(4, 4),
    "lora_unet_double_blocks_0.lora_down.weight": torch.zeros(4, 4),
    "controlnet_blocks.0.weight": torch.zeros(4, 4),
    "conditioner.embedders.0.weight": torch.zeros(4, 4),
    "optimizer.step": torch.zeros(1, dtype=torch.uint16),
    "ema.scale": torch.zeros(2, dtype=torch.float8_e8m0fnu),
    "rope.freqs": torch.zeros(2, dtype=torch.complex64),
    "other.weight.absmax": torch.zeros(2),
    "other.comfy_quant": torch.zeros(3, dtype=torch.uint8),
    "other.weight": torch.full((2, 2), float("nan")),
}


@pytest.mark.parametrize("name", LEFT_OVER)
def test_what_is_not_needed_refuses_no_file(plain, models: Path, saved, name: str) -> None:
    extra = {name: LEFT_OVER[name]}
    assert bits(loaded(saved(plain | extra))) == bits(loaded(saved(plain, "plain.safetensors")))
    paths = [models / part for part in (demo_models.CLIP_FILE, demo_models.T5_FILE)]
    with_extra = [saved(load_file(path) | extra, path.name) for path in paths]
    expected = bits(parameters(load_text_encoders(*paths, torch.bfloat16)))
    assert bits(parameters(load_text_encoders(*with_extra, torch.bfloat16))) == expected


def test_a_norm_whose_scale_is_called_its_weight(plain: Tensors, saved) -> None:
    renamed = {name.replace("_norm.scale", "_norm.weight"): t for name, t in plain.items()}
    assert renamed.keys() != plain.keys()
    assert bits(loaded(saved(renamed))) == bits(loaded(saved(plain, "plain.safetensors")))


CLIP_NAMES = {
    "Transformers since 5.6": clip_without_prefix,
    "OpenAI's": clip_to_openai,
    "OpenAI's in float8": lambda t: {n: x.to(FLOAT8) for n, x in clip_to_openai(t).items()},
    "both parts of a CLIP": lambda t: {"vision_model.encoder.layers.0.mlp.fc1.weight":
        torch.ones(2)} | t,
}  # fmt: skip


@pytest.mark.parametrize("written", CLIP_NAMES)
@pytest.mark.parametrize("prefix", ["", "clip.transformer."])
def test_a_clip_in_other_names(models: Path, saved, written: str, prefix: str) -> None:
    t5, tensors = models / demo_models.T5_FILE, load_file(models / demo_models.CLIP_FILE)
    if "float8" in written:
        tensors = {name: tensor.to(FLOAT8) for name, tensor in tensors.items()}
    plain = load_text_encoders(saved(tensors, "plain.safetensors"), t5, torch.bfloat16)
    renamed = {prefix + name: t for name, t in CLIP_NAMES[written](tensors).items()}
    found = load_text_encoders(saved(renamed), t5, torch.bfloat16)
    assert bits(parameters(found)) == bits(parameters(plain))


def test_a_clip_as_transformers_saves_it(models: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    g = random_models.CLIP
    config = CLIPTextConfig(
        vocab_size=g.vocabulary, hidden_size=g.width, intermediate_size=g.mlp_width,
        num_hidden_layers=g.layers, num_attention_heads=2,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(tmp_path)
    assert inspect_clip(tmp_path / "model.safetensors")[0] == g


def test_a_long_clip_reads_248_tokens(models: Path, saved, make_pipeline) -> None:
    clip = saved(longer_clip(load_file(models / demo_models.CLIP_FILE)))
    encoders = make_pipeline().text_encoders
    weights = load_text_encoders(clip, models / demo_models.T5_FILE, torch.bfloat16)
    longer = replace(encoders, weights=weights, patcher=type(encoders.patcher)(weights))
    words = "a cat " * 100
    assert encoders.count(words).clip_read == 75
    assert longer.count(words).clip_read == min(246, longer.count(words).clip) > 75
    other_end = "a cat " * 40 + "a dog"
    for of, same in ((encoders, True), (longer, False)):
        one, other = (of.encode(text)[0].pooled for text in ("a cat " * 40, other_end))
        assert torch.equal(one, other) == same


def test_a_t5_whose_token_table_has_its_other_name_alone(models: Path, saved) -> None:
    clip, t5 = models / demo_models.CLIP_FILE, models / demo_models.T5_FILE
    tensors = load_file(t5)
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    found = load_text_encoders(clip, saved(tensors), torch.bfloat16)
    plain = load_text_encoders(clip, t5, torch.bfloat16)
    assert bits(parameters(found)) == bits(parameters(plain))


@pytest.mark.parametrize(
    "marker",
    [{"format": "asym_w4a8_int8"}, {"format": "int8_tensorwise", "convrot": True,
                                    "convrot_groupsize": 96}],
)  # fmt: skip
def test_other_formats_in_int8_are_refused(plain, saved, marker: dict) -> None:
    pytest.importorskip("comfy_kitchen")
    tensors = int8_tensorwise(plain, 256)
    tensors["single_blocks.1.linear1.comfy_quant"] = marked(marker)
    with pytest.raises(ModelFileError, match=r"linear1.*a quantisation that MajicFlux cannot read"):
        inspect_flux_dit(saved(tensors))
    tensors["single_blocks.1.linear1.comfy_quant"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(ModelFileError, match=r"damaged comfy_quant marker beside single_blocks\.1"):
        inspect_flux_dit(saved(tensors))


def test_float8_files_keep_every_weight_unless_int8_is_wanted(plain, saved) -> None:
    path = saved({n: t.to(FLOAT8) for n, t in plain.items()})
    block = load_flux_dit(path, PRECISIONS["float8_e4m3fn"])[0].module.blocks[0]
    for layer in (block.ff_a[0], block.norm1_a.linear, block.attn.a_to_qkv):
        assert layer.weight.dtype == FLOAT8
        assert (layer.scale == 1).all()
    block = load_flux_dit(path, PRECISIONS["int8 rotated"])[0].module.blocks[0]
    assert (block.ff_a[0].weight.dtype, block.ff_a[0].group) == (torch.int8, 256)
    exact = plain["double_blocks.0.img_mlp.0.weight"].to(FLOAT8).double()
    stored = rotate(block.ff_a[0].weight.double() * block.ff_a[0].scale.double()[:, None], 256)
    assert (stored - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("style", ["old", "new"])
@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_float8_keeps_its_values_and_scales(plain, saved, style, per_row) -> None:
    tensors = scaled(plain, style, per_row)
    path = saved(tensors)
    assert bits(loaded(path)) == bits(loaded(saved(dequantized(tensors), "bf16.safetensors")))
    stored = loaded(path, FLOAT8)
    name = "single_blocks.1.linear1.weight"
    ours = "single_blocks.1.to_qkv_mlp"
    assert torch.equal(stored[f"{ours}.weight"].view(torch.uint8), tensors[name].view(torch.uint8))
    scale = tensors[name + "_scale" if style == "new" else name[:-6] + "scale_weight"]
    assert torch.equal(stored[f"{ours}.scale"], scale.expand(len(stored[f"{ours}.scale"])))


def test_scaled_float8_in_diffusers_names_stacks_its_scales(plain, saved) -> None:
    tensors = scaled(to_diffusers(plain), "new", per_row=False)
    expected = dequantized(tensors)
    path = saved(tensors)
    assert bits(loaded(path)) == bits(loaded(saved(expected, "bf16.safetensors")))
    stored = loaded(path, FLOAT8)
    scales = stored["blocks.0.attn.a_to_qkv.scale"].view(3, -1)
    for row, part in zip(scales, ("to_q", "to_k", "to_v"), strict=True):
        assert (row == tensors[f"transformer_blocks.0.attn.{part}.weight_scale"]).all()


def test_float8_e5m2_is_not_rounded_again(plain: Tensors, saved) -> None:
    tensors = {name: t.to(torch.float8_e5m2) for name, t in plain.items()}
    path = saved(tensors)
    exact, stored = loaded(path), loaded(path, FLOAT8)
    for name, weight in exact.items():
        if stored[name].dtype == FLOAT8:
            scale = stored[name.removesuffix("weight") + "scale"]
            back = stored[name].float() * scale[:, None]
            # What is 2^17 below the largest of its row is below e4m3's smallest step.
            visible = weight.float().abs() >= back.abs().amax(dim=1, keepdim=True) * 2**-15
            assert torch.equal(back[visible], weight.float()[visible])


def test_a_whole_checkpoint_gives_each_loader_its_part(models: Path, saved) -> None:
    clip, t5, vae = (
        load_file(models / name)
        for name in (demo_models.CLIP_FILE, demo_models.T5_FILE, demo_models.VAE_FILE)
    )
    whole = load_file(models / demo_models.DIT_FILE)
    whole |= {f"text_encoders.clip_l.transformer.{n}": t for n, t in clip.items()}
    whole |= {"text_encoders.clip_l.logit_scale": torch.ones(())}
    whole |= {f"text_encoders.t5xxl.transformer.{n}": t for n, t in t5.items()}
    whole |= {f"vae.{n}": t for n, t in vae.items()}
    path = saved(whole)
    assert bits(loaded(path)) == bits(loaded(models / demo_models.DIT_FILE))
    one = load_text_encoders(path, path, torch.bfloat16)
    other = load_text_encoders(
        models / demo_models.CLIP_FILE, models / demo_models.T5_FILE, torch.bfloat16
    )
    assert bits(parameters(one)) == bits(parameters(other))
    one, other = (load_vae(p, torch.bfloat16) for p in (path, models / demo_models.VAE_FILE))
    assert bits(parameters(one)) == bits(parameters(other))


def test_fewer_blocks_are_seen_in_the_names(plain: Tensors, saved) -> None:
    lite = {
        name: t
        for name, t in plain.items()
        if not name.startswith(("double_blocks.1.", "single_blocks.3."))
    }
    weights, geometry = load_flux_dit(saved(lite), PRECISIONS["bfloat16"])
    assert (geometry.double_blocks, geometry.single_blocks) == (1, 3)
    assert len(weights.module.blocks) == 1
    assert len(weights.module.single_blocks) == 3


WIDER = {
    "any prefix": lambda plain: {PREFIX + name: tensor for name, tensor in plain.items()},
    "Diffusers names": to_diffusers,
    "scaled float8, old": lambda plain: scaled(plain, "old", per_row=False),
    "scaled float8, new": lambda plain: scaled(plain, "new", per_row=True),
    "plain float8": lambda plain: {n: t.to(FLOAT8) for n, t in plain.items()},
}


def wider(plain: Tensors, channels: int) -> Tensors:
    weight = torch.randn(random_models.DIT.hidden, channels, generator=torch.manual_seed(1))
    return plain | {"img_in.weight": weight.bfloat16()}


@pytest.mark.parametrize("channels", [128, 384])
@pytest.mark.parametrize("layout", WIDER)
def test_fill_depth_and_canny_models_in_every_layout(plain, saved, layout, channels: int) -> None:
    tensors = wider(plain, channels)
    found = loaded(saved(WIDER[layout](tensors)))["x_embedder.weight"].float()
    expected = tensors["img_in.weight"].float()
    assert (found - expected).norm() / expected.norm() < (0.04 if "float8" in layout else 1e-9)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_fill_model_in_every_precision(plain, saved, tmp_path: Path, precision: str) -> None:
    path = saved(wider(plain, 384))
    weights, geometry = load_flux_dit(path, PRECISIONS[precision], cache_folder=tmp_path)
    assert geometry == replace(random_models.DIT, in_channels=384)
    again, _ = load_flux_dit(path, PRECISIONS[precision], cache_folder=tmp_path)
    assert bits(parameters(weights)) == bits(parameters(again)), "from the disk"


def test_a_transformer_of_other_channels_is_refused_by_the_pipeline(make_pipeline) -> None:
    pipeline = make_pipeline()
    dit = replace(pipeline.dit, geometry=replace(pipeline.dit.geometry, in_channels=256))
    with pytest.raises(ValueError, match="takes 256 channels, and those of"):
        replace(pipeline, dit=dit)


@pytest.mark.parametrize("encoder", ["CLIP-L", "T5"])
def test_encoders_of_another_width_are_refused_by_the_pipeline(make_pipeline, encoder) -> None:
    pipeline = make_pipeline()
    widths = {"CLIP-L": {"pooled_width": 1280}, "T5": {"text_width": 2048}}[encoder]
    geometry = replace(pipeline.dit.geometry, **widths)
    dit = replace(pipeline.dit, geometry=geometry)
    wanted = next(iter(widths.values()))
    with pytest.raises(ValueError, match=f"takes {wanted} values from {encoder}, and the"):
        replace(pipeline, dit=dit)
    replace(pipeline, dit=dit, text_encoders=None)


@pytest.mark.parametrize("style", ["old", "new"])
def test_a_scaled_float8_t5(models: Path, saved, style: str) -> None:
    clip = models / demo_models.CLIP_FILE
    tensors = scaled(load_file(models / demo_models.T5_FILE), style, per_row=False)
    found = load_text_encoders(clip, saved(tensors), torch.bfloat16)
    plain = load_text_encoders(
        clip, saved(dequantized(tensors), "bf16.safetensors"), torch.bfloat16
    )
    assert bits(parameters(found)) == bits(parameters(plain))


def test_a_t5_whose_int8_the_header_declares(models: Path, tmp_path: Path) -> None:
    """T5's matrices are named as those of blocks only for the function that quantizes them."""
    pytest.importorskip("comfy_kitchen")
    clip, plain = models / demo_models.CLIP_FILE, load_file(models / demo_models.T5_FILE)
    inner = {n: t for n, t in plain.items() if "DenseReluDense" in n}
    quantized = int8_tensorwise({f"blocks.{n}": t for n, t in inner.items()}, 64)
    tensors = plain | {n.removeprefix("blocks."): t for n, t in quantized.items()}
    path = tmp_path / "t5.safetensors"
    tensors, metadata = declared_in_header(tensors)
    save_file(tensors, path, metadata)
    found = parameters(load_text_encoders(clip, path, torch.float32))
    for name, tensor in inner.items():
        difference = (found[f"t5.{name}"] - tensor.float()).norm() / tensor.float().norm()
        assert 0 < difference < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float32])
def test_a_t5_in_other_precisions(models: Path, saved, dtype: torch.dtype) -> None:
    clip = models / demo_models.CLIP_FILE
    tensors = {n: t.to(dtype) for n, t in load_file(models / demo_models.T5_FILE).items()}
    found = parameters(load_text_encoders(clip, saved(tensors), torch.bfloat16))
    name = "t5.encoder.block.1.layer.1.DenseReluDense.wo.weight"
    expected = tensors[name.removeprefix("t5.")].to(torch.bfloat16)
    assert torch.equal(found[name], expected)


def test_a_vae_in_diffusers_names(models: Path, saved) -> None:
    from diffsynth.utils.state_dict_converters.flux_vae import (
        FluxVAEDecoderStateDictConverterDiffusers,
        FluxVAEEncoderStateDictConverterDiffusers,
    )

    plain = models / demo_models.VAE_FILE
    tensors = vae_to_diffusers(load_file(plain))
    found = parameters(load_vae(saved(tensors), torch.bfloat16))
    assert bits(found) == bits(parameters(load_vae(plain, torch.bfloat16)))
    for coder, convert in (
        ("encoder", FluxVAEEncoderStateDictConverterDiffusers),
        ("decoder", FluxVAEDecoderStateDictConverterDiffusers),
    ):
        theirs = convert(tensors)
        assert len(theirs) == len([n for n in found if n.startswith(coder)])
        for name, tensor in theirs.items():
            assert torch.equal(found[f"{coder}.{name}"].flatten(), tensor.flatten()), name
