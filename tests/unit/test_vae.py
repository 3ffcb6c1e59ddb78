"""The autoencoder as a component: any limit gives the same picture, and pictures go back."""

from types import SimpleNamespace

import pytest
import torch

from majicflux.engine.flux import vae as vae_module
from majicflux.engine.flux import vae_bands
from majicflux.engine.flux.vae_band_plan import BandPlan, plan_decode, plan_encode
from majicflux.engine.offload.chunking import Chunking

ACCELERATOR = torch.device("cpu", 0)  # another device than `cpu` to PyTorch's comparisons


@pytest.fixture
def vae(make_pipeline):
    return make_pipeline(dtype=torch.float32, device=ACCELERATOR).vae


@torch.inference_mode()
def test_bands_give_the_plain_picture(vae) -> None:
    latents = torch.randn(2, 16, 12, 20, generator=torch.Generator().manual_seed(0))
    whole, moved = vae.decode(latents)
    assert whole.shape == (2, 96, 160, 3)
    assert moved == vae.weights.blocks[0].nbytes + vae.weights.root.nbytes
    assert (vae.decode(latents, bands=plan_decode(12, 20, 4, 0))[0] - whole).abs().max() <= 1e-5


@torch.inference_mode()
def test_pictures_are_encoded_as_diffsynth_does(vae) -> None:
    pictures = torch.rand(2, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    theirs = vae.weights.module["encoder"](pictures.movedim(-1, 1) * 2 - 1)
    found, moved = vae.encode(pictures)
    assert found.shape == (2, 16, 8, 12)
    assert moved == vae.weights.once[0].nbytes + vae.weights.root.nbytes
    assert (found - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    banded, _ = vae.encode(pictures, bands=plan_encode(64, 96, 4, 0))
    assert (banded - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@torch.inference_mode()
def test_the_same_bands_again_when_others_have_left_the_card(vae, monkeypatch) -> None:
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    bands, used, freed = plan_decode(8, 8, 4, 1e6), [], []

    def decode(decoder: object, latent: torch.Tensor, bands: BandPlan, *way: object):
        used.append(bands)
        if len(used) == 1:
            raise torch.OutOfMemoryError("simulated")
        return vae_bands.decode(decoder, latent, bands, *way)

    def relieve() -> bool:
        freed.append(True)
        return len(freed) == 1

    expected, _ = vae.decode(latents, bands=bands)
    monkeypatch.setattr(vae_module, "vae_bands", SimpleNamespace(decode=decode))
    found, _ = vae.decode(latents, bands=bands, chunking=Chunking(relieve=relieve))
    assert used == [bands] * 3
    assert torch.equal(found, expected)


@torch.inference_mode()
def test_short_of_memory_the_smallest_bands_are_taken(vae, monkeypatch) -> None:
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, _ = vae.decode(latents)
    calls: list[int] = []

    def forward(*_: object) -> torch.Tensor:
        calls.append(1)
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(vae.weights.module["decoder"], "forward", forward)
    found, _ = vae.decode(latents)
    assert calls == [1]  # the second picture does not try again
    assert (found - expected).abs().max() <= 1e-5
