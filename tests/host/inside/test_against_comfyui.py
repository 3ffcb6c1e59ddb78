"""The same small files through ComfyUI's own model code, in float32."""

from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_encoders import END, float_state, their_clip, their_t5
from safetensors.torch import load_file, save_file

from file_layouts import (
    clip_to_openai,
    declared_in_header,
    int8_tensorwise,
    longer_clip,
    scaled,
    to_diffusers,
    vae_to_diffusers,
)
from majicflux.benchmarks.random_models import CLIP, DIT, T5
from majicflux.engine.flux.conditioning import conditions_of
from majicflux.engine.flux.prompts import weighted_segments
from majicflux.engine.flux.text_encoders import TextEmbedding
from majicflux.engine.flux.velocity import flux_velocity
from majicflux.engine.latents import SCALE, SHIFT, draw_noise, to_model_space, to_vae_space
from majicflux.engine.quant.formats import FLOAT32, uniform
from majicflux.engine.sampling.solvers import Velocity
from majicflux.loaders import demo_models
from majicflux.loaders.flux_dit import load_flux_dit
from majicflux.loaders.text_encoders import load_text_encoders
from majicflux.loaders.vae import load_vae

pytestmark = pytest.mark.usefixtures("comfy")
FLOAT = torch.float32


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm()).item()


def velocity_of(dit, text: TextEmbedding, guidance: float, latents, sigma) -> Velocity:
    given = (dit, [text], guidance, FLOAT, latents.device, FLOAT, sigma.reshape(1))
    return flux_velocity(dit, *conditions_of(*given))


@pytest.mark.parametrize(("sigma", "guidance"), [(1.0, 3.5), (0.37, 1.0)])
@torch.no_grad()
def test_one_forward_of_the_transformer(models: Path, sigma: float, guidance: float) -> None:
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    path = models / demo_models.DIT_FILE
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 12, 20, generator=generator)
    text = TextEmbedding(
        torch.randn(1, 77, T5.width, generator=generator),
        torch.randn(1, CLIP.width, generator=generator),
    )
    weights, _ = load_flux_dit(path, uniform(FLOAT32))
    at = torch.tensor(sigma)
    ours = velocity_of(weights.module, text, guidance, latents, at)(latents, at)

    theirs = Flux(
        in_channels=16, out_channels=16, vec_in_dim=CLIP.width, context_in_dim=T5.width,
        hidden_size=DIT.hidden, mlp_ratio=4.0, num_heads=DIT.heads, depth=DIT.double_blocks,
        depth_single_blocks=DIT.single_blocks, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
        qkv_bias=True, guidance_embed=True, txt_ids_dims=[], dtype=FLOAT, device="cpu",
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    # ComfyUI renames the scales of the query and key norms as it loads.
    names = {n: n.removeprefix("model.diffusion_model.") for n in float_state(path)}
    renamed = {n: name.replace("_norm.scale", "_norm.weight") for n, name in names.items()}
    theirs.load_state_dict({renamed[n]: t for n, t in float_state(path).items()})
    expected = theirs(
        latents, torch.tensor([sigma]), text.tokens, text.pooled, torch.tensor([guidance])
    )
    assert relative_difference(ours, expected) <= 1e-5


PREFIX = "model.diffusion_model."
WRITTEN_AS = {
    "one file": lambda plain: {PREFIX + name: t for name, t in plain.items()},
    "Diffusers names": to_diffusers,
    "scaled float8, old": lambda plain: scaled(plain, "old", per_row=False),
    "scaled float8, new": lambda plain: scaled(plain, "new", per_row=False),
    "plain float8": lambda plain: {n: t.to(torch.float8_e4m3fn) for n, t in plain.items()},
    "scales of norms as weights": lambda plain: {
        name.replace("_norm.scale", "_norm.weight"): t for name, t in plain.items()
    },
    "left-over tensors": lambda plain: plain | LEFT_OVER,
    "left-over tensors, Diffusers names": lambda plain: to_diffusers(plain) | LEFT_OVER,
    "scaled float8, declared in the header": lambda plain: declared_in_header(
        scaled(plain, "new", per_row=False)
    ),
}
LEFT_OVER = {
    "double_blocks.0.img_attn.qkv.lora_A.weight": torch.zeros(4, 4),
    "lora_unet_double_blocks_0.lora_down.weight": torch.zeros(4, 4),
    "optimizer.step": torch.zeros(1, dtype=torch.uint16),
    "ema.scale": torch.zeros(2, dtype=torch.float8_e8m0fnu),
}


def save(written: Any, path: Path) -> None:
    """written: tensors, or tensors and what the header declares of them."""
    tensors, metadata = written if isinstance(written, tuple) else (written, None)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata)


