"""Control nets through ComfyUI's own code and ours, beside its Flux and ours, in float32."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from control_nets import FILES, WHOLE, control_net_tensors, picture, randn, transformer_tensors
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from majicflux.benchmarks.random_models import CLIP, T5
from majicflux.engine.flux.conditioning import conditions_of
from majicflux.engine.flux.controlnet import Control, ControlNet
from majicflux.engine.flux.lockstep import ControlTokens, Lockstep
from majicflux.engine.flux.picture_conditions import PictureConditions, picture_tokens
from majicflux.engine.flux.text_encoders import TextEmbedding
from majicflux.engine.flux.velocity import flux_velocity
from majicflux.engine.latents import to_model_space
from majicflux.engine.quant.formats import FLOAT32, uniform
from majicflux.loaders.controlnet import load_control_net
from majicflux.loaders.flux_dit import load_flux_dit

pytestmark = pytest.mark.usefixtures("comfy")
FLOAT = torch.float32
ROWS, COLUMNS = 6, 10  # of latents
PROMPT = TextEmbedding(randn(1, 21, T5.width), randn(1, CLIP.width))


def encoded(pixels: Tensor) -> Tensor:
    """What stands for the VAE: RGB [n, height, width, 3] -> latents, in its space."""
    channels = pixels.movedim(-1, 1).repeat(1, 6, 1, 1)[:, :16]
    return F.avg_pool2d(channels, 8) * 4 - 2


@dataclass(frozen=True)
class Given:
    """A picture for one of FILES, as a user has it."""

    name: str
    picture: Tensor
    mask: Tensor | None = None
    mode: int = 0
    strength: float = 0.8
    start: float = 0.0
    end: float = 1.0
    seed: int = 1


class BothModels:
    """ComfyUI's Flux and control nets, and ours, of the same files."""

    def __init__(self, folder: Path):
        import comfy.model_detection

        self.folder, tensors = folder, transformer_tensors()
        save_file(tensors, folder / "model.safetensors")
        config = comfy.model_detection.model_config_from_unet(tensors, "")
        config.set_inference_dtype(FLOAT, None)
        self.theirs = config.get_model(tensors, "", "cpu")
        self.theirs.load_model_weights(dict(tensors), "")
        self.ours = load_flux_dit(folder / "model.safetensors", uniform(FLOAT32))[0].module
        self.nets = cache(self._nets)

    def _nets(self, name: str, seed: int) -> tuple[Any, ControlNet]:
        import comfy.controlnet

        path = self.folder / f"{name} {seed}.safetensors"
        tensors = control_net_tensors(FILES[name], seed)
        save_file(tensors, path)
        theirs = comfy.controlnet.load_controlnet_state_dict(
            dict(tensors), model_options={"dtype": FLOAT}
        )
        weights, geometry = load_control_net(path, uniform(FLOAT32))
        patcher: Any = None
        return theirs, ControlNet(weights, patcher, geometry, uniform(FLOAT32))

    def expected(
        self, latents: Tensor, sigma: float, *controls: Given, references: Sequence[Tensor] = ()
    ) -> Tensor:
        from comfy_extras.nodes_controlnet import ControlNetInpaintingAliMamaApply

        import nodes

        vae = SimpleNamespace(encode=encoded, spacial_compression_encode=lambda: 8)
        given = {"pooled_output": PROMPT.pooled, "guidance": 3.5}
        if references:
            given["reference_latents"] = references
        conditioning: Any = [[PROMPT.tokens, given]]
        for each in controls:
            net = self.nets(each.name, each.seed)[0].copy()
            net.set_extra_arg("control_type", [each.mode] if FILES[each.name].modes else [])
            range_ = (each.strength, each.start, each.end)
            if each.mask is not None:
                applied = ControlNetInpaintingAliMamaApply.execute(
                    conditioning, [], net, vae, each.picture, each.mask, *range_
                )
                conditioning = applied.args[0]
            else:
                conditioning, _ = nodes.ControlNetApplyAdvanced().apply_controlnet(
                    conditioning, [], net, each.picture, *range_, vae=vae
                )
        tokens, options = conditioning[0]
        batch, control = len(latents), options.pop("control", None)
        options.pop("control_apply_to_uncond", None)
        found = self.theirs.extra_conds(
            noise=latents, device=latents.device, cross_attn=tokens, **options
        )
        conds = {
            name: c.process_cond(batch_size=batch, area=None).cond for name, c in found.items()
        }
        at = torch.tensor([sigma] * batch)
        told = None
        if control is not None:
            control.pre_run(self.theirs, self.theirs.model_sampling.percent_to_sigma)
            told = control.get_control(latents, at, conds, 1, {})
        clean = self.theirs.apply_model(latents, at, control=told, **conds)
        return (latents - clean) / sigma

    def found(
        self, latents: Tensor, sigma: float, *controls: Given, references: Sequence[Tensor] = ()
    ) -> Tensor:
        told = (3.5, FLOAT, latents.device, FLOAT, torch.tensor([sigma]))
        (prompt,) = conditions_of(self.ours, [PROMPT], *told)
        seen = PictureConditions(references=tuple(map(to_model_space, references)))
        pictures = picture_tokens(seen, WHOLE, latents.shape, None, lambda x: x)
        prompt = replace(prompt, pictures=pictures)
        given = []
        for each in controls:
            net = self.nets(each.name, each.seed)[1]
            control = Control(
                net, each.picture, each.mask, each.mode, each.strength, each.start, each.end
            )
            conditions = conditions_of(net.weights.module, [PROMPT], *told)
            shown = control.shown(8 * latents.shape[2], 8 * latents.shape[3])
            hint = control.hint(to_model_space(encoded(shown)))
            given.append(ControlTokens(control, [control.told(c) for c in conditions], hint))
        through = Lockstep(WHOLE, given)
        return flux_velocity(self.ours, prompt, through_blocks=through)(
            latents, torch.tensor(sigma)
        )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> BothModels:
    return BothModels(tmp_path_factory.mktemp("control"))


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def mask(rows: int, columns: int, count: int = 1) -> Tensor:
    return (randn(count, rows, columns, seed=3) > 0.3).float()


