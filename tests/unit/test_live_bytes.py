"""The counting of live bytes, by which plans are judged."""

from collections.abc import Callable

import pytest
import torch
from live_bytes import OF_ONE, RESULTS, LiveBytes

META = torch.device("meta")
ATEN = torch.ops.aten
PAIRS = {  # to be added, multiplied or divided
    "alike": lambda x: (x, x.new_empty(x.shape)),
    "one row for all": lambda x: (x, x.new_empty(1, 1, 8)),
    "of fewer dimensions": lambda x: (x, x.new_empty(8)),
    "a larger one": lambda x: (x, x.new_empty(5, *x.shape)),
    "a number": lambda x: (x, 2.5),
    "of another dtype": lambda x: (x, x.new_empty(x.shape, dtype=torch.float32)),
}
ALONE = {"": lambda x: (x,), "of whole numbers": lambda x: (x.to(torch.int64),)}
GIVEN = {
    ATEN.linear.default: {"": lambda x: (x, x.new_empty(7, 8), x.new_empty(7))},
    ATEN.layer_norm.default: {"": lambda x: (x, [8], None, None, 1e-6)},
    ATEN.clamp_.default: {"": lambda x: (x, -1, 1)},
    ATEN.clamp_min_.default: {"": lambda x: (x, 0)},
    ATEN.gelu_.default: {"": lambda x: (x,)},
    ATEN.cat.default: {
        "": lambda x: ([x, x.new_empty(5, *x.shape[1:])],),
        "in the last dimension": lambda x: ([x, x, x.new_empty(2, 3, 1)], -1),
        "nothing": lambda x: ([x, x.new_empty(0)], 1),
        "of another dtype": lambda x: ([x, x.to(torch.float32)], 1),
    },
    ATEN.mean.dim: {
        "": lambda x: (x, [-1], True),
        "of several": lambda x: (x, [0, 2], True),
        "without the dimension": lambda x: (x, [1]),
    },
    **dict.fromkeys((ATEN.add.Tensor, ATEN.mul.Tensor, ATEN.div.Tensor), PAIRS),
    **dict.fromkeys((getattr(ATEN, name).default for name in OF_ONE), ALONE),
}
CASES = [
    pytest.param(function, given, id=f"{function} {name}")
    for function in RESULTS
    for name, given in GIVEN[function].items()
    if (function, name) != (ATEN.silu.default, "of whole numbers")  # PyTorch has none
]


@pytest.mark.parametrize(("function", "given_to"), CASES)
def test_what_is_answered_for_pytorch_is_its_answer(
    function: torch._ops.OpOverload, given_to: Callable[[torch.Tensor], tuple]
) -> None:
    for x in (torch.empty(2, 3, 8, device=META), torch.empty(3, 2, 8, device=META).transpose(0, 1)):
        x = x.to(torch.bfloat16)
        given = given_to(x)
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
