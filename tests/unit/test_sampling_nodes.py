"""Every option of the nodes that sample does what it says, without a host."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RecordingPatcher, build_pipeline
from thin_weights import narrow_vae
from torch import Tensor

from majicflux.engine.flux.geometry import FluxGeometry
from majicflux.engine.flux.text_encoders import TextEmbedding
from majicflux.engine.flux.vae import VAE
from majicflux.engine.plan.plan import Workload
from majicflux.engine.run.pipeline import Pipeline
from majicflux.engine.run.stages import DecodeStage
from majicflux.engine.sampling.schedules import SCHEDULES
from majicflux.engine.sampling.solvers import SOLVERS
from majicflux.host import current as host
from majicflux.host import native
from majicflux.messages import MajicFluxError
from majicflux.nodes import NODES
from majicflux.nodes.decode import Decode
from majicflux.nodes.denoise import Denoise
from majicflux.nodes.encode_image import EncodeImage
from majicflux.nodes.encode_prompt import EncodePrompt
from majicflux.nodes.pipeline import PipelineNode
from majicflux.nodes.sample import SIZES, Sample
from majicflux.nodes.sampler_inputs import _steps
from majicflux.nodes.translate import Translate

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")
GEOMETRY = FluxGeometry(text_width=8, pooled_width=4)


@pytest.fixture(scope="module")
def pipeline(models) -> Pipeline:
    made, vae = build_pipeline(models, dtype=torch.float32), narrow_vae(torch.float32)
    return replace(made, vae=VAE(vae, RecordingPatcher(vae), torch.float32))


def output(pipeline: Pipeline, **changes: Any) -> Any:
    given = {
        "prompt": "a cat", "seed": 0, "steps": 2, "guidance": 3.5, "width": 64, "height": 48,
        "batch_size": 1, **changes,
    }  # fmt: skip
    return Sample.execute(pipeline, **given)


def sampled(pipeline: Pipeline, **changes: Any) -> tuple[Tensor, Tensor]:
    image, latent = output(pipeline, **changes).args
    return image, latent["samples"]


def encoded(pipeline: Pipeline, prompt: str = "a cat", guidance: float = 3.5) -> Any:
    return EncodePrompt.execute(pipeline, prompt, guidance).args[0]


def picture(rows: int = 48, columns: int = 64) -> Tensor:
    return torch.rand(1, rows, columns, 3, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("node", [Sample, Denoise])
def test_the_names_of_the_combos_are_the_engines_and_stay(node: Any) -> None:
    """They are part of saved workflows."""
    inputs = {socket.id: socket.options for socket in node.define_schema().inputs}
    assert inputs["solver"]["options"] == [*SOLVERS] == ["euler", "deis_2m", "deis_3m", "heun"]
    names = ["DiffSynth (shift 3)", "resolution-aware (BFL)"]
    assert inputs["schedule"]["options"] == [*SCHEDULES] == names


@pytest.fixture
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the latents are looked at."""
    monkeypatch.setattr(DecodeStage, "run", lambda *_: torch.zeros(1, 48, 64, 3))


@pytest.mark.usefixtures("undecoded")
def test_every_option_changes_the_picture(pipeline: Pipeline) -> None:
    image = {"image": picture()}
    half = {**image, "mask": torch.ones(1, 48, 64), "strength": 0.5}
    half["mask"][:, :, :32] = 0
    sigmas = torch.tensor([1.0, 0.4, 0.0])
    again = encoded(pipeline, "a dog")
    pairs: dict[str, tuple[dict, dict]] = {
        "negative_prompt": ({"cfg": 2.0}, {"cfg": 2.0, "negative_prompt": "fog"}),
        "cfg": ({}, {"cfg": 2.0}),
        "solver": ({"steps": 3}, {"steps": 3, "solver": "deis_2m"}),
        "schedule": ({}, {"schedule": [*SCHEDULES][1]}),
        "image": ({"strength": 0.5, "image": 1 - picture()}, {"strength": 0.5, **image}),
        "strength": ({"strength": 0.5, **image}, {"strength": 0.8, **image}),
        "mask": ({"strength": 0.5, **image}, half),
        "positive": ({}, {"positive": again}),
        "negative": ({"cfg": 2.0}, {"cfg": 2.0, "negative": again}),
        "sigmas": ({}, {"sigmas": sigmas}),
        "weights": ({"prompt": "a cat"}, {"prompt": "a (cat:1.5)"}),
    }
    for name, (one, other) in pairs.items():
        difference = sampled(pipeline, **one)[1] - sampled(pipeline, **other)[1]
        assert difference.norm() > 1e-2, name


