"""Two loaders of one file hold one set of weights, as long as somebody holds it."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from majicflux.host import standalone
from majicflux.nodes.dit_loader import DiTLoader
from majicflux.nodes.text_encoders import TextEncodersNode
from majicflux.nodes.vae_loader import VAELoader

LOADERS = [
    lambda: DiTLoader.execute("majicflus_v134.safetensors", "float8_e4m3fn", False).args[0],
    lambda: TextEncodersNode.execute(
        "clip_l.safetensors", "t5xxl_fp16.safetensors", "bfloat16"
    ).args[0],
    lambda: VAELoader.execute("ae.safetensors").args[0],
]


@pytest.fixture(autouse=True)
def models_folder(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standalone, "models_folder", models)


@pytest.mark.parametrize("load", LOADERS, ids=["DiT", "text encoders", "VAE"])
def test_the_second_loader_takes_what_the_first_has(load) -> None:
    first = load()
    assert load() is first


def test_a_prompt_that_one_node_had_encoded_is_known_to_another() -> None:
    first, other = LOADERS[1](), LOADERS[1]()
    with torch.inference_mode():
        embedding, _ = first.encode("a (cat:1.2)")
    assert other.recall("a (cat:1.2)") is embedding


@pytest.mark.parametrize("load", LOADERS, ids=["DiT", "text encoders", "VAE"])
def test_dropping_the_last_user_frees_the_weights(load) -> None:
    handle = load()
    alive = weakref.ref(handle.weights)
    gc.disable()
    try:
        del handle
        assert alive() is None
    finally:
        gc.enable()


def test_another_precision_or_file_is_another_set(models: Path) -> None:
    one = LOADERS[0]()
    other = DiTLoader.execute("majicflus_v134.safetensors", "bfloat16", False).args[0]
    assert other is not one
    vae = LOADERS[2]()
    path = models / "vae" / "ae.safetensors"
    path.touch()
    assert LOADERS[2]() is not vae


def test_a_shipped_choice_is_kept_prepared_by_default(models: Path) -> None:
    handle = DiTLoader.execute("majicflus_v134.safetensors", "float8_e4m3fn").args[0]
    assert "mapped from prepared weights" in handle.weights.report
    assert list((models / "majicflux_prepared").glob("majicflus_v134-*.majicflux"))
