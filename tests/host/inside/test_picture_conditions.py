"""Pictures in a CONDITIONING of ComfyUI's own nodes, through its own Flux and ours, in float32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_dialects import control_lora
from majicflux.benchmarks.random_models import CLIP, DIT, T5, random_tensors
from majicflux.engine.flux.conditioning import conditions_of
from majicflux.engine.flux.picture_conditions import picture_tokens
from majicflux.engine.flux.transformer import DiT
from majicflux.engine.flux.velocity import flux_velocity
from majicflux.engine.quant.adapters import adapted, touched
from majicflux.engine.quant.compute import ComputePrecision
from majicflux.engine.quant.formats import FLOAT32, uniform
from majicflux.host import native
from majicflux.loaders.flux_dit import load_flux_dit
from majicflux.loaders.layouts import flux_dit_layout
from majicflux.loaders.lora import load_lora

pytestmark = pytest.mark.usefixtures("comfy")
FLOAT = torch.float32
SIGMA = torch.tensor(0.8)
BATCHES = [1, 3]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def conditioning(**options: Any) -> list[Any]:
    options = {"pooled_output": randn(1, CLIP.width), "guidance": 2.5, **options}
    return [[randn(1, 33, T5.width), options]]


class BothModels:
    """ComfyUI's Flux and ours, of one file."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]):
        import comfy.model_detection

        config = comfy.model_detection.model_config_from_unet(tensors, "")
        config.set_inference_dtype(FLOAT, None)
        self.theirs = config.get_model(tensors, "", "cpu")
        self.theirs.load_model_weights(dict(tensors), "")
        weights, geometry = load_flux_dit(path, uniform(FLOAT32))
        self.module = weights.module
        self.dit = DiT(weights, None, geometry, uniform(FLOAT32))  # nothing moves them

    def expected(self, latents: Tensor, given: list[Any], mask: Tensor | None = None) -> Tensor:
        (tokens, options), batch = given[0], len(latents)
        masks = {} if mask is None else {"denoise_mask": mask.expand_as(latents)}
        found = self.theirs.extra_conds(
            noise=latents, device=latents.device, cross_attn=tokens, **options, **masks
        )
        conds = {
            name: c.process_cond(batch_size=batch, area=None).cond for name, c in found.items()
        }
        clean = self.theirs.apply_model(latents, SIGMA.repeat(batch), **conds)
        return (latents - clean) / SIGMA

    def found(self, latents: Tensor, given: list[Any], mask: Tensor | None = None) -> Tensor:
        geometry = self.dit.geometry
        prompt = native.from_conditioning("positive", given, geometry)
        told = (3.5, FLOAT, latents.device, FLOAT, SIGMA.reshape(1))
        names = touched(self.dit.adapters)
        with (
            ComputePrecision(FLOAT).applied_to(self.module, latents.device),
            adapted(self.module, self.dit.adapters, names, FLOAT, latents.device),
        ):
            (conditions,) = conditions_of(self.module, [prompt], *told)
            pictures = picture_tokens(prompt.pictures, geometry, latents.shape, mask, lambda x: x)
            velocity = flux_velocity(self.module, replace(conditions, pictures=pictures))
            return velocity(latents, SIGMA)

    @contextmanager
    def with_loras(self, *loras: tuple[Path, float]) -> Iterator[None]:
        """Both with these files at these strengths."""
        import comfy.lora_convert
        import comfy.model_patcher
        import comfy.sd
        import comfy.utils

        dit, device = self.dit, torch.device("cpu")
        patcher = comfy.model_patcher.ModelPatcher(self.theirs, device, device)
        adapters = []
        for path, strength in loras:
            file = comfy.utils.load_torch_file(str(path))
            patcher, _ = comfy.sd.load_lora_for_models(patcher, None, file, strength, 0)
            adapters.append((load_lora(path, dit.geometry, CLIP, dtype=FLOAT), strength))
        patcher.patch_model()
        self.dit = dit.with_adapters(tuple(adapters))
        try:
            yield
        finally:
            patcher.unpatch_model()
            self.dit = dit


@pytest.fixture(scope="module")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], BothModels]:
    """Those whose tokens have so many channels."""

    @cache
    def load(channels: int) -> BothModels:
        tensors = random_tensors(flux_dit_layout(replace(DIT, in_channels=channels)), 0, FLOAT)
        path = tmp_path_factory.mktemp("wide") / "model.safetensors"
        save_file(tensors, path)
        return BothModels(path, tensors)

    return load


def require_same(
    both: BothModels, batch: int, given: list[Any], mask: Tensor | None = None
) -> Tensor:
    latents = randn(batch, 16, 12, 20)
    with torch.no_grad():
        found, expected = both.found(latents, given, mask), both.expected(latents, given, mask)
    assert relative(found, expected) <= 1e-5
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


BESIDE = {
    "image": {"concat_latent_image": (1, 16, 12, 20)},
    "image and mask": {"concat_latent_image": (1, 16, 12, 20), "concat_mask": (1, 1, 96, 160)},
    "mask": {"concat_mask": (2, 1, 50, 70)},
    "other sizes": {"concat_latent_image": (2, 16, 9, 31), "concat_mask": (4, 1, 201, 96)},
    "many images": {"concat_latent_image": (5, 16, 30, 8)},
}


