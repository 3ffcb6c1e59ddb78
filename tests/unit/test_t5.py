"""Our T5 encoder against that of Transformers."""

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from majicflux.engine.flux.geometry import T5Geometry
from majicflux.engine.flux.t5 import T5Encoder
from majicflux.engine.flux.text_encoders import HostEmbedding

SMALL = T5Geometry(width=96, mlp_width=160, layers=3, heads=6, head_dim=24, vocabulary=50)


def theirs(g: T5Geometry, dtype: torch.dtype) -> T5EncoderModel:
    """With the options of T5-XXL that DiffSynth has; its own class builds that size only."""
    config = T5Config(
        vocab_size=g.vocabulary,
        d_model=g.width,
        d_kv=g.head_dim,
        d_ff=g.mlp_width,
        num_layers=g.layers,
        num_heads=g.heads,
        relative_attention_num_buckets=g.buckets,
        feed_forward_proj="gated-gelu",
    )
    torch.manual_seed(3)
    model = T5EncoderModel(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def ours(g: T5Geometry, model: T5EncoderModel) -> T5Encoder:
    encoder = T5Encoder(g, HostEmbedding(g.vocabulary, g.width)).to(model.dtype).eval()
    encoder.load_state_dict(model.state_dict())
    return encoder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("words", [1, 20, 300])
def test_it_is_that_of_transformers_bit_for_bit(dtype: torch.dtype, words: int) -> None:
    """300 words: past the distance from where on the position bias is the same."""
    model = theirs(SMALL, dtype)
    ids = torch.randint(SMALL.vocabulary, (1, words))
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        found = ours(SMALL, model)(ids)
    assert torch.equal(found, expected)


def test_prepared_weights_of_it_stay_readable() -> None:
    """They are laid out in the order of the parameters, which was that of Transformers."""
    model = theirs(SMALL, torch.float32)
    expected = [(name, p.shape) for name, p in model.named_parameters()]
    found = [(name, p.shape) for name, p in ours(SMALL, model).named_parameters()]
    assert found == expected
