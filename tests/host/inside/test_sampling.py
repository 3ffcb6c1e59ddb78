"""Our sampling nodes and ComfyUI's in the same graphs, in float32 on the CPU."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_encoders import their_clip, their_t5
from safetensors.torch import save_file
from torch import Tensor

from majicflux.benchmarks.random_models import DIT, random_tensors
from majicflux.engine.sampling.solvers import SOLVERS
from majicflux.loaders.demo_models import CLIP_FILE, DIT_FILE, VAE_FILE
from majicflux.loaders.layouts import flux_dit_layout

SIZE = 64
Graph = dict[str, Any]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture
def base(small_graph: Graph) -> Graph:
    """Our loaders, the stock ones over the same files, and what is sampled."""
    graph = {key: copy.deepcopy(small_graph[key]) for key in "1234"}
    graph["1"]["inputs"]["weight_precision"] = "bfloat16"
    graph["3"]["inputs"]["file"] = Path(VAE_FILE).name
    pipeline = ["4", 0]
    return graph | {
        "unet": node("UNETLoader", unet_name=Path(DIT_FILE).name, weight_dtype="default"),
        "vae": node("VAELoader", vae_name=Path(VAE_FILE).name),
        "empty": node("EmptySD3LatentImage", width=SIZE, height=SIZE, batch_size=1),
        "positive": node("MajicFluxEncodePrompt", pipeline=pipeline, prompt="a cat", guidance=3.5),
        "negative": node("MajicFluxEncodePrompt", pipeline=pipeline, prompt="fog", guidance=3.5),
        "sigmas": node(
            "BasicScheduler", model=["unet", 0], scheduler="simple", steps=8, denoise=1.0
        ),
    }


def ours(**inputs: Any) -> dict[str, Any]:
    return node("MajicFluxDenoise", **{
        "pipeline": ["4", 0], "positive": ["positive", 0], "latent": ["empty", 0], "seed": 7,
        "steps": 8, "guidance": 3.5, "sigmas": ["sigmas", 0], **inputs,
    })  # fmt: skip


def stock(sampler: str = "euler", **inputs: Any) -> Graph:
    return {
        "select": node("KSamplerSelect", sampler_name=sampler),
        "stock": node("SamplerCustom", **{
            "model": ["unet", 0], "add_noise": True, "noise_seed": 7, "cfg": 1.0,
            "positive": ["positive", 0], "negative": ["negative", 0],
            "sampler": ["select", 0], "sigmas": ["sigmas", 0], "latent_image": ["empty", 0],
            **inputs,
        }),
    }  # fmt: skip


def outputs(comfy, graph: Graph, *wanted: str) -> list[Any]:
    """What those nodes give."""
    shown = {f"{key} shown": node("PreviewAny", source=[key, 0]) for key in wanted}
    graph = graph | shown
    executor = comfy.executor()
    kind, data = comfy.run(executor, graph)[-1]
    assert kind == "execution_success", data
    found = comfy.outputs(executor, graph)
    return [found[key] for key in wanted]


def error_of(comfy, graph: Graph) -> str:
    kind, data = comfy.run(comfy.executor(), graph)[-1]
    assert kind == "execution_error", data
    return data["exception_message"]


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def same_latents(comfy, graph: Graph, tolerance: float = 1e-4) -> Tensor:
    found, expected = (out["samples"] for out in outputs(comfy, graph, "ours", "stock"))
    assert difference(found, expected) <= tolerance
    return found


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_samples_of_comfyuis_sampler(comfy, base: Graph, solver: str) -> None:
    same_latents(comfy, base | {"ours": ours(solver=solver)} | stock(solver))


@pytest.mark.parametrize(
    ("order", "levels"), [(2, [1.0, 0.96, 0.85, 0.66, 0.6, 0.3, 0.05]), (3, [0.9, 0.7, 0.5, 0.3])]
)
def test_deis_in_sigma_is_what_comfyui_calls_ipndm_v(order: int, levels: list[float]) -> None:
    """But for the step to 0, which is of first order there, and uneven steps of order 3."""
    from comfy.k_diffusion.sampling import sample_ipndm_v

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return (3 * sigma).sin() * x

    sigmas = torch.tensor(levels, dtype=torch.float64)
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    expected = sample_ipndm_v(
        lambda x, sigma: x - velocity(x, sigma[:, None]) * sigma[:, None], x, sigmas,
        max_order=order, disable=True,
    )  # fmt: skip
    found = SOLVERS[f"deis_{order}m"](velocity, x, sigmas)
    assert torch.allclose(found, expected, rtol=1e-12)


def test_cfg(comfy, base: Graph) -> None:
    graph = base | {"ours": ours(cfg=3.0, negative=["negative", 0])} | stock(cfg=3.0)
    guided = same_latents(comfy, graph)
    (plain,) = outputs(comfy, base | {"ours": ours()}, "ours")
    assert difference(guided, plain["samples"]) > 0.05


def test_guidance_that_is_disabled(comfy, base: Graph) -> None:
    base["plain"] = node("FluxDisableGuidance", conditioning=["positive", 0])
    positive = {"positive": ["plain", 0]}
    disabled = same_latents(comfy, base | {"ours": ours(**positive)} | stock(**positive))
    (guided,) = outputs(comfy, base | {"ours": ours()}, "ours")
    assert difference(disabled, guided["samples"]) > 0.01


@pytest.mark.parametrize("method", ["offset", "index", "uxo/uno"])
def test_references_of_kontext(comfy, base: Graph, method: str) -> None:
    """Two of the positive prompt and another one of the negative, in a batch."""
    base["empty"]["inputs"]["batch_size"] = 2
    base["sigmas"]["inputs"]["steps"] = 3
    graph = a_picture(base) | {
        "tall": node("ImageScale", image=["picture", 0], upscale_method="nearest-exact", width=40,
                     height=104, crop="disabled"),
        "tall encoded": node("VAEEncode", pixels=["tall", 0], vae=["vae", 0]),
        "one": node("ReferenceLatent", conditioning=["positive", 0], latent=["encoded", 0]),
        "two": node("ReferenceLatent", conditioning=["one", 0], latent=["tall encoded", 0]),
        "placed": node("FluxKontextMultiReferenceLatentMethod", conditioning=["two", 0],
                       reference_latents_method=method),
        "other": node("ReferenceLatent", conditioning=["negative", 0], latent=["tall encoded", 0]),
    }  # fmt: skip
    given = {"positive": ["placed", 0], "negative": ["other", 0], "cfg": 2.0}
    found = same_latents(comfy, graph | {"ours": ours(**given)} | stock(**given))
    plain = {**given, "positive": ["positive", 0]}
    (without,) = outputs(comfy, graph | {"ours": ours(**plain)}, "ours")
    assert difference(found, without["samples"]) > 0.01


@pytest.fixture
def wide_model(models: Path, channels: int) -> Iterator[str]:
    """The file of a transformer that takes so many channels."""
    file = models / Path(DIT_FILE).with_name(f"of_{channels}_channels.safetensors")
    layout = flux_dit_layout(replace(DIT, in_channels=channels))
    save_file(random_tensors(layout, 1, torch.bfloat16), file)
    yield file.name
    file.unlink()


@pytest.mark.parametrize("channels", [128, 384])
def test_fill_depth_and_canny_models(comfy, base: Graph, wide_model: str, channels: int) -> None:
    base["1"]["inputs"]["file"] = base["unet"]["inputs"]["unet_name"] = wide_model
    base["sigmas"]["inputs"]["steps"] = 3
    graph = a_picture(base)
    graph["picture"] = node("EmptyImage", width=SIZE, height=SIZE, batch_size=1, color=0x4080C0)
    both = {"positive": ["positive", 0], "negative": ["negative", 0], "vae": ["vae", 0]}
    if channels == 384:
        kind, both["mask"] = "InpaintModelConditioning", ["soft", 0]
        both["noise_mask"] = True
    else:
        kind = "InstructPixToPixConditioning"
    graph["given"] = node(kind, pixels=["picture", 0], **both)
    given = {"positive": ["given", 0], "negative": ["given", 1], "cfg": 2.0}
    graph |= {"ours": ours(latent=["given", 2], **given)}
    same_latents(comfy, graph | stock(latent_image=["given", 2], **given))
    graph["ours"] = ours()
    graph["shown"] = node("PreviewAny", source=["ours", 0])
    assert "it needs a picture too. Connect" in error_of(comfy, graph)


@pytest.mark.parametrize("channels", [384])
def test_sample_fills_what_is_masked(comfy, base: Graph, wide_model: str) -> None:
    """With an image and a mask of its own inputs, as InpaintModelConditioning would have it."""
    base["1"]["inputs"]["file"] = base["unet"]["inputs"]["unet_name"] = wide_model
    base["sigmas"]["inputs"]["steps"] = 3
    graph = a_picture(base)
    graph["picture"] = node("EmptyImage", width=SIZE, height=SIZE, batch_size=1, color=0x4080C0)
    graph["given"] = node(
        "InpaintModelConditioning", positive=["positive", 0], negative=["negative", 0],
        vae=["vae", 0], pixels=["picture", 0], mask=["soft", 0], noise_mask=True,
    )  # fmt: skip
    given = {"positive": ["given", 0], "negative": ["given", 1], "latent_image": ["given", 2]}
    graph |= stock(cfg=2.0, **given)
    sample = {
        "pipeline": ["4", 0], "prompt": "a cat", "seed": 7, "steps": 3, "guidance": 3.5,
        "width": SIZE, "height": SIZE, "batch_size": 1, "negative_prompt": "fog", "cfg": 2.0,
        "image": ["picture", 0], "mask": ["soft", 0], "keep_unmasked": False,
        "sigmas": ["sigmas", 0],
    }  # fmt: skip
    graph["sample"] = node("MajicFluxSample", **sample)
    graph["decoded"] = node("VAEDecode", samples=["stock", 0], vae=["vae", 0])
    found, expected = outputs(comfy, graph, "sample", "decoded")
    assert (found - expected).abs().max() <= 1e-3


def a_picture(base: Graph) -> Graph:
    """An encoded picture with content, and a mask with a soft edge on its right half."""
    return base | {
        "picture": node("MajicFluxSample", pipeline=["4", 0], prompt="a dog", seed=3, steps=2,
                        guidance=3.5, width=SIZE, height=SIZE, batch_size=1),
        "encoded": node("MajicFluxEncodeImage", pipeline=["4", 0], image=["picture", 0]),
        "mask": node("SolidMask", value=0.0, width=SIZE, height=SIZE),
        "white": node("SolidMask", value=1.0, width=SIZE // 2, height=SIZE),
        "half": node("MaskComposite", destination=["mask", 0], source=["white", 0], x=SIZE // 2,
                     y=0, operation="add"),
        "soft": node("FeatherMask", mask=["half", 0], left=0, top=0, right=16, bottom=0),
        "masked": node("SetLatentNoiseMask", samples=["encoded", 0], mask=["soft", 0]),
    }  # fmt: skip


def test_image_to_image(comfy, base: Graph) -> None:
    base["sigmas"]["inputs"]["denoise"] = 0.6
    graph = a_picture(base)
    graph |= {"ours": ours(latent=["encoded", 0])} | stock(latent_image=["encoded", 0])
    same_latents(comfy, graph)


def test_a_noise_mask_with_a_soft_edge(comfy, base: Graph) -> None:
    graph = a_picture(base)
    graph |= {"ours": ours(latent=["masked", 0])} | stock(latent_image=["masked", 0])
    found = same_latents(comfy, graph)
    (encoded,) = outputs(comfy, graph, "encoded")
    assert torch.allclose(found[..., :3], encoded["samples"][..., :3], atol=1e-5)


def test_the_pictures_of_a_batch_keep_their_numbers(comfy, base: Graph) -> None:
    graph = base | {
        "three": node("RepeatLatentBatch", samples=["empty", 0], amount=3),
        "last": node("LatentFromBatch", samples=["three", 0], batch_index=2, length=1),
    }
    graph |= {"ours": ours(latent=["last", 0])} | stock(latent_image=["last", 0])
    last = same_latents(comfy, graph)
    (batch,) = outputs(comfy, graph | {"ours": ours(latent=["three", 0])}, "ours")
    assert torch.equal(batch["samples"][2:], last)


@pytest.mark.parametrize("first", ["ours", "stock"])
def test_a_run_is_handed_over(comfy, base: Graph, first: str) -> None:
    """Between our node and KSampler (Advanced), in either order, at step 3."""
    graph = base | {"whole": ours()}
    advanced: dict[str, Any] = {
        "model": ["unet", 0], "noise_seed": 7, "steps": 8, "cfg": 1.0, "sampler_name": "euler",
        "scheduler": "simple", "positive": ["positive", 0], "negative": ["negative", 0],
    }  # fmt: skip
    if first == "ours":
        graph["begin"] = ours(end_at_step=3)
        graph["end"] = node(
            "KSamplerAdvanced", add_noise="disable", start_at_step=3, end_at_step=10000,
            return_with_leftover_noise="disable", latent_image=["begin", 0], **advanced,
        )  # fmt: skip
    else:
        graph["begin"] = node(
            "KSamplerAdvanced", add_noise="enable", start_at_step=0, end_at_step=3,
            return_with_leftover_noise="enable", latent_image=["empty", 0], **advanced,
        )  # fmt: skip
        graph["end"] = ours(latent=["begin", 0], start_at_step=3, add_noise=False)
    found, expected = outputs(comfy, graph, "end", "whole")
    assert difference(found["samples"], expected["samples"]) <= 1e-4


def test_stock_nodes_before_and_after_ours_paint_the_same_picture(comfy, base: Graph) -> None:
    sample = node(
        "MajicFluxSample", pipeline=["4", 0], prompt="a cat", seed=7, steps=4, guidance=2.0,
        width=SIZE, height=SIZE, batch_size=1,
    )  # fmt: skip
    parts = copy.deepcopy(sample)
    parts["inputs"].update(prompt="not this", positive=["guided", 0], latent=["four", 0])
    graph = base | {
        "sample": sample,
        "parts": parts,
        "guided": node("FluxGuidance", conditioning=["positive", 0], guidance=2.0),
        "four": node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1),
        "decoded": node("VAEDecode", samples=["sample", 1], vae=["vae", 0]),
        "ours decoded": node("MajicFluxDecode", pipeline=["4", 0], latent=["sample", 1]),
    }
    alone, mixed, stock_decoded, ours_decoded = outputs(
        comfy, graph, "sample", "parts", "decoded", "ours decoded"
    )
    assert torch.equal(alone, mixed)
    # A LATENT is in the VAE's space, to which and from which its values are rounded.
    assert (alone - ours_decoded).abs().max() <= 1e-4
    assert (alone - stock_decoded).abs().max() <= 1e-3


def test_our_encoder_gives_the_latents_of_vae_encode(comfy, base: Graph) -> None:
    graph = a_picture(base)
    graph["theirs"] = node("VAEEncode", pixels=["picture", 0], vae=["vae", 0])
    found, expected = outputs(comfy, graph, "encoded", "theirs")
    assert difference(found["samples"], expected["samples"]) <= 1e-4


def test_a_zeroed_conditioning_is_taken(comfy, base: Graph) -> None:
    base["zero"] = node("ConditioningZeroOut", conditioning=["positive", 0])
    graph = base | {"ours": ours(positive=["zero", 0])} | stock(positive=["zero", 0])
    same_latents(comfy, graph)


class SmallClip:
    """What CLIPTextEncode asks of a CLIP, with ComfyUI's encoders of the random models."""

    def __init__(self, models: Path, words: int):
        self.models, self.words = models, words

    def tokenize(self, text: str) -> dict[str, Any]:
        from comfy.sd1_clip import SDTokenizer
        from transformers import T5TokenizerFast

        folder = (self.models / CLIP_FILE).parent
        t5 = SDTokenizer(
            str(folder / "tokenizer_2"), tokenizer_class=T5TokenizerFast, has_start_token=False,
            pad_with_end=False, pad_to_max_length=False, max_length=99999999,
            min_length=self.words,
        )  # fmt: skip
        clip = SDTokenizer(str(folder / "tokenizer"))
        given = {"l": clip, "t5xxl": t5}
        return {name: each.tokenize_with_weights(text) for name, each in given.items()}

    def encode_from_tokens_scheduled(self, tokens: dict[str, Any]) -> Any:
        from comfy.text_encoders.flux import FluxClipModel

        theirs = SimpleNamespace(clip_l=their_clip(self.models), t5xxl=their_t5(self.models))
        found, pooled = FluxClipModel.encode_token_weights(theirs, tokens)
        return [[found, {"pooled_output": pooled}]]