@pytest.mark.usefixtures("undecoded")
def test_a_solver_and_a_schedule_are_found_by_each_name(pipeline: Pipeline) -> None:
    options = [{"solver": name} for name in SOLVERS]
    options += [{"schedule": name} for name in [*SCHEDULES][1:]]
    found = [sampled(pipeline, steps=4, **option)[1] for option in options]
    for index, one in enumerate(found):
        for other in found[:index]:
            assert not torch.equal(one, other)


@pytest.mark.usefixtures("undecoded")
def test_steps_are_reused_as_the_node_says(pipeline: Pipeline) -> None:
    """And off, which old workflows say nothing of, is all of them computed."""
    expected = sampled(pipeline, steps=6)[1]
    assert torch.equal(sampled(pipeline, steps=6, reuse="off", reused_steps="3")[1], expected)
    assert torch.equal(sampled(pipeline, steps=6, reuse="chosen")[1], expected)
    found = sampled(pipeline, steps=6, reuse="chosen", reused_steps="2, 3 5")[1]
    assert not torch.equal(found, expected)
    given = (pipeline, encoded(pipeline), {"samples": torch.zeros(1, 16, 6, 8)}, 0, 6, 3.5)
    apart = Denoise.execute(*given, reuse="chosen", reused_steps="2 3 5").args[0]["samples"]
    assert torch.equal(apart, found)


@pytest.mark.parametrize("text", ["3 2 12", "3,2;12", "３，２、１２", "\u30003 2 2\t12 3\n"])
def test_chosen_steps_are_read_from_any_keyboard_in_any_order(text: str) -> None:
    assert {*_steps(text)} == {2, 3, 12}


def test_the_report_says_which_steps_were_reused(pipeline: Pipeline, monkeypatch) -> None:
    monkeypatch.setattr(host, "node_text", lambda lines, **_: "\n".join(lines))
    said = output(pipeline, steps=6, reuse="chosen", reused_steps="2 3").ui
    assert "6 steps: 4 computed, 2 reused (2 3); 0.0 GB not moved, " in said


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"reused_steps": "2 x"}, "reused_steps takes numbers of steps, such as 6 8 10, not 'x'."),
        (
            {"reused_steps": "6" * 5000},
            "reused_steps takes numbers of steps, such as 6 8 10, not 'str'.",
        ),
        ({"reused_steps": "-1"}, "reused_steps takes numbers of steps, such as 6 8 10, not '-1'."),
        (
            {"reused_steps": "2"},
            "Step 2 cannot be reused in a run of 2: they are 0 to 1, and 0 is always computed. "
            "Change reused_steps, or set reuse to off.",
        ),
        (
            {"solver": "heun"},
            "Steps cannot be reused with heun, which takes two passes for each. "
            "Choose another solver, or set reuse to off.",
        ),
    ],
)
def test_steps_that_cannot_be_reused_are_refused(pipeline: Pipeline, inputs, said: str) -> None:
    with pytest.raises(MajicFluxError) as refused:
        sampled(pipeline, reuse="chosen", **inputs)
    assert str(refused.value) == said


def test_a_size_from_the_list_is_taken(pipeline: Pipeline, monkeypatch) -> None:
    for size in SIZES:
        width, height = map(int, size.partition(" ")[0].split("x"))
        assert width % 64 == height % 64 == 0
        assert 0.9e6 < width * height < 1.1e6
    monkeypatch.setattr("majicflux.nodes.sample.SIZES", ["48x32 (3:2)"])
    assert sampled(pipeline, size="48x32 (3:2)")[0].shape == (1, 32, 48, 3)


