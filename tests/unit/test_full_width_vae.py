"""A thin VAE and the full-width one that is made of it, in DiffSynth's own modules."""

import pytest
import torch
from diffsynth.models.flux_vae import FluxVAEDecoder, FluxVAEEncoder
from diffsynth.utils.state_dict_converters.flux_vae import (
    FluxVAEDecoderStateDictConverter,
    FluxVAEEncoderStateDictConverter,
)
from thin_weights import make_thin, thin_tensors

from majicflux.loaders.full_width_vae import widened
from majicflux.loaders.layouts import vae_layout

DECODER = (FluxVAEDecoder, FluxVAEDecoderStateDictConverter, (1, 16, 6, 4))
ENCODER = (FluxVAEEncoder, FluxVAEEncoderStateDictConverter, (1, 3, 48, 32))


@pytest.mark.parametrize(("kind", "converter", "shape"), [DECODER, ENCODER])
@torch.inference_mode()
def test_a_thin_vae_and_the_full_one_compute_the_same(kind, converter, shape) -> None:
    tensors = thin_tensors()
    thin, full = make_thin(kind()), kind()
    thin.load_state_dict(converter(tensors))
    full.load_state_dict(converter(widened(tensors)))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = thin(x)
    assert expected.std() > 0.1
    assert (full(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_full_one_has_no_variance() -> None:
    """Which a reader of the file may draw latents with."""
    full = widened(thin_tensors())
    assert {name: tuple(tensor.shape) for name, tensor in full.items()} == vae_layout()
    assert not full["encoder.conv_out.weight"][16:].any()
    assert (full["encoder.conv_out.bias"][16:] / 2).exp().max() < 1e-6
