"""What the measurements rest on, at a size that takes a second."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from majicflux.benchmarks import little_world, precision
from majicflux.benchmarks.random_flux import normal
from majicflux.engine.flux.geometry import FluxGeometry

TINY = FluxGeometry(
    hidden=256, double_blocks=1, single_blocks=1, text_width=64, pooled_width=64, out_channels=16
)


def test_equal_weights_have_equal_errors_and_scaled_ones_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "find_comfyui", lambda: None)  # it would stay in this process
    device = torch.device("cpu")
    peers, ours = [precision.exact(), *precision.peers(device)], [*precision.ours(device)]

    def draw(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        return 4 * normal(shape, generator)  # so narrow a block would hardly change its input

    rounded_as_theirs = [replace(scheme, dtype=torch.bfloat16) for scheme in ours]
    given = {"tokens": 32, "device": device, "seed": 1}
    _, error = precision.errors(draw, TINY, peers + rounded_as_theirs, **given)
    theirs = error["bfloat16 (DiffSynth's blocks)"]
    assert error["bfloat16"] == theirs > 0
    assert error["float8_e4m3fn unscaled"] == error[precision.CAST]
    _, error = precision.errors(draw, TINY, peers + ours, **given)
    assert error["bfloat16"] < 0.5 * theirs
    assert error["int8 rotated"] < error["float8_e4m3fn"] < error[precision.CAST]
    assert error[precision.FLOAT8_BOTH] > error["float8_e4m3fn"]


def test_what_is_drawn_by_rule_agrees_and_what_is_not_there_is_a_miss(capsys) -> None:
    asked = [case for name in little_world.LANGUAGES for case in little_world.cases(name, 4)]
    drawn = little_world.by_rule(asked)
    assert drawn.right == drawn.asked
    assert little_world.report({"English": drawn}, drawn)
    assert "MISSED" not in capsys.readouterr().out
    wrong = little_world.Agreement()
    for case in asked:
        nothing = np.zeros_like(case.by_rule())
        wrong.add(little_world.agreement(case.scene, nothing))
    assert wrong.asked == drawn.asked
    assert not little_world.report({"English": drawn, "Chinese": wrong}, drawn)
    assert capsys.readouterr().out.count("MISSED") == 2