def test_width_and_height_are_not_used_where_a_picture_has_its_own(pipeline: Pipeline) -> None:
    image, latents = sampled(pipeline, image=picture(50, 70), strength=0.5)
    assert image.shape == (1, 48, 64, 3)
    again, _ = sampled(pipeline, latent={"samples": latents}, strength=0.5)
    assert again.shape == (1, 48, 64, 3)


@pytest.mark.parametrize("rows", [48, 50])
def test_outside_the_mask_the_pixels_are_the_pictures_own(pipeline: Pipeline, rows: int) -> None:
    given, mask = picture(rows, 64), torch.zeros(1, rows, 64)
    mask[:, :, 40:] = 1
    mask[:, :, 32:40] = torch.linspace(0, 1, 8)
    kept, _ = sampled(pipeline, image=given, mask=mask, strength=0.8)
    top = (rows - 48) // 2
    own = given[:, top : top + 48]
    assert torch.equal(kept[:, :, :33], own[:, :, :33])
    assert not torch.isclose(kept[:, :, 40:], own[:, :, 40:], atol=1e-3).all()
    options = {"image": given, "mask": mask, "strength": 0.8, "keep_unmasked": False}
    assert not torch.equal(sampled(pipeline, **options)[0][:, :, :33], own[:, :, :33])


def test_the_noise_mask_of_a_latent_counts(pipeline: Pipeline) -> None:
    samples = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, 48, 64)
    mask[..., 32:] = 1
    _, found = sampled(pipeline, latent={"samples": samples, "noise_mask": mask}, strength=0.8)
    assert torch.allclose(found[..., :3], samples[..., :3], atol=1e-5)
    assert (found - samples)[..., 4:].abs().mean() > 0.1


def test_a_prompt_encoded_apart_paints_the_same(pipeline: Pipeline) -> None:
    image, latents = sampled(pipeline)
    conditioning = encoded(pipeline)
    assert torch.equal(sampled(pipeline, prompt="not this", positive=conditioning)[0], image)
    lower = encoded(pipeline, guidance=1.0)
    assert torch.equal(sampled(pipeline, positive=lower)[0], sampled(pipeline, guidance=1.0)[0])
    found = Denoise.execute(
        pipeline, conditioning, {"samples": torch.zeros(1, 4, 6, 8)}, 0, 2, 3.5
    ).args[0]
    assert torch.equal(found["samples"], latents)
    assert torch.allclose(Decode.execute(pipeline, found).args[0], image, atol=1e-5)


def test_denoise_keeps_what_else_a_latent_has(pipeline: Pipeline) -> None:
    latent = {"samples": torch.zeros(2, 16, 6, 8), "batch_index": [4, 1], "other": 1}
    latent["downscale_ratio_spacial"] = 8  # which is of empty ones
    found = Denoise.execute(pipeline, encoded(pipeline), latent, 0, 1, 3.5).args[0]
    assert found["batch_index"] == [4, 1]
    assert found["other"] == 1
    assert "downscale_ratio_spacial" not in found
    assert latent["samples"].any() == False  # noqa: E712


def test_steps_of_denoise_are_taken_and_left_out(pipeline: Pipeline) -> None:
    positive, empty = encoded(pipeline), {"samples": torch.zeros(1, 16, 6, 8)}

    def run(latent: Any, **options: Any) -> Any:
        return Denoise.execute(pipeline, positive, latent, 0, 4, 3.5, **options).args[0]

    whole = run(empty)["samples"]
    half = run(empty, end_at_step=2)
    assert not torch.allclose(half["samples"], whole, atol=1e-2)
    rest = run(half, start_at_step=2, add_noise=False)["samples"]
    assert torch.allclose(rest, whole, atol=1e-4)
    assert not torch.allclose(run(half, start_at_step=2)["samples"], whole, atol=1e-2)


def test_an_image_encoded_apart_is_the_same_beginning(pipeline: Pipeline) -> None:
    latent = EncodeImage.execute(pipeline, picture(50, 64)).args[0]
    one = sampled(pipeline, image=picture(50, 64), strength=0.5)[1]
    assert torch.allclose(sampled(pipeline, latent=latent, strength=0.5)[1], one, atol=1e-5)