@pytest.mark.parametrize("layout", WRITTEN_AS)
@torch.no_grad()
def test_comfyuis_loader_reads_the_same_weights(models: Path, tmp_path: Path, layout: str) -> None:
    import comfy.sd

    source = load_file(models / demo_models.DIT_FILE)
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in source.items()}
    path = tmp_path / "model.safetensors"
    save(WRITTEN_AS[layout](plain), path)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 8, 8, generator=generator)
    tokens = torch.randn(1, 20, T5.width, generator=generator)
    pooled = torch.randn(1, CLIP.width, generator=generator)

    weights, _ = load_flux_dit(path, uniform(FLOAT32))
    text, at = TextEmbedding(tokens, pooled), torch.tensor(0.5)
    ours = velocity_of(weights.module, text, 3.5, latents, at)(latents, at)
    theirs = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": FLOAT})
    net = theirs.model.diffusion_model
    expected = net(latents, torch.tensor([0.5]), tokens, pooled, torch.tensor([3.5]))
    assert relative_difference(ours, expected) <= 1e-5


@pytest.mark.parametrize("in_header", [False, True])
@pytest.mark.parametrize(("group", "per_row"), [(256, True), (64, True), (0, True), (0, False)])
@torch.no_grad()
def test_comfyuis_int8_files_hold_the_same_weights(
    models: Path, tmp_path: Path, group: int, per_row: bool, in_header: bool
) -> None:
    """Its products round the activations too, so the weights are compared."""
    import comfy.sd
    from diffsynth.utils.state_dict_converters.flux_dit import FluxDiTStateDictConverter

    source = load_file(models / demo_models.DIT_FILE)
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in source.items()}
    path = tmp_path / "model.safetensors"
    written = int8_tensorwise(plain, group, per_row)
    save(declared_in_header(written) if in_header else written, path)
    ours = dict(load_flux_dit(path, uniform(FLOAT32))[0].module.named_parameters())
    net = comfy.sd.load_diffusion_model(str(path)).model.diffusion_model
    theirs = {}
    for name, parameter in net.named_parameters():
        values = parameter.dequantize() if hasattr(parameter, "dequantize") else parameter
        theirs[name.replace("_norm.weight", "_norm.scale")] = values.float()
    theirs = FluxDiTStateDictConverter(theirs)
    assert theirs.keys() == ours.keys()
    for name, parameter in ours.items():
        # Theirs are dequantized to bfloat16.
        assert relative_difference(parameter, theirs[name]) <= 4e-3, name


CLIPS = {
    "Transformers": (lambda t: t, 77),
    "OpenAI": (clip_to_openai, 77),
    "LongCLIP": (longer_clip, 248),
    "OpenAI, LongCLIP": (lambda t: clip_to_openai(longer_clip(t)), 248),
}


@pytest.mark.parametrize("written", CLIPS)
@torch.no_grad()
def test_clip(models: Path, tmp_path: Path, written: str) -> None:
    write, positions = CLIPS[written]
    path = tmp_path / "clip.safetensors"
    save(write(load_file(models / demo_models.CLIP_FILE)), path)
    weights = load_text_encoders(path, models / demo_models.T5_FILE, FLOAT)
    ids = torch.full((1, positions), END)
    ids[0, :5] = torch.tensor([END - 1, 3, 300, 44, END])
    ours, _ = weights.module["clip"](ids)
    theirs = their_clip(tmp_path, path.name)
    assert relative_difference(ours, theirs.transformer(ids)[3]) <= 1e-5


@pytest.mark.parametrize("words", ["a cat", "a cat " * 90, "many (words:1.2), " * 60])
@torch.no_grad()
def test_a_long_clip_reads_what_comfyuis_reads(make_pipeline, models, tmp_path, words) -> None:
    from comfy.sd1_clip import SDTokenizer

    path = tmp_path / "clip.safetensors"
    save(longer_clip(load_file(models / demo_models.CLIP_FILE)), path)
    encoders = make_pipeline(dtype=FLOAT).text_encoders
    weights = load_text_encoders(path, models / demo_models.T5_FILE, FLOAT)
    encoders = replace(encoders, weights=weights, patcher=type(encoders.patcher)(weights))
    ours, _ = encoders.encode(words)
    folder = (models / demo_models.CLIP_FILE).parent / "tokenizer"
    tokenizer = SDTokenizer(str(folder), tokenizer_data={"clip_l_max_length": 248})
    theirs = their_clip(tmp_path, path.name)
    _, pooled = theirs.encode_token_weights(tokenizer.tokenize_with_weights(words))
    assert relative_difference(ours.pooled, pooled) <= 1e-5


