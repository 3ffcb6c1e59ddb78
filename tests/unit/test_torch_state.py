"""What other nodes leave behind in PyTorch changes nothing, and is left as it is."""

import ast
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rooms import FILES, room_of
from torch import Tensor

from majicflux.engine.quant.formats import PRECISIONS
from majicflux.engine.torch_state import own_state
from majicflux.host import standalone
from majicflux.loaders.convert_on_device import DeviceQuantizer
from majicflux.loaders.flux_dit import load_flux_dit
from majicflux.nodes.dit_loader import DiTLoader
from majicflux.nodes.pipeline import PipelineNode
from majicflux.nodes.sample import Sample
from majicflux.nodes.text_encoders import TextEncodersNode
from majicflux.nodes.vae_loader import VAELoader

pytestmark = pytest.mark.usefixtures("one_thread")
# Those that take PyTorch's default dtype or device unless they are told others.
MAKERS = ("empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")


@contextmanager
def left_behind(dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> Iterator[None]:
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(dtype)
        stack.enter_context(torch.device(device))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        yield


def state() -> Any:
    return torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", ["float8_e4m3fn", "int8 rotated"])
@pytest.mark.parametrize("computing", ["auto", "8-bit"])
def test_a_picture_does_not_depend_on_the_defaults_of_pytorch(
    models: Path, monkeypatch: pytest.MonkeyPatch, precision: str, computing: str
) -> None:
    monkeypatch.setattr(standalone, "models_folder", models)

    def painted() -> Tensor:
        dit = DiTLoader.execute("majicflus_v134.safetensors", precision, False).args[0]
        encoders = TextEncodersNode.execute(
            "clip_l.safetensors", "t5xxl_fp16.safetensors", "float32", False
        )
        parts = (dit, encoders.args[0], VAELoader.execute("ae.safetensors").args[0])
        pipeline = PipelineNode.execute(*parts, 0.0, computing).args[0]
        return Sample.execute(pipeline, "a (cat:1.2)", 3, 2, 3.5, 64, 48, 1).args[0]

    expected = painted()
    with left_behind():
        before = state()
        found = painted()
        assert state() == before
    assert torch.equal(found, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_converted_to_the_same_bits(models: Path, precision: str) -> None:
    path = models / "diffusion_models" / "majicflus_v134.safetensors"

    def converted() -> dict[str, Tensor]:
        weights, _ = load_flux_dit(path, PRECISIONS[precision])
        return dict(weights.module.named_parameters())

    expected = converted()
    with left_behind():
        found = converted()
    for name, weight in expected.items():
        assert weight.dtype == found[name].dtype
        assert torch.equal(weight.view(torch.uint8), found[name].view(torch.uint8)), name


def test_scales_made_on_a_card_are_not_rounded() -> None:
    """In threads of their own, which have no defaults but that dtype."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    given = weight.clone()
    into, scale = torch.empty(4, 64, dtype=torch.float8_e4m3fn), torch.empty(4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        DeviceQuantizer(torch.device("cpu")).quantize(given, into, scale, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(scale, weight.abs().amax(dim=1) / 448)


def test_the_state_is_restored_after_an_error() -> None:
    with left_behind(torch.float64):
        before = state()
        with pytest.raises(AssertionError), own_state():
            assert state() != (torch.float32, torch.device("cpu"), False)
        assert state() == before


def test_what_is_made_names_its_dtype() -> None:
    for file in FILES:
        if file.name in ("t5.py", "text_encoders.py"):
            continue  # modules, which are cast, or made on the meta device
        if room_of(file) == "tools":
            continue  # which have a process of their own
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            if ast.unparse(call.func.value) == "torch" and call.func.attr in MAKERS:
                named = {word.arg for word in call.keywords}
                assert named & {"dtype", None}, f"{file.name}: {ast.unparse(call)}"