def test_a_size_that_a_picture_overrules_is_told(pipeline: Pipeline, monkeypatch) -> None:
    monkeypatch.setattr(host, "node_text", lambda lines, **_: "\n".join(lines))
    said = "The size is that of the image or latent: 64 x 48."
    latent = EncodeImage.execute(pipeline, picture()).args[0]
    for begin in ({"image": picture()}, {"latent": latent}):
        assert said in output(pipeline, **begin, width=32).ui
        assert said in output(pipeline, **begin, size="1024x1024 (1:1)").ui
        assert said not in output(pipeline, **begin).ui


@pytest.mark.parametrize(
    ("asked", "size"),
    [((63, 48), (64, 48)), ((70, 41), (64, 48)), ((72, 40), (80, 48)), ((16, 23), (16, 16))],
)
def test_a_size_is_rounded_to_one_that_flux_paints(
    pipeline: Pipeline, monkeypatch, asked: tuple[int, int], size: tuple[int, int]
) -> None:
    monkeypatch.setattr(host, "node_text", lambda lines, **_: "\n".join(lines))
    done = output(pipeline, width=asked[0], height=asked[1], steps=1)
    said = "The size was rounded from {} x {} to {} x {}: Flux paints multiples of 16."
    assert said.format(*asked, *size) in done.ui
    assert done.args[0].shape == (1, size[1], size[0], 3)
    exact = output(pipeline, width=size[0], height=size[1], steps=1)
    assert torch.equal(done.args[0], exact.args[0])
    assert "rounded" not in exact.ui


def test_only_a_size_that_is_used_is_rounded(pipeline: Pipeline, monkeypatch) -> None:
    monkeypatch.setattr(host, "node_text", lambda lines, **_: "\n".join(lines))
    monkeypatch.setattr("majicflux.nodes.sample.SIZES", ["48x32 (3:2)"])
    assert "rounded" not in output(pipeline, width=63, size="48x32 (3:2)", steps=1).ui
    said = output(pipeline, width=63, image=picture(), steps=1).ui
    assert "The size is that of the image or latent: 64 x 48." in said
    assert "rounded" not in said


def test_the_rounded_size_is_told_in_chinese(pipeline: Pipeline, monkeypatch, caplog) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    with caplog.at_level("INFO", "majicflux"):
        output(pipeline, width=63, steps=1)
    assert "尺寸已从 63 x 48 取整为 64 x 48：Flux 只画 16 的倍数。" in caplog.text


def test_a_new_seed_is_drawn_once_and_told(pipeline: Pipeline, monkeypatch) -> None:
    monkeypatch.setattr(host, "node_text", lambda lines, **values: ("\n".join(lines), values))
    prompt = {"5": {"inputs": {"seed": -1}}}
    nodes = [{"id": n, "widgets_values": ["a cat", -1, "fixed", 20]} for n in (4, 5)]
    extra = {"workflow": {"nodes": nodes}}
    hidden = SimpleNamespace(unique_id="5", extra_pnginfo=extra, prompt=prompt)
    monkeypatch.setattr(Sample, "hidden", hidden)
    first = output(pipeline, seed=-1)
    seed = hidden.extra_pnginfo["majicflux"]["seed"]
    assert prompt["5"]["inputs"]["seed"] == seed >= 0
    assert [node["widgets_values"][1] for node in nodes] == [-1, seed]
    text, values = first.ui
    assert f"seed {seed}" in text
    assert values["seed"] == seed
    assert torch.equal(sampled(pipeline, seed=seed)[0], first.args[0])
    sampled(pipeline, seed=-1)
    assert hidden.extra_pnginfo["majicflux"]["seed"] != seed
    text, values = output(pipeline, seed=5).ui
    assert "seed" not in text, "it is the one that stands there"
    assert values["seed"] == 5


@pytest.mark.parametrize("node", [Sample, Denoise])
def test_a_new_seed_is_never_cached_and_others_are(node: Any) -> None:
    assert node.fingerprint_inputs(seed=-1) != node.fingerprint_inputs(seed=-1)
    assert node.fingerprint_inputs(seed=4) == node.fingerprint_inputs(seed=4)
    assert node.fingerprint_inputs() == node.fingerprint_inputs(), "over a link"