@pytest.mark.parametrize("prompt", ["a cat on a roof", "a (cat:1.4) on a roof"])
def test_clip_text_encode_and_flux_guidance_before_ours(
    comfy, base: Graph, models: Path, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    import nodes

    class Small:
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})
        RETURN_TYPES = ("CLIP",)
        FUNCTION = "load"
        CATEGORY = "test"

        def load(self) -> tuple[SmallClip]:
            return (SmallClip(models, 512),)

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "SmallCLIP", Small)
    base["2"]["inputs"]["precision"] = "float32"
    base["positive"]["inputs"]["prompt"] = prompt
    graph = base | {
        "clip": node("SmallCLIP"),
        "text": node("CLIPTextEncode", text=prompt, clip=["clip", 0]),
        "guided": node("FluxGuidance", conditioning=["text", 0], guidance=3.5),
        "ours": ours(),
        "mixed": ours(positive=["guided", 0], guidance=1.0),
    }
    alone, mixed = outputs(comfy, graph, "ours", "mixed")
    assert difference(mixed["samples"], alone["samples"]) <= 1e-4


REFUSED = {
    "area": node("ConditioningSetArea", conditioning=["positive", 0], width=64, height=64, x=0,
                 y=0, strength=1.0),
    "mask": node("ConditioningSetMask", conditioning=["positive", 0], mask=["half", 0],
                 strength=1.0, set_cond_area="default"),
    "start_percent": node("ConditioningSetTimestepRange", conditioning=["positive", 0], start=0.1,
                          end=0.9),
    "2 entries": node("ConditioningCombine", conditioning_1=["positive", 0],
                      conditioning_2=["negative", 0]),
}  # fmt: skip


@pytest.mark.parametrize("named", REFUSED)
def test_conditioning_that_cannot_be_honoured_is_refused_by_name(
    comfy, base: Graph, named: str
) -> None:
    graph = a_picture(base) | {"refused": REFUSED[named], "ours": ours(positive=["refused", 0])}
    graph["shown"] = node("PreviewAny", source=["ours", 0])
    message = error_of(comfy, graph)
    assert named in message
    assert "positive" in message