FITTING = picture(8 * ROWS, 8 * COLUMNS)
USED = {
    "Union-Pro 2.0": [Given("Union-Pro 2.0", FITTING)],
    "Union": [Given("Union", FITTING, mode=3)],
    "upscaler, another size": [Given("upscaler", picture(70, 50))],
    "inpainting": [Given("inpainting", FITTING, mask(8 * ROWS, 8 * COLUMNS))],
    "inpainting, other sizes": [Given("inpainting", picture(90, 70), mask(31, 77))],
    "inpainting without a mask": [Given("inpainting", FITTING)],
    "negative strength": [Given("upscaler", FITTING, strength=-0.5)],
    "two": [Given("Union-Pro 2.0", FITTING), Given("Union", picture(50, 50), mode=1)],
    "the same net twice": [Given("Union", FITTING), Given("Union", picture(50, 50), mode=6)],
    "three": [
        Given("upscaler", FITTING),
        Given("upscaler", FITTING, seed=2),
        Given("inpainting", FITTING, mask(20, 20), strength=0.3),
    ],
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("used", USED)
@torch.no_grad()
def test_control_nets(both: BothModels, used: str, batch: int) -> None:
    latents = randn(batch, 16, ROWS, COLUMNS)
    expected = both.expected(latents, 0.8, *USED[used])
    found = both.found(latents, 0.8, *USED[used])
    assert relative(found, expected) <= 1e-5
    assert relative(both.found(latents, 0.8), expected) > 0.01, "it is told something"


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_beside_references_they_tell_the_painted_picture_alone(
    both: BothModels, batch: int
) -> None:
    latents, references = randn(batch, 16, ROWS, COLUMNS), [randn(1, 16, 8, 4), randn(2, 16, 5, 10)]
    controls = USED["two"]
    expected = both.expected(latents, 0.8, *controls, references=references)
    assert relative(both.found(latents, 0.8, *controls, references=references), expected) <= 1e-5
    assert relative(both.found(latents, 0.8, *controls), expected) > 0.01
    assert relative(both.found(latents, 0.8, references=references), expected) > 0.01


@torch.no_grad()
def test_each_picture_of_a_batch_has_its_own(both: BothModels) -> None:
    latents, given = randn(3, 16, ROWS, COLUMNS), Given("upscaler", picture(48, 80, 3))
    found = both.found(latents, 0.8, given)
    assert relative(found, both.expected(latents, 0.8, given)) <= 1e-5
    swapped = both.found(latents, 0.8, replace(given, picture=given.picture.flip(0)))
    assert relative(swapped[1], found[1]) <= 1e-5 < relative(swapped[0], found[0])


@pytest.mark.parametrize(("start", "end"), [(0, 0.3), (0.3, 1), (0.2, 0.6), (0.0, 0.0), (1, 1)])
@torch.no_grad()
def test_start_and_end(both: BothModels, start: float, end: float) -> None:
    latents = randn(1, 16, ROWS, COLUMNS)
    given = Given("upscaler", FITTING, start=start, end=end)
    acted = []
    for sigma in (1.0, 0.93, 0.85, 0.7, 0.5, 0.1):
        found = both.found(latents, sigma, given)
        assert relative(found, both.expected(latents, sigma, given)) <= 1e-5
        acted.append(relative(found, both.found(latents, sigma)) > 0.001)
    assert any(acted) == (start < 1), "at some noise level"
    assert all(acted) == ((start, end) == (0, 1))