@torch.no_grad()
def test_t5(models: Path) -> None:
    weights = load_text_encoders(
        models / demo_models.CLIP_FILE, models / demo_models.T5_FILE, FLOAT
    )
    ids = torch.zeros(1, 512, dtype=torch.int64)
    ids[0, :4] = torch.tensor([5, 60, 7, 1])
    ours = weights.module["t5"](ids)
    assert relative_difference(ours, their_t5(models).transformer(ids, None)[0]) <= 1e-5


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a cat on a roof",
        "(detailed texture:1.3), a (cat), ((oil) painting:0.4), (blurred:-0.5)",
        r"a rose \(flower\) and (some \(red\) paint:1.7)",
        "赛博朋克 (a cat:1.2)，屋顶上",
        "many words, " * 40 + "(and more:1.4) " + "words, " * 60 + "(to the end:0.8)",
        "a" * 73 + "(cat:1.3) and more",
    ],
)
@torch.no_grad()
def test_prompts_with_weights(make_pipeline, models: Path, prompt: str) -> None:
    from comfy.sd1_clip import SDTokenizer
    from comfy.text_encoders.flux import FluxClipModel
    from transformers import T5TokenizerFast

    encoders = make_pipeline(dtype=FLOAT).text_encoders
    ours, _ = encoders.encode(prompt)
    # As ComfyUI's Flux has them, but with our tokenizers, and T5's prompt filled up to our length.
    folder = (models / demo_models.CLIP_FILE).parent
    clip = SDTokenizer(str(folder / "tokenizer"))
    t5 = SDTokenizer(
        str(folder / "tokenizer_2"), tokenizer_class=T5TokenizerFast, has_start_token=False,
        pad_with_end=False, pad_to_max_length=False, max_length=99999999,
        min_length=ours.tokens.shape[1],
    )  # fmt: skip
    given = {"l": clip.tokenize_with_weights(prompt), "t5xxl": t5.tokenize_with_weights(prompt)}
    theirs = SimpleNamespace(clip_l=their_clip(models), t5xxl=their_t5(models))
    tokens, pooled = FluxClipModel.encode_token_weights(theirs, given)
    assert tokens.shape == ours.tokens.shape
    assert relative_difference(ours.tokens, tokens) <= 1e-5
    assert relative_difference(ours.pooled, pooled) <= 1e-5


def test_weights_are_read_as_by_comfyui() -> None:
    from comfy.sd1_clip import escape_important, token_weights, unescape_important

    def joined(segments: list[tuple[str, float]]) -> list[tuple[str, float]]:
        found: list[tuple[str, float]] = []
        for text, weight in segments:
            if found and found[-1][1] == weight == 1:
                text = found.pop()[0] + text
            found.append((text, weight))
        return found

    random = Random(0)
    for _ in range(20000):
        prompt = "".join(random.choices("(()))\\\\:1.3 a猫", k=random.randrange(1, 20)))
        theirs = token_weights(escape_important(prompt), 1.0)
        theirs = [(unescape_important(text), weight) for text, weight in theirs]
        assert [*weighted_segments(prompt)] == joined(theirs), prompt


@torch.no_grad()
def test_vae_decode(models: Path) -> None:
    import comfy.sd

    path = models / demo_models.VAE_FILE
    latents = torch.randn(1, 16, 12, 10, generator=torch.Generator().manual_seed(0))
    ours = load_vae(path, FLOAT).module["decoder"](latents)
    theirs = comfy.sd.VAE(sd=float_state(path), dtype=FLOAT).first_stage_model
    assert relative_difference(ours, theirs.decode(to_vae_space(latents))) <= 1e-5


@torch.no_grad()
def test_comfyuis_loader_reads_the_same_vae_in_diffusers_names(
    models: Path, tmp_path: Path
) -> None:
    import comfy.sd

    tensors = vae_to_diffusers(float_state(models / demo_models.VAE_FILE))
    path = tmp_path / "vae.safetensors"
    save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = load_vae(path, FLOAT).module["decoder"](latents)
    theirs = comfy.sd.VAE(sd=load_file(path), dtype=FLOAT).first_stage_model
    assert relative_difference(ours, theirs.decode(to_vae_space(latents))) <= 1e-5


def test_noise_and_latent_space() -> None:
    import comfy.latent_formats
    import comfy.sample

    empty = torch.zeros(3, 16, 128, 128)
    noise = draw_noise(2**63 + 5, empty.shape)
    assert torch.equal(noise, comfy.sample.prepare_noise(empty, 2**63 + 5))
    some = [2, 0, 2]
    expected = comfy.sample.prepare_noise(empty, 7, some)
    assert torch.equal(draw_noise(7, empty.shape, some), expected)
    theirs = comfy.latent_formats.Flux()
    assert (theirs.scale_factor, theirs.shift_factor) == (SCALE, SHIFT)
    assert torch.equal(to_vae_space(noise), theirs.process_out(noise))
    assert torch.equal(to_model_space(noise), theirs.process_in(noise))
