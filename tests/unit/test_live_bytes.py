"""The counting of live bytes, by which plans are judged."""

import pytest
import torch
from live_bytes import RESULTS, LiveBytes

META = torch.device("meta")
ATEN = torch.ops.aten
GIVEN = {
    ATEN.linear.default: lambda x: (x, x.new_empty(7, 8), x.new_empty(7)),
    ATEN.layer_norm.default: lambda x: (x, [8], None, None, 1e-6),
    ATEN.clamp_.default: lambda x: (x, -1, 1),
    ATEN.clamp_min_.default: lambda x: (x, 0),
    ATEN.gelu_.default: lambda x: (x,),
}


@pytest.mark.parametrize("function", RESULTS, ids=str)
def test_what_is_answered_for_pytorch_is_its_answer(function: torch._ops.OpOverload) -> None:
    for x in (torch.empty(2, 3, 8, device=META), torch.empty(3, 2, 8, device=META).transpose(0, 1)):
        x = x.to(torch.bfloat16)
        given = GIVEN[function](x)
        with torch.inference_mode():  # in which a call is told whole, not by its parts
            expected = function(*given)
            with LiveBytes() as live:
                found = function(*given)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.stride() == expected.stride()
        assert (found is x) == (expected is x)
        assert live.peak == live.now == (0 if expected is x else expected.nbytes)


def test_bytes_are_counted_while_they_live() -> None:
    with LiveBytes() as live:
        x = torch.empty(1000, device=META)
        parts = [*x.split(10), x.view(10, 100)]
        assert (live.now, live.peak, live.made) == (4000, 4000, 1)
        y = x + 1
        del x, parts
        assert (live.now, live.peak) == (4000, 8000)
        del y
        assert live.now == 0