@pytest.mark.parametrize("noise_mask", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("channels", [64, 128, 384])
@pytest.mark.parametrize("what", BESIDE)
def test_an_image_and_a_mask_beside_the_latents(
    models_of, what: str, channels: int, batch: int, noise_mask: bool
) -> None:
    both, given = models_of(channels), {key: randn(*shape) for key, shape in BESIDE[what].items()}
    mask = torch.rand(batch, 1, 12, 20) if noise_mask else None
    found = require_same(both, batch, conditioning(**given), mask)
    other = conditioning(**{key: value.flip(-1) for key, value in given.items()})
    seen = channels == 384 or (channels == 128 and "concat_latent_image" in given)
    with torch.no_grad():
        changed = relative(both.found(randn(batch, 16, 12, 20), other, mask), found)
    assert changed > 0.01 if seen else changed == 0


REFERENCES = {
    "one": [(1, 16, 12, 20)],
    "another size": [(1, 16, 8, 30)],
    "odd sides": [(1, 16, 7, 13), (1, 16, 5, 5)],
    "three": [(1, 16, 12, 20), (1, 16, 20, 6), (1, 16, 8, 8)],
    "tall ones": [(1, 16, 20, 6), (1, 16, 19, 7), (1, 16, 4, 24)],
    "of a batch": [(2, 16, 6, 6), (5, 16, 8, 4)],
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("method", [None, "offset", "index", "uxo"])
@pytest.mark.parametrize("shapes", REFERENCES)
def test_references_after_the_latents(
    models_of, shapes: str, method: str | None, batch: int
) -> None:
    latents = [randn(*shape) for shape in REFERENCES[shapes]]
    given = conditioning(reference_latents=latents, reference_latents_method=method)
    found = require_same(models_of(64), batch, given)
    plain = require_same(models_of(64), batch, conditioning())
    assert relative(found, plain) > 0.01


def test_redux_lengthens_the_prompt(models_of) -> None:
    import nodes

    redux = SimpleNamespace(get_cond=lambda seen: seen)

    def applied(strength_type: str) -> list[Any]:
        seen = randn(1, 20, T5.width)
        return nodes.StyleModelApply().apply_stylemodel(
            conditioning(), redux, seen, 0.7, strength_type
        )[0]

    both = models_of(64)
    found = require_same(both, 1, applied("multiply"))
    assert relative(found, require_same(both, 1, conditioning())) > 0.01
    with pytest.raises(ValueError, match="carries attention_mask"):
        both.found(randn(1, 16, 12, 20), applied("attn_bias"))


@pytest.fixture
def lora_files(tmp_path: Path) -> dict[str, Path]:
    tensors = control_lora()
    given = {
        "depth": tensors,
        "canny": {n: t.flip(0) for n, t in tensors.items()},
        "ordinary": {
            "diffusion_model.img_in.lora_A.weight": randn(4, 64) / 8,
            "diffusion_model.img_in.lora_B.weight": randn(DIT.hidden, 4),
            "diffusion_model.img_in.diff_b": randn(DIT.hidden),
            "diffusion_model.double_blocks.0.img_mlp.0.lora_A.weight": randn(4, DIT.hidden) / 16,
            "diffusion_model.double_blocks.0.img_mlp.0.lora_B.weight": randn(4 * DIT.hidden, 4),
        },
    }
    for name, file in given.items():
        save_file({n: t.contiguous() for n, t in file.items()}, tmp_path / f"{name}.safetensors")
    return {name: tmp_path / f"{name}.safetensors" for name in given}


# Files and strengths, in the order in which both apply them.
CONTROL = {
    "one": [("depth", 1.0)],
    "weaker": [("depth", 0.4)],
    "opposite": [("depth", -0.5)],
    "two": [("depth", 0.7), ("canny", 0.3)],
    "after an ordinary one": [("ordinary", 0.8), ("depth", 1.0)],
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("chain", CONTROL)
def test_control_loras(models_of, lora_files, chain: str, channels: int, batch: int) -> None:
    both = models_of(channels)
    loras = [(lora_files[name], strength) for name, strength in CONTROL[chain]]
    given = conditioning(concat_latent_image=randn(1, 16, 12, 20))
    without = require_same(both, batch, given)
    with both.with_loras(*loras):
        found = require_same(both, batch, given)
        no_picture = require_same(both, batch, conditioning())
    assert relative(found, no_picture) > 0.01
    assert relative(found, without) > 0.01
    assert torch.equal(require_same(both, batch, given), without)


@pytest.mark.parametrize("channels", [64, 128, 384])
def test_a_lora_that_knows_no_picture(models_of, lora_files, channels: int) -> None:
    """Beside a model that takes one, all of it counts but what it adds to the first weight."""
    both = models_of(channels)
    given = conditioning(concat_latent_image=randn(1, 16, 12, 20))
    with both.with_loras((lora_files["ordinary"], 0.7)):
        require_same(both, 1, given)
        unused = both.dit.adapters[0][0].report.unused
    names = ("diffusion_model.img_in.lora_A.weight", "diffusion_model.img_in.lora_B.weight")
    reason = "the first layer of a model that takes no picture"
    found = {why: tuple(sorted(those)) for why, those in unused.items()}
    assert found == ({} if channels == 64 else {reason: names})
