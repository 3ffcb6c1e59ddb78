"""The little models in plain torch compute what the pack and DiffSynth compute from their files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffsynth.models.flux_vae import FluxVAEDecoder, FluxVAEEncoder
from diffsynth.utils.state_dict_converters.flux_vae import (
    FluxVAEDecoderStateDictConverter,
    FluxVAEEncoderStateDictConverter,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from majicflux.engine.flux.conditioning import conditions_of
from majicflux.engine.flux.text_encoders import TextEmbedding
from majicflux.engine.flux.velocity import flux_velocity
from majicflux.engine.quant.formats import FLOAT32, uniform
from majicflux.loaders.flux_dit import load_flux_dit
from majicflux.loaders.full_width_vae import widened
from majicflux.loaders.layouts import clip_layout, flux_dit_layout, t5_layout, vae_layout
from majicflux.loaders.text_encoders import load_text_encoders
from majicflux.tools.little_world.models import TOY, TRAINED, LittleFlux
from majicflux.tools.little_world.thin_vae import ThinVAE
from majicflux.tools.little_world.vocabulary import CLIP_LENGTH

CPU = torch.device("cpu")
SMALL = replace(
    TOY,
    clip=replace(TOY.clip, layers=2),
    t5=replace(TOY.t5, layers=2, heads=2),
    double_blocks=2,
    single_blocks=2,
)


@pytest.fixture(scope="module")
def flux() -> LittleFlux:
    """With values where a new model has zeros or ones."""
    torch.manual_seed(0)
    model = LittleFlux(SMALL)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("scale") or "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif not parameter.any():
                parameter.normal_(0, 0.05)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def vae() -> ThinVAE:
    torch.manual_seed(1)
    vae = ThinVAE()
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    vae.latent_norm.running_mean.normal_()
    vae.latent_norm.running_var.uniform_(0.5, 2)
    return vae.eval().requires_grad_(False)


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("geometry", [SMALL, TRAINED])
def test_tensors_are_those_of_the_files(geometry) -> None:
    model = LittleFlux(geometry)
    assert shapes(model.dit.state_dict()) == flux_dit_layout(geometry.dit)
    assert shapes(model.t5.state_dict()) == t5_layout(geometry.t5)
    assert shapes(model.clip.state_dict()) == clip_layout(geometry.clip)


def test_the_text_encoders_are_the_packs(flux: LittleFlux, tmp_path: Path) -> None:
    save_file(flux.clip.state_dict(), tmp_path / "clip.safetensors")
    save_file(flux.t5.state_dict(), tmp_path / "t5.safetensors")
    files = (tmp_path / "clip.safetensors", tmp_path / "t5.safetensors")
    theirs = load_text_encoders(*files, torch.float32).module
    t5_ids = torch.randint(SMALL.t5.vocabulary, (1, 200))  # some are farther apart than 128
    clip_ids = torch.randint(SMALL.clip.vocabulary - 1, (1, CLIP_LENGTH))
    clip_ids[:, 30:] = SMALL.clip.vocabulary - 1
    close(flux.t5(t5_ids), theirs["t5"](t5_ids), 1e-5)
    close(flux.clip(clip_ids), theirs["clip"](clip_ids)[0], 1e-5)


def test_the_transformer_is_the_packs(flux: LittleFlux, tmp_path: Path) -> None:
    path = tmp_path / "dit.safetensors"
    tensors = flux.dit.state_dict().items()
    save_file({f"model.diffusion_model.{name}": t.contiguous() for name, t in tensors}, path)
    theirs = load_flux_dit(path, uniform(FLOAT32))[0].module
    text, pooled = torch.randn(1, 9, SMALL.t5.width), torch.randn(1, SMALL.clip.width)
    latents, sigma, guidance = torch.randn(1, 16, 12, 8), torch.tensor([0.7]), 3.5
    given = (guidance, torch.float32, CPU, torch.float32, sigma)
    (conditions,) = conditions_of(theirs, [TextEmbedding(text, pooled)], *given)
    expected = flux_velocity(theirs, conditions)(latents, sigma[0])
    found = flux.dit(latents, sigma, text, pooled, torch.tensor([guidance]))
    close(found, expected, 1e-5)


def test_the_thin_vae_is_diffsynths_at_full_width(vae: ThinVAE) -> None:
    full = widened(vae.tensors())
    assert shapes(full) == vae_layout()
    encoder, decoder = FluxVAEEncoder(), FluxVAEDecoder()
    load(encoder, FluxVAEEncoderStateDictConverter(full))
    load(decoder, FluxVAEDecoderStateDictConverter(full))
    pictures = torch.rand(2, 3, 48, 32) * 2 - 1
    with torch.no_grad():
        latents = encoder(pictures)
        close(vae.encode(pictures), latents, 1e-4)
        close(vae.decoder(latents), decoder(latents), 1e-4)


def test_a_vae_that_is_read_again_is_the_same(vae: ThinVAE) -> None:
    again = ThinVAE().load(vae.tensors())
    pictures = torch.rand(1, 3, 32, 32) * 2 - 1
    close(again.encode(pictures), vae.encode(pictures), 1e-5)
    latents = torch.randn(1, 16, 4, 4)
    close(again.decoder(latents), vae.decoder(latents), 1e-5)


def close(found: Tensor, expected: Tensor, relative: float) -> None:
    assert expected.std() > 1e-3
    assert (found - expected).norm() <= relative * expected.norm()


def load(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """DiffSynth's attention is linear layers where the file has 1x1 convolutions."""
    own = module.state_dict()
    module.load_state_dict({name: t.reshape(own[name].shape) for name, t in tensors.items()})