def test_a_seed_by_a_link_is_drawn_again_where_it_was_drawn(
    pipeline: Pipeline, monkeypatch
) -> None:
    monkeypatch.setattr(Sample, "hidden", SimpleNamespace(
        unique_id="5", extra_pnginfo=None, prompt={}))  # fmt: skip

    for seed, again in ((3, False), (-1, True), (-1, True), (3, False)):
        before = Sample.fingerprint_inputs()
        sampled(pipeline, seed=seed, steps=1)
        assert (Sample.fingerprint_inputs() != before) == again


WRONG: dict[str, list[Any]] = {
    "BOOLEAN": ["false", 2, [], math.nan],
    "COMBO": ["no such thing", 5, [], {}],
    "FLOAT": ["abc", math.nan, math.inf, -5, 1e9, [], "1e400"],
    "INT": ["abc", 63.5, math.nan, math.inf, -5, 10**30, [], "9" * 5000, torch.ones(2)],
    "STRING": [[], {}, torch.ones(1)],
}
SOCKETS = [
    pytest.param(node, socket, id=f"{socket.id} of {node.__name__}")
    for node in NODES for socket in node.define_schema().inputs
    # A translator that is not there leaves the prompt as it is.
    if (node, socket.id) != (Translate, "model")
]  # fmt: skip


def right_values(pipeline: Pipeline, node: Any) -> dict[str, Any]:
    """Of all inputs that it needs."""
    links = {
        "MAJICFLUX_PIPELINE": pipeline,
        "MAJICFLUX_DIT": pipeline.dit,
        "CONDITIONING": [[torch.zeros(1, 1, 1), {}]],
        "LATENT": {"samples": torch.zeros(1, 16, 6, 8)},
        "IMAGE": picture(),
    }
    names = {"clip_l": "clip_l.safetensors", "t5": "t5xxl_fp16.safetensors"}

    def right(socket: Any) -> Any:
        default = names.get(socket.id, socket.options.get("default"))
        if default is None and socket.io_type == "COMBO":
            return "x.safetensors"  # no such file is there
        return links.get(socket.io_type, default)

    return {s.id: right(s) for s in node.define_schema().inputs if not s.optional}


@pytest.mark.parametrize(("node", "socket"), SOCKETS)
def test_a_wrong_value_by_a_link_is_refused_by_the_name_of_its_input(
    pipeline: Pipeline, models, monkeypatch, node: Any, socket: Any
) -> None:
    monkeypatch.setattr(host, "models_folder", models)
    values = WRONG.get(socket.io_type, ["abc", 5, SimpleNamespace()])
    for value in [*values, *([] if socket.optional else [None])]:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            node.execute(**{**right_values(pipeline, node), socket.id: value})
        said = str(caught.value)
        in_words = said.lower().startswith(f"{socket.id} ") or "is not in models/" in said
        assert in_words, (value, said)
        assert len(said.splitlines()[0]) < 300 or "9999" in said


def test_numbers_by_a_link_may_have_another_form(pipeline: Pipeline) -> None:
    seed = 2**62 + 1  # which no float holds
    expected = sampled(pipeline, seed=seed, steps=1)[1]
    for number in (str, np.uint64, torch.tensor):
        found = sampled(pipeline, seed=number(seed), steps=1.0, width="64", guidance="3.5")[1]
        assert torch.equal(found, expected)


def test_half_a_character_is_no_reason_to_stop(pipeline: Pipeline) -> None:
    whole, _ = sampled(pipeline, prompt="a ? cat", steps=1)
    assert torch.equal(sampled(pipeline, prompt="a \ud83d cat", steps=1)[0], whole)


