"""The node ControlNet, and the files that it refuses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from control_nets import FILES, control_net_tensors, picture
from safetensors.torch import save_file
from torch import Tensor

from file_layouts import Tensors
from majicflux.benchmarks.random_models import DIT
from majicflux.downloads import model_folders
from majicflux.engine.errors import EngineError
from majicflux.engine.flux.geometry import ControlGeometry
from majicflux.engine.flux.vae import VAE
from majicflux.engine.plan.plan import TEXT, Workload
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.engine.run.pipeline import Pipeline
from majicflux.host import current, standalone
from majicflux.loaders.controlnet import inspect_control_net, load_control_net
from majicflux.loaders.flux_dit import inspect_flux_dit
from majicflux.loaders.safetensors_file import ModelFileError
from majicflux.nodes.controlnet import FOLDER, ControlNetNode
from majicflux.nodes.denoise import Denoise
from majicflux.nodes.encode_prompt import EncodePrompt
from majicflux.nodes.pipeline import PipelineNode
from majicflux.nodes.sample import Sample

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")
Put = Callable[..., str]


def fitting(name: str, **changes: int) -> ControlGeometry:
    """One of FILES for the transformer of the random models."""
    return replace(FILES[name], **{"hidden": DIT.hidden} | changes)


@pytest.fixture(autouse=True)
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models/controlnet, beside the other random models."""
    nets = tmp_path / "models" / FOLDER
    nets.mkdir(parents=True)
    for other in ("diffusion_models", "text_encoders", "vae"):
        (nets.parent / other).symlink_to(models / other)
    monkeypatch.setattr(standalone, "models_folder", nets.parent)
    return nets


