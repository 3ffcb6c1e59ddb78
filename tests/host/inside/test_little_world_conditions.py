"""The little models that see pictures, as they are trained, beside ComfyUI's own of their files."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from majicflux.tools.little_world.lessons import LESSONS, Lesson
from majicflux.tools.little_world.models import TOY, LittleFlux

pytestmark = pytest.mark.usefixtures("comfy")
SIGMA, GUIDANCE = 0.7, 3.5
BATCH, HEIGHT, WIDTH = 2, 8, 12


@pytest.fixture(params=LESSONS)
def lesson(request: pytest.FixtureRequest) -> Lesson:
    """One of each kind, as if it had learnt something."""
    torch.manual_seed(0)
    flux = LittleFlux(TOY)
    shop: Any = SimpleNamespace(vae=lambda: None, flux_of=lambda _: flux, device="cpu")
    lesson = LESSONS[request.param](shop)
    with torch.no_grad():
        for name, parameter in lesson.model.named_parameters():
            parameter += torch.randn_like(parameter) * (0.2 if "norm" in name else 0.05)
    return lesson


def of_comfyui(tensors: dict[str, Tensor]) -> Any:
    import comfy.model_detection

    config = comfy.model_detection.model_config_from_unet(tensors, "")
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(tensors, "", "cpu")
    model.load_model_weights(dict(tensors), "")
    return model


def with_lora(model: Any, tensors: dict[str, Tensor]) -> Any:
    import comfy.model_patcher
    import comfy.sd

    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, tensors, 1.0, 0.0)
    return patched.patch_model()


def control_of(tensors: dict[str, Tensor], edges: Tensor, given: tuple[Tensor, ...]) -> Any:
    import comfy.controlnet

    options = {"dtype": torch.float32}
    loaded = comfy.controlnet.load_controlnet_state_dict(tensors, model_options=options)
    latents, sigma, text, pooled, guidance = given
    found = loaded.control_model(latents, sigma, text, pooled, guidance, hint=edges)
    return {"output": [], **found}


def test_comfyui_computes_what_was_trained(lesson: Lesson) -> None:
    kind = next(name for name, each in LESSONS.items() if type(lesson) is each)
    flux: Any = lesson.flux
    latents, seen = torch.randn(2, BATCH, 16, HEIGHT, WIDTH).unbind()
    mask = torch.rand(BATCH, 8 * HEIGHT, 8 * WIDTH) < 0.4
    conditions = lesson.conditions(seen, mask) if kind == "fill" else lesson.conditions(seen)
    ids = torch.randint(400, (BATCH, 64)), torch.randint(400, (BATCH, 77))
    sigma, guidance = torch.full((BATCH,), SIGMA), torch.full((BATCH,), GUIDANCE)
    tensors = {name: tensor.detach().clone() for name, tensor in lesson.tensors().items()}
    with torch.no_grad():
        expected = lesson.model(latents, sigma, *ids, guidance, **conditions)
        given = (latents, sigma, flux.t5(ids[0]), flux.clip(ids[1]), guidance)
        more, x = {}, latents
        model = of_comfyui(tensors if kind in ("fill", "kontext") else plain(flux))
        if kind == "kontext":
            more = {"ref_latents": [seen]}
        if kind == "depth":
            model = with_lora(model, tensors)
        if kind == "controlnet":
            more = {"control": control_of(tensors, seen, given)}
        if "beside" in conditions:
            x = torch.cat([latents, conditions["beside"]], 1)
        found = model.diffusion_model(x, *given[1:], **more)
    assert expected.std() > 0.05
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def plain(flux: LittleFlux) -> dict[str, Tensor]:
    """The transformer without what stands beside its layers."""
    state = {name.replace(".layer.", "."): t for name, t in flux.dit.state_dict().items()}
    return {name: tensor.detach().clone() for name, tensor in state.items() if "lora" not in name}