def test_nothing_by_a_link_counts_as_nothing(pipeline: Pipeline) -> None:
    nothing = dict.fromkeys(("cfg", "solver", "schedule", "size", "strength", "image", "positive"))
    assert torch.equal(sampled(pipeline, **nothing)[1], sampled(pipeline)[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_refused_by_the_name_of_its_input(
    pipeline: Pipeline, value: float
) -> None:
    def spoiled(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    latent = {"samples": spoiled(torch.ones(1, 16, 6, 8))}
    ((tokens, options),) = encoded(pipeline)
    bad_pooled = {**options, "pooled_output": spoiled(options["pooled_output"])}
    mask = spoiled(torch.ones(1, 48, 64))
    for name, change in {
        "image": {"image": spoiled(picture())},
        "latent": {"latent": latent},
        "mask": {"image": picture(), "mask": mask},
        "positive": {"positive": [[spoiled(tokens), options]]},
        "negative": {"negative": [[tokens, bad_pooled]], "cfg": 2.0},
    }.items():
        with pytest.raises(ValueError, match=f"What came by {name} holds values that are no num"):
            sampled(pipeline, **change)
    with pytest.raises(ValueError, match="guidance in the CONDITIONING of positive must be a num"):
        sampled(pipeline, positive=[[tokens, {**options, "guidance": value}]])
    with pytest.raises(ValueError, match="Noise levels must"):
        sampled(pipeline, sigmas=torch.tensor([1.0, value, 0.0]))
    for node, given in ((Decode, latent), (EncodeImage, spoiled(picture()))):
        with pytest.raises(ValueError, match="no numbers"):
            node.execute(pipeline, given)


@pytest.mark.parametrize(
    ("component", "name", "phase"),
    [
        ("text_encoders", "t5.encoder.final_layer_norm.weight", "text encoders"),
        ("dit", "final_proj_out.bias", "denoising"),
        ("vae", "decoder.conv_out.bias", "VAE decode"),
    ],
)
def test_a_picture_of_nan_is_an_error(make_pipeline, component: str, name: str, phase: str) -> None:
    broken = make_pipeline(dtype=torch.float32)
    weights = dict(getattr(broken, component).weights.module.named_parameters())
    weights[name].data.view(-1)[0] = math.nan
    for _ in range(2):  # what is remembered is no better
        with pytest.raises(ValueError, match=f"The phase '{phase}' gave values that are no"):
            sampled(broken)


def test_guidance_is_disabled_as_told(make_pipeline, monkeypatch) -> None:
    """As ComfyUI's FluxDisableGuidance tells it, where it embeds no guidance at all."""
    pipeline = make_pipeline(dtype=torch.float32)
    ((tokens, options),) = encoded(pipeline)
    disabled = [[tokens, {**options, "guidance": None}]]
    found = sampled(pipeline, positive=disabled)[1]
    assert not torch.allclose(found, sampled(pipeline, positive=[[tokens, options]])[1], atol=1e-3)
    assert not torch.allclose(found, sampled(pipeline, guidance=0.0)[1], atol=1e-3)
    assert torch.equal(sampled(pipeline, positive=disabled, guidance=9.0)[1], found)
    pipeline.dit.last_conditions.forget()
    monkeypatch.setattr(pipeline.dit.weights.module, "guidance_embedder", None)
    assert torch.equal(sampled(pipeline)[1], found)


def test_an_empty_mask_returns_the_original_and_says_so(pipeline: Pipeline, monkeypatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(host, "node_text", lambda lines, **_: shown.append("\n".join(lines)))
    empty, image = torch.zeros(1, 48, 64), picture()
    for keep in (True, False):
        found, latents = sampled(pipeline, image=image, mask=empty, keep_unmasked=keep)
        assert "The mask is empty: nothing was painted" in shown[-1]
        assert "denoising" not in shown[-1]
        clean = EncodeImage.execute(pipeline, image).args[0]["samples"]
        assert torch.allclose(latents, clean, atol=1e-5)
        decoded = Decode.execute(pipeline, {"samples": clean}).args[0]
        assert torch.allclose(found, image if keep else decoded, atol=1e-5)
    samples = torch.randn(2, 16, 6, 8, generator=torch.Generator().manual_seed(2))
    latent = {"samples": samples, "noise_mask": empty, "batch_index": [3, 4]}
    found = Denoise.execute(pipeline, encoded(pipeline), latent, 7, 4, 3.5).args[0]["samples"]
    assert torch.allclose(found, samples, atol=1e-5)
    assert "The mask is empty" in shown[-1]
    sampled(pipeline, image=image, mask=empty + 0.1)
    assert "The mask is empty" not in shown[-1]


def test_a_run_whose_mask_is_empty_and_that_stops_early_keeps_its_noise(pipeline: Pipeline) -> None:
    """The same as where next to nothing may change."""
    samples = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(2))

    def run(mask: Tensor) -> Tensor:
        latent = {"samples": samples, "noise_mask": mask}
        positive = encoded(pipeline)
        return Denoise.execute(pipeline, positive, latent, 7, 4, 3.5, end_at_step=2).args[0][
            "samples"
        ]

    empty = torch.zeros(1, 6, 8)
    almost = empty.clone()
    almost[:, 0, 0] = 1
    assert torch.allclose(run(empty)[..., 2:], run(almost)[..., 2:], atol=1e-5)


def conditioning(tokens: Any = (1, 5, 8), pooled: Any = (1, 4), **options: Any) -> Any:
    if pooled is not None:
        options["pooled_output"] = torch.zeros(pooled)
    return [[torch.zeros(tokens), options]]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "0 entries"),
        (conditioning() * 2, "2 entries"),
        (conditioning(area=(1, 2, 3, 4)), "carries area.* Remove the node that adds it, or sample"),
        (
            conditioning(control=object(), control_apply_to_uncond=True),
            "carries control, control_apply_to_uncond, .* connect the Majic node ControlNet",
        ),
        (conditioning(hooks=object(), start_percent=0.1), "carries hooks, start_percent"),
        (conditioning(tokens=(1, 5, 7)), r"tokens of shape \(1, 5, 7\)"),
        (conditioning(tokens=(2, 5, 8)), "tokens of shape"),
        (conditioning(pooled=(1, 5)), r"pooled vector of shape \(1, 5\)"),
        ([torch.zeros(1, 5, 8)], "not one that ComfyUI's nodes make"),
        ([[torch.zeros(1, 5, 8), None]], "not one that ComfyUI's nodes make"),
        ([["a cat", {}]], "not one that ComfyUI's nodes make"),
    ],
)
def test_conditioning_is_honoured_or_refused(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        native.from_conditioning("positive", given, GEOMETRY)


def test_each_node_keeps_the_report_of_its_part_and_no_picture(
    pipeline: Pipeline, monkeypatch
) -> None:
    def run(words: str) -> list[Any]:
        prompt = EncodePrompt.execute(pipeline, f"{words} apart", 3.5)
        latent = EncodeImage.execute(pipeline, picture())
        found = Denoise.execute(pipeline, prompt.args[0], latent.args[0], 0, 1, 3.5)
        decoded = Decode.execute(pipeline, found.args[0])
        return [prompt, latent, found, decoded, output(pipeline, prompt=words, steps=1)]

    assert {done.ui for done in run("a dog")} == {None}, "there is no canvas"
    monkeypatch.setattr(
        host, "node_text", lambda lines, **values: {"text": "\n".join(lines), **values}
    )
    sample = ["text encoders", "denoising", "VAE decode"]
    parts = [sample[:1], ["VAE encode"], sample[1:2], sample[2:], sample]
    for done, phases in zip(run("a bird"), parts, strict=True):
        seeds = {"seed"} if "denoising" in phases else set()
        assert done.ui.keys() == {"text", "phases", "budget_bytes", "peak_bytes"} | seeds
        assert [phase["name"] for phase in done.ui["phases"]] == phases
        assert all(f"{phase} " in done.ui["text"] for phase in phases)


def test_conditioning_without_a_pooled_vector_has_zeros() -> None:
    found = native.from_conditioning("positive", conditioning(pooled=None), GEOMETRY)
    assert torch.equal(found.pooled, torch.zeros(1, 4))
    assert found.guidance is None


def test_what_is_encoded_comes_back() -> None:
    embedding = TextEmbedding(torch.rand(1, 5, 8), torch.rand(1, 4))
    found = native.from_conditioning("positive", native.to_conditioning(embedding, 2.5), GEOMETRY)
    assert torch.equal(found.tokens, embedding.tokens)
    assert torch.equal(found.pooled, embedding.pooled)
    assert found.guidance == 2.5


@pytest.mark.parametrize("shape", [(48, 64, 3), (1, 48, 64, 1), (0, 48, 64, 3), (1, 0, 64, 3)])
def test_what_is_no_picture_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="IMAGE has the shape"):
        native.from_image(torch.ones(shape))