@pytest.fixture
def put(folder: Path) -> Put:
    def save(tensors: Tensors, name: str = "net.safetensors") -> str:
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / name)
        return name

    return save


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What nodes show."""
    lines: list[str] = []
    monkeypatch.setattr(current, "node_text", lambda texts, **_: lines.extend(texts))
    return lines


def net_file(put: Put, name: str = "Union-Pro 2.0", **changes: int) -> str:
    tensors = control_net_tensors(fitting(name, **changes), dtype=torch.bfloat16)
    return put(tensors, f"{name}.safetensors")


def control(file: str, image: Tensor | None = None, strength: float = 0.8, **inputs: Any) -> Any:
    shown = picture(70, 90) if image is None else image
    given = (file, "bfloat16", shown, strength, inputs.pop("start", 0.0), inputs.pop("end", 1.0))
    return ControlNetNode.execute(*given, **inputs).args[0]


@pytest.fixture
def pipeline(make_pipeline):
    return make_pipeline(dtype=torch.float32)


def sampled(pipeline: Any, **inputs: Any) -> Tensor:
    given = ("a cat", 3, 2, 3.5, 64, 48, 1)
    return Sample.execute(pipeline, *given, **inputs).args[1]["samples"]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_sample_and_denoise_are_steered_by_the_same_picture(pipeline, put: Put) -> None:
    file = net_file(put)
    found, plain = sampled(pipeline, control=control(file)), sampled(pipeline)
    assert relative(found, plain) > 0.01
    assert torch.equal(sampled(pipeline, control=control(file, strength=0.0)), plain)
    positive = EncodePrompt.execute(pipeline, "a cat", 3.5).args[0]
    empty = {"samples": torch.zeros(1, 16, 6, 8)}
    given = (pipeline, positive, empty, 3, 2, 3.5)
    again = Denoise.execute(*given, control=control(file)).args[0]["samples"]
    assert relative(again, found) < 1e-5
    other = sampled(pipeline, control=control(file, picture(70, 90, seed=1)))
    assert relative(other, found) > 1e-3


def test_text_encoders_stay_on_the_card_only_with_room_for_the_net_too(
    make_pipeline, put: Put, monkeypatch
) -> None:
    shown, accelerator = control(net_file(put)), torch.device("cpu", 0)
    pipeline = make_pipeline(device=accelerator, dtype=torch.float32)
    everything = sum(each.weights.travelling_bytes for each in pipeline.components)
    text = pipeline.text.plan(Workload(64, 48), None)
    (net,) = pipeline.denoise_with(shown).beside
    budget = everything + text.values + text.overhead + net.weights.travelling_bytes // 2
    plan, plans = Pipeline.plan, []
    monkeypatch.setattr(Pipeline, "plan", lambda *a: plans.append(plan(*a)) or plans[-1])
    for controls in ({}, {"control": shown}):
        sampled(replace(pipeline, budget_bytes=budget), **controls)
    without, with_net = (each.of(TEXT) for each in plans)
    assert without.visiting == 0 < with_net.visiting


def test_of_a_batch_of_images_those_are_encoded_that_are_seen(
    pipeline, put: Put, monkeypatch
) -> None:
    encode, encoded = VAE.encode, []

    def watched(vae: VAE, pictures: Tensor, *given: Any) -> Any:
        encoded.append(len(pictures))
        return encode(vae, pictures, *given)

    monkeypatch.setattr(VAE, "encode", watched)
    file, images = net_file(put), picture(70, 90, 3)
    found = sampled(pipeline, control=control(file, images))
    assert torch.equal(found, sampled(pipeline, control=control(file, images[:1])))
    assert encoded == [1, 1]


def test_two_that_are_chained_both_act_and_share_the_weights_of_one_file(pipeline, put) -> None:
    file = net_file(put)
    one = control(file)
    both = control(net_file(put, "Union"), control=one, mode="depth")
    first, second = both
    assert first is one[0]
    assert (second.mode, first.mode) == (2, 0)
    assert relative(sampled(pipeline, control=both), sampled(pipeline, control=one)) > 0.01
    assert control(file, strength=0.1)[0].net is first.net, "nothing is loaded again"


def test_what_the_net_makes_of_its_inputs_is_said(put, said: list[str]) -> None:
    mask, unused = torch.ones(1, 70, 90), "The mask is not used: this is no inpainting net."

    def lines(file: str, **inputs: Any) -> list[str]:
        said.clear()
        control(file, **inputs)
        report, *others = said
        assert report.startswith(f"{file}: ControlNet for Flux.1, 5 + ")
        return others

    assert lines(net_file(put), mask=mask) == [unused]
    inpainting = net_file(put, "inpainting")
    for nothing in ({}, {"mask": torch.zeros(1, 64, 64)}):
        (line,) = lines(inpainting, **nothing)
        assert "without a mask, or with an empty one, leaves all as it is" in line
    assert lines(inpainting, mask=mask) == []
    union = net_file(put, "Union", modes=4)
    assert lines(union, mode="blur", start=0.5, end=0.5) == ["mode: blur"]
    never = "The net never acts, because start lies behind end."
    assert lines(union, mode="blur", mask=mask, start=0.6, end=0.5) == ["mode: blur", unused, never]
    with pytest.raises(ValueError, match="has 4 modes, and pose is not among them"):
        control(union, mode="pose")


def test_a_pipeline_without_a_vae_says_so(pipeline, put: Put) -> None:
    bare = PipelineNode.execute(pipeline.dit, pipeline.text_encoders).args[0]
    positive = EncodePrompt.execute(bare, "a cat", 3.5).args[0]
    empty = {"samples": torch.zeros(1, 16, 6, 8)}
    with pytest.raises(EngineError, match="has no VAE"):
        Denoise.execute(bare, positive, empty, 3, 2, 3.5, control=control(net_file(put)))


def test_a_control_net_for_another_width_is_named(pipeline, put: Put) -> None:
    with pytest.raises(EngineError, match=r"width of 384 where .* 256, .* Choose another ControlN"):
        sampled(pipeline, control=control(net_file(put, hidden=384)))


@pytest.mark.parametrize("precision", ["float8_e4m3fn", "int8 rotated"])
def test_prepared_weights_are_those_that_were_converted(put, folder, precision: str) -> None:
    path, kept = folder / net_file(put, "Union"), folder.parent / "prepared"
    stored = PRECISIONS[precision]
    plain, made, mapped = (
        load_control_net(path, stored, cache_folder=where)[0] for where in (None, kept, kept)
    )
    assert "mapped from prepared" in mapped.report
    assert len([*kept.glob("*.majicflux")]) == 1
    for other in (made, mapped):
        pairs = zip(plain.module.parameters(), other.module.parameters(), strict=True)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def without(tensors: Tensors, ending: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}


def tiny(*names: str) -> Tensors:
    return {name: torch.zeros(2, 2) for name in names}


OF_ANOTHER = "is a ControlNet for another model, not a .* Flux.1. MajicFlux runs those for Flux.1"
REFUSED = {
    "cut": (
        lambda net: without(net, "blocks.1.norm1.linear.weight"),
        r"is incomplete: 1 of \d+ tensors are missing, double_blocks.1.img_mod.lin.weight",
    ),
    "no output": (
        lambda net: without(net, "controlnet_blocks.3.bias"), "controlnet_blocks.3.bias among"
    ),
    "channels": (
        lambda net: net | {"controlnet_x_embedder.weight": torch.zeros(DIT.hidden, 96)},
        "is shown 96 channels, and the ControlNets that MajicFlux knows 64, or 68",
    ),
    "other heads": (
        lambda net: net | {"transformer_blocks.0.attn.norm_q.weight": torch.zeros(64)},
        "attention heads of 64 in a width of 256",
    ),
    "a VAE": (lambda _: tiny("decoder.mid.block_1.conv1.weight"), "is a VAE, not a ControlNet"),
    "shape": (
        lambda net: net | {"controlnet_blocks.0.weight": torch.zeros(8, 8)},
        r"controlnet_blocks.0.weight has the shape \[8, 8\] where \[256, 256\] follows",
    ),
    "integers": (
        lambda net: net | {"controlnet_blocks.0.weight": torch.zeros(256, 256).int()},
        "stores controlnet_blocks.0.weight as I32, a quantisation",
    ),
    "NF4": (
        lambda net: without(net, "controlnet_blocks.0.weight")
        | tiny("controlnet_blocks.0.weight.absmax"),
        r"is an NF4 \(bitsandbytes\) file, not a ControlNet for Flux.1",
    ),
    "XLabs": (
        lambda _: tiny("controlnet_blocks.0.weight", "input_hint_block.0.weight",
                       "pos_embed_input.weight", "double_blocks.0.img_attn.qkv.weight"),
        "is a ControlNet of XLabs, which looks at pixels, not a ControlNet for Flux.1. MajicFlux "
        "runs those for Flux.1: Union-Pro 2.0",
    ),
    "XLabs for Diffusers": (
        lambda net: net | tiny("input_hint_block.conv_in.weight"), "is a ControlNet of XLabs"
    ),
    "Mistoline": (lambda _: tiny("controlnet_blocks.0.linear.weight"), "is Mistoline's ControlNet"),
    "Stable Diffusion 3": (
        lambda _: tiny("controlnet_blocks.0.weight", "pos_embed_input.proj.weight"),
        "is a ControlNet for Stable Diffusion 3, not",
    ),
    "Qwen-Image": (
        lambda net: net | tiny("transformer_blocks.0.img_mod.1.weight"),
        "is a ControlNet for Qwen-Image",
    ),
    "Qwen-Image, of Fun": (
        lambda _: tiny("control_blocks.0.after_proj.weight", "control_img_in.weight"),
        "is a ControlNet for Qwen-Image",
    ),
    "Qwen-Image, of DiffSynth": (
        lambda _: tiny("controlnet_blocks.0.y_rms.weight", "img_in.weight"),
        OF_ANOTHER,
    ),
    "Flux.2": (
        lambda _: tiny("control_transformer_blocks.0.after_proj.weight", "control_img_in.weight"),
        OF_ANOTHER,
    ),
    "Z-Image": (
        lambda _: tiny("control_layers.0.adaLN_modulation.0.weight",
                       "control_all_x_embedder.2-1.weight", "control_noise_refiner.0.x.weight"),
        OF_ANOTHER,
    ),
    "Wan": (lambda _: tiny("controlnet_patch_embedding.weight"), OF_ANOTHER),
    "SDXL": (
        lambda _: tiny("controlnet_cond_embedding.conv_in.weight", "add_embedding.linear_1.bias"),
        "is a ControlNet for SDXL or Stable Diffusion",
    ),
    "Stable Diffusion 1.5": (
        lambda _: tiny("control_model.zero_convs.0.0.weight",
                       "control_model.input_hint_block.0.weight"),
        "is a ControlNet for SDXL or Stable Diffusion",
    ),
    "IP-Adapter": (lambda _: tiny("ip_adapter_proj_model.norm.weight"), "an IP-Adapter.*, not a"),
    "PuLID": (lambda _: tiny("pulid_ca.0.norm1.weight"), "PuLID.*, not a ControlNet for Flux.1"),
    "a transformer": (
        lambda _: tiny("double_blocks.0.img_attn.qkv.weight"),
        "is a Flux.1 transformer, not a ControlNet for Flux.1. Choose it in the Majic float8 DiT",
    ),
    "a LoRA": (lambda _: tiny("lora_unet_a.lora_down.weight"), "is a LoRA, not a ControlNet"),
    "nothing": (lambda _: tiny("something.else"), "none of its 1 tensors has a name"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_none_is_named(put: Put, case: str) -> None:
    change, refused = REFUSED[case]
    net = control_net_tensors(fitting("upscaler"), dtype=torch.bfloat16)
    file = put(change(net))
    verdict = ControlNetNode.validate_inputs(file)
    with pytest.raises(ValueError, match=refused):
        raise ValueError(verdict)
    with pytest.raises(ModelFileError, match=refused):
        control(file)


def test_infusenet_is_named(put: Put, folder: Path) -> None:
    file = net_file(put, "upscaler", double_blocks=4, single_blocks=10)
    with pytest.raises(ModelFileError, match="is InfuseNet of InfiniteYou, which needs a face mod"):
        inspect_control_net(folder / file)


def test_a_damaged_value_is_named(put: Put) -> None:
    net = control_net_tensors(fitting("upscaler"), dtype=torch.bfloat16)
    net["controlnet_blocks.2.weight"][1, 1] = torch.nan
    with pytest.raises(ModelFileError, match=r"controlnet_blocks\.2\.weight: it holds a NaN"):
        control(put(net))


def test_a_pickle_and_a_missing_file_are_refused(folder: Path) -> None:
    (folder / "ip-adapter.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    assert "is a PyTorch pickle" in str(ControlNetNode.validate_inputs("ip-adapter.bin"))
    assert "is not in models/controlnet" in str(ControlNetNode.validate_inputs("gone.safetensors"))


def test_the_transformers_loader_says_where_it_belongs(put: Put, folder: Path) -> None:
    with pytest.raises(ModelFileError, match=r"is a ControlNet, not .* in the ControlNet node"):
        inspect_flux_dit(folder / net_file(put))


def test_it_is_offered_from_its_own_folder(put: Put) -> None:
    net_file(put)
    (file, *_) = ControlNetNode.define_schema().inputs
    assert file.options["options"] == model_folders.names(FOLDER) == ["Union-Pro 2.0.safetensors"]
