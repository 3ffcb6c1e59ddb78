"""Our expectations of the real files, against the hashes by which DiffSynth knows them."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from control_nets import published_layout

from file_layouts import sparse_file
from majicflux.engine.flux.geometry import (
    ClipGeometry,
    ControlGeometry,
    FluxGeometry,
    T5Geometry,
)
from majicflux.engine.quant.formats import INT8_ROTATED, PRECISIONS
from majicflux.loaders.controlnet import inspect_control_net
from majicflux.loaders.flux_dit import inspect_flux_dit
from majicflux.loaders.layouts import Layout, clip_layout, flux_dit_layout, t5_layout, vae_layout
from majicflux.loaders.text_encoders import inspect_clip, inspect_t5
from majicflux.loaders.vae import inspect_vae

FLUX_DEV = flux_dit_layout(FluxGeometry())
FLUX_FILL = flux_dit_layout(FluxGeometry(in_channels=384))
FLUX_DEPTH = FLUX_DEV | {"img_in.weight": (3072, 128)}  # and canny
UNION = ControlGeometry(single_blocks=10, modes=10)
INPAINTING = ControlGeometry(double_blocks=6, hint_channels=68)
MAJICFLUS = {f"model.diffusion_model.{name}": shape for name, shape in FLUX_DEV.items()}


def key_hash(layout: Layout) -> str:
    """DiffSynth's `hash_model_file`: md5 of each name, and name:dim_dim, sorted and joined."""
    keys = [k for n, s in layout.items() for k in (n, f"{n}:{'_'.join(map(str, s))}")]
    return hashlib.md5(",".join(sorted(keys)).encode()).hexdigest()


@pytest.mark.parametrize(
    ("layout", "expected", "tensors"),
    [
        (MAJICFLUS, "3394f306c4cbf04334b712bf5aaed95f", 780),
        (FLUX_DEV, "a29710fea6dddb0314663ee823598e50", 780),
        (FLUX_FILL, "f876d2a6fb247fb7da0f84fc7fb8a823", 780),
        (clip_layout(ClipGeometry()), "94eefa3dac9cec93cb1ebaf1747d7b78", 196),
        (t5_layout(T5Geometry()), "22540b49eaedbc2f2784b2091a234c7c", 219),
        (vae_layout(), "21ea55f476dfc4fd135587abb59dfe5d", 244),
        (published_layout(UNION), "78d18b9101345ff695f312e7e62538c0", 349),
        (published_layout(INPAINTING), "52357cb26250681367488a8954c271e8", 222),
        (published_layout(ControlGeometry()), "b001c89139b5f053c715fe772362dd2a", 188),
    ],
    ids=[
        *("majicflus_v134", "flux1-dev", "flux1-fill-dev", "clip_l", "t5xxl", "ae"),
        *("Controlnet-Union-alpha", "Controlnet-Inpainting-Beta", "Controlnet-Upscaler"),
    ],
)
def test_layouts_are_those_of_the_real_files(layout, expected, tensors) -> None:
    from diffsynth.configs.model_configs import MODEL_CONFIGS

    assert len(layout) == tensors
    assert key_hash(layout) == expected
    assert expected in {config["model_hash"] for config in MODEL_CONFIGS}


@pytest.mark.parametrize("layout", [MAJICFLUS, FLUX_DEV], ids=["majicflus", "flux1-dev"])
def test_a_full_size_transformer_is_recognised_from_its_header(tmp_path, layout) -> None:
    path = sparse_file(tmp_path / "dit.safetensors", layout)
    assert path.stat().st_size > 23.8e9
    geometry, sources = inspect_flux_dit(path)
    assert geometry == FluxGeometry()
    assert len(sources) == 780


@pytest.mark.parametrize(
    ("layout", "channels"), [(FLUX_FILL, 384), (FLUX_DEPTH, 128)], ids=["fill", "depth and canny"]
)
def test_full_size_models_that_take_a_picture_are_recognised(tmp_path, layout, channels) -> None:
    geometry, _ = inspect_flux_dit(sparse_file(tmp_path / "dit.safetensors", layout))
    assert geometry == FluxGeometry(in_channels=channels)
    assert (geometry.takes_picture, geometry.takes_mask) == (True, channels == 384)


@pytest.mark.parametrize("in_file", [UNION, INPAINTING, ControlGeometry(double_blocks=6)])
def test_full_size_control_nets_are_recognised_by_what_is_used(tmp_path, in_file) -> None:
    geometry, _ = inspect_control_net(sparse_file(tmp_path / "net", published_layout(in_file)))
    assert geometry == replace(in_file, double_blocks=5)


def test_full_size_encoders_and_vae_are_recognised(tmp_path: Path) -> None:
    clip = sparse_file(tmp_path / "clip_l.safetensors", clip_layout(ClipGeometry()))
    assert inspect_clip(clip)[0] == ClipGeometry()
    vae = sparse_file(tmp_path / "ae.safetensors", vae_layout(), "F32", 4)
    assert len(inspect_vae(vae)) == 244
    single = t5_layout(T5Geometry()) | {"encoder.embed_tokens.weight": (32128, 4096)}
    assert inspect_t5(sparse_file(tmp_path / "t5.safetensors", single))[0] == T5Geometry()


def test_a_full_size_t5_in_two_shards_is_recognised(tmp_path: Path) -> None:
    folder = tmp_path / "text_encoder_2"
    folder.mkdir()
    names = list(t5_layout(T5Geometry()).items())
    for index, part in enumerate((names[:100], names[100:]), start=1):
        sparse_file(folder / f"model-{index:05d}-of-00002.safetensors", dict(part))
    assert inspect_t5(folder)[0] == T5Geometry()
    assert inspect_t5(folder / "model-00002-of-00002.safetensors")[0] == T5Geometry()


def test_full_size_modules_hold_exactly_the_parameters_of_the_files() -> None:
    """DiffSynth's modules at full size, on the meta device until they are given memory."""
    from majicflux.engine.flux.text_encoders import build_text_encoders
    from majicflux.engine.flux.transformer import build_flux_dit

    dit = build_flux_dit(FluxGeometry(), PRECISIONS["float8_e4m3fn"])
    encoders = build_text_encoders(ClipGeometry(), T5Geometry(), torch.bfloat16)
    scales = sum(p.numel() for n, p in dit.module.named_parameters() if n.endswith(".scale"))
    assert sum(p.numel() for p in dit.module.parameters()) - scales == 11_901_408_320
    assert 15.2e9 < dit.total_bytes < 15.3e9  # 8.6 billion in 8 bits, 3.3 in 16
    eight_bit = PRECISIONS["int8 rotated"].with_kinds(modulation=INT8_ROTATED)
    smaller = build_flux_dit(FluxGeometry(), eight_bit)
    assert 11.9e9 < smaller.total_bytes < 12.1e9
    expected = sum(map(math.prod, clip_layout(ClipGeometry()).values()))
    expected += sum(map(math.prod, t5_layout(T5Geometry()).values()))
    assert sum(p.numel() for p in encoders.module.parameters()) == expected