def test_a_picture_smaller_than_any_that_flux_paints_is_refused(pipeline: Pipeline) -> None:
    for sides in ((1, 1), (64, 8), (15, 15)):
        with pytest.raises(ValueError, match="is not a multiple of 16; the nearest"):
            EncodeImage.execute(pipeline, torch.ones(1, *sides, 3))


@pytest.mark.parametrize("shape", [(48,), (0, 48, 64)])
def test_what_is_no_mask_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="MASK has the shape"):
        native.from_mask(torch.ones(shape), None)


def test_a_mask_of_another_size_loses_the_edges_that_its_image_loses() -> None:
    """It is scaled to the whole image, as ComfyUI's InpaintModelConditioning does."""
    image, mask = picture(70, 86), torch.rand(2, 35, 31)
    whole = torch.nn.functional.interpolate(mask[:, None], (70, 86), mode="bilinear")[:, 0]
    assert torch.equal(native.from_mask(mask, image), whole[:, 3:67, 3:83])
    assert torch.equal(native.from_mask(whole, image), whole[:, 3:67, 3:83])
    assert torch.equal(native.from_mask(mask, picture(64, 80)), mask), "nothing is lost"


@pytest.mark.parametrize("shape", [(1, 4, 6, 8), (1, 16, 1, 6, 8), (16, 6, 8), (0, 16, 6, 8)])
def test_latents_of_another_model_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"LATENT has the shape"):
        native.from_latent({"samples": torch.ones(shape)})


