"""What only a CUDA card can show. Skipped where there is none."""

from pathlib import Path

import pytest
import torch

from majicflux.engine.pipeline import Request, paint
from majicflux.engine.precision import PRECISIONS
from majicflux.loaders import demo_models
from majicflux.loaders.flux_dit import load_flux_dit

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NOT TESTED ON A CARD: no CUDA device"
)
CUDA = torch.device("cuda", 0)
REQUEST = Request("a cat", seed=1, steps=4, guidance=3.5, width=256, height=256)


def picture(make_pipeline, **options) -> torch.Tensor:
    pipeline = make_pipeline(precision=PRECISIONS["float8_e4m3fn"], **options)
    return paint(pipeline, REQUEST, lambda *_: None, lambda: None)[0]


def test_a_streamed_picture_equals_a_resident_one(make_pipeline) -> None:
    resident = picture(make_pipeline, device=CUDA)
    streamed = picture(make_pipeline, device=CUDA, budget_bytes=1)
    assert torch.equal(resident, streamed)


def test_the_card_paints_what_the_cpu_paints(make_pipeline) -> None:
    on_card = picture(make_pipeline, device=CUDA, dtype=torch.float32)
    on_cpu = picture(make_pipeline, dtype=torch.float32)
    assert (on_card - on_cpu).abs().mean() < 1e-3


def test_the_card_converts_to_the_weights_of_the_cpu(models: Path) -> None:
    path = models / demo_models.DIT_FILE
    on_cpu, _ = load_flux_dit(path, PRECISIONS["float8_e4m3fn"])
    on_card, _ = load_flux_dit(path, PRECISIONS["float8_e4m3fn"], device=CUDA)
    theirs = dict(on_card.module.named_parameters())
    for name, parameter in on_cpu.module.named_parameters():
        assert parameter.device == theirs[name].device
        difference = (parameter.float() - theirs[name].float()).abs().mean()
        assert difference <= 1e-3 * parameter.float().abs().mean(), name


def test_streaming_holds_less_of_the_card(make_pipeline) -> None:
    peaks = []
    for budget in (None, 1):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        picture(make_pipeline, device=CUDA, budget_bytes=budget)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]