def test_an_empty_latent_of_another_model_is_empty() -> None:
    wide = {"samples": torch.zeros(1, 64, 3, 4), "downscale_ratio_spacial": 16}
    assert native.from_latent(wide).shape == (1, 16, 6, 8), "the same pixels"
    found = native.from_latent({"samples": torch.zeros(2, 4, 6, 8)})
    assert torch.equal(found, torch.zeros(2, 16, 6, 8))


def test_a_negative_conditioning_that_is_not_used_is_not_judged(pipeline: Pipeline) -> None:
    two = encoded(pipeline) * 2
    assert torch.equal(sampled(pipeline, negative=two)[1], sampled(pipeline)[1])
    with pytest.raises(ValueError, match="CONDITIONING of negative has 2 entries"):
        sampled(pipeline, negative=two, cfg=2.0)


def test_denoise_with_cfg_asks_for_a_negative_prompt(pipeline: Pipeline) -> None:
    latent = {"samples": torch.zeros(1, 16, 6, 8)}
    with pytest.raises(ValueError, match="connect negative"):
        Denoise.execute(pipeline, encoded(pipeline), latent, 0, 2, 3.5, cfg=2.0)


def test_a_pipeline_without_encoders_and_vae_does_what_needs_none(pipeline: Pipeline) -> None:
    positive, empty = encoded(pipeline), {"samples": torch.zeros(1, 16, 6, 8)}
    bare = PipelineNode.execute(pipeline.dit, compute_precision="float32").args[0]
    given = (positive, empty, 0, 2, 3.5)
    expected = Denoise.execute(pipeline, *given).args[0]["samples"]
    assert torch.equal(Denoise.execute(bare, *given).args[0]["samples"], expected)
    assert [stage.name for stage in bare.plan(Workload(64, 48)).stages] == ["denoise"]

    unread = replace(pipeline, text_encoders=None)
    assert torch.equal(sampled(unread, positive=positive)[0], sampled(pipeline)[0])
    for node, lacks in (
        (lambda: sampled(unread), "no text encoders"),
        (lambda: EncodePrompt.execute(bare, "a cat", 3.5), "no text encoders"),
        (lambda: sampled(bare, positive=positive), "no VAE"),
        (lambda: Decode.execute(bare, empty), "no VAE"),
        (lambda: EncodeImage.execute(bare, picture()), "no VAE"),
    ):
        with pytest.raises(ValueError, match=rf"The pipeline has {lacks}\. Connect"):
            node()
