"""The node that puts a LoRA beside a transformer, on the demo models."""

import gc
import json
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RecordingPatcher
from safetensors.torch import save_file
from thin_weights import narrow_vae

from file_layouts import Tensors
from lora_dialects import (
    DOWN_UP,
    LAYERS,
    PROJ,
    QKV,
    H,
    control_lora,
    of_clip,
    random_of,
    written,
)
from majicflux.cli import main
from majicflux.engine.flux.vae import VAE
from majicflux.engine.kernels import dispatch
from majicflux.engine.run.pipeline import Pipeline, encode_prompts, paint
from majicflux.engine.run.request import GenerationRequest
from majicflux.host import current, standalone
from majicflux.host.canvas import to_graph
from majicflux.lab.doctor import diagnosis
from majicflux.loaders import lora as loader
from majicflux.loaders.safetensors_file import ModelFileError
from majicflux.messages import MajicFluxError
from majicflux.nodes import lora as node
from majicflux.nodes import model_files
from majicflux.nodes.dit_loader import DiTLoader
from majicflux.nodes.lora import LoRA
from majicflux.nodes.pipeline import PipelineNode
from majicflux.nodes.sample import Sample
from majicflux.nodes.text_encoders import TextEncodersNode

API = Path(__file__).parents[2] / "workflows" / "api" / "text_to_image.json"
Put = Callable[..., str]
SMALL = 1 / 32  # so that what is added is of the size of the weights


def kohya(layers: list[str], seed: int = 0, prefix: str = "lora_unet_") -> Tensors:
    given = {
        name: (random_of(4, LAYERS[name][1], seed=seed + 1) * SMALL,
               random_of(LAYERS[name][0], 4, seed=seed + 2), 4.0)
        for name in layers
    }  # fmt: skip
    return written(given, prefix, DOWN_UP, underscores=True)


def dora(layers: list[str]) -> Tensors:
    tensors = kohya(layers)
    for name in layers:
        magnitude = 1 + random_of(LAYERS[name][0], 1).abs()
        tensors[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = magnitude
    return tensors


@pytest.fixture(autouse=True)
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models/loras, beside the other demo models."""
    loras = tmp_path / "models" / "loras"
    loras.mkdir(parents=True)
    for other in ("diffusion_models", "text_encoders", "vae"):
        (loras.parent / other).symlink_to(models / other)
    monkeypatch.setattr(standalone, "models_folder", loras.parent)
    monkeypatch.setattr(node, "_kept", weakref.WeakKeyDictionary())
    return loras


@pytest.fixture
def put(folder: Path) -> Put:
    def save(tensors: Tensors, name: str = "style.safetensors") -> str:
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / name)
        return name

    return save


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What nodes show."""
    lines: list[str] = []
    monkeypatch.setattr(current, "node_text", lambda texts, **_: lines.extend(texts))
    return lines


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose factors were read."""
    found: list[Path] = []
    plain = loader.load_lora

    def counted(path: Path, *given: Any, **named: Any) -> Any:
        found.append(path)
        return plain(path, *given, **named)

    monkeypatch.setattr(node, "load_lora", counted)
    return found


@pytest.fixture(scope="module")
def weights(models: Path) -> Iterator[Any]:
    """The transformer and the encoders of the demo models, and a VAE that takes less time."""
    vae = narrow_vae(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standalone, "models_folder", models)
        yield (
            DiTLoader.execute("majicflus_v134.safetensors", "bfloat16", False).args[0],
            TextEncodersNode.execute("clip_l.safetensors", "t5xxl_fp16.safetensors", "float32",
                                     False).args[0],
            VAE(vae, RecordingPatcher(vae), torch.float32),
        )  # fmt: skip


def latents(dit: Any, weights: Any, **inputs: Any) -> torch.Tensor:
    """What a pipeline of it paints."""
    given = {"text_encoders": weights[1], "vae": weights[2], **inputs}
    pipeline: Pipeline = PipelineNode.execute(
        dit=dit, vram_budget_gb=0.0, compute_precision="float32", **given
    ).args[0]
    request = GenerationRequest("a cat", guidance=3.5, width=64, height=64, steps=2, seed=1)
    return paint(pipeline, request, lambda _: None, lambda: None)[1]


def added(dit: Any, file: str, strength: float, encoders: Any = None) -> Any:
    return LoRA.execute(dit, file, strength, encoders).args[0]


def test_strength_0_gives_the_handles_themselves(weights, put: Put) -> None:
    tensors = kohya([QKV]) | of_clip("lora_te1_text_model_")
    dit, encoders = LoRA.execute(weights[0], put(tensors), 0.0, weights[1]).args
    assert dit is weights[0]
    assert encoders is weights[1]


def test_a_picture_changes_with_it_and_not_the_handle_that_it_stands_beside(weights, put) -> None:
    before = latents(weights[0], weights)
    dit = added(weights[0], put(kohya([QKV, PROJ])), 1.0)
    changed = latents(dit, weights)
    assert dit.weights is weights[0].weights
    assert not torch.equal(changed, before)
    assert torch.equal(latents(weights[0], weights), before)
    opposite = latents(added(weights[0], "style.safetensors", -1.0), weights)
    assert not torch.equal(opposite, changed)
    assert not torch.equal(opposite, before)


def test_its_kernels_are_tried_while_it_is_read(put: Put, monkeypatch) -> None:
    """A LoRA added to a transformer that is there: nothing else is waited for."""
    wanted = []
    monkeypatch.setattr(dispatch, "try_ahead", lambda _, beside=(): wanted.append({*beside}))
    for precision, dtypes in (
        ("bfloat16", set()),
        ("float8_e4m3fn", {torch.float8_e4m3fn}),
        ("int8 rotated", {torch.int8}),
    ):
        dit = DiTLoader.execute("majicflus_v134.safetensors", precision, False).args[0]
        wanted.clear()
        added(dit, put(kohya([QKV])), 1.0)
        assert wanted[0] == dtypes


def test_two_of_them_are_the_sum_whatever_their_order(weights, put: Put) -> None:
    one = put(kohya([QKV, PROJ]), "one.safetensors")
    other = put(kohya([QKV], seed=7), "other.safetensors")
    chained = added(added(weights[0], one, 1.0), other, 0.5)
    assert [strength for _, strength in chained.adapters] == [1.0, 0.5]
    turned = added(added(weights[0], other, 0.5), one, 1.0)
    twice = added(added(weights[0], one, 0.5), one, 0.5)
    torch.testing.assert_close(latents(chained, weights), latents(turned, weights))
    alone = latents(added(weights[0], one, 1.0), weights)
    torch.testing.assert_close(latents(twice, weights), alone, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(latents(chained, weights), alone)


@pytest.mark.parametrize("strength", [-4.01, 4.01, float("nan"), "much"])
def test_a_strength_that_the_schema_does_not_allow(weights, put: Put, strength: Any) -> None:
    file = put(kohya([QKV]))
    with pytest.raises(MajicFluxError, match=r"^strength must be (-4.0 to 4.0|a number), not "):
        LoRA.execute(weights[0], file, strength)


def test_the_canvas_keeps_a_strength_of_an_eighth() -> None:
    """It rounds to `round`, or to the digits of `step` where there is none."""
    (strength,) = (i for i in LoRA.define_schema().inputs if i.id == "strength")
    options = strength.as_dict()
    digits = options.get("round") or 10 ** math.floor(math.log10(options["step"]))
    assert round(0.125 / digits) * digits == pytest.approx(0.125)


def test_the_part_for_clip(weights, put: Put, said: list[str]) -> None:
    """It changes the pooled vector, and only of the handle that has it."""
    encoders = weights[1]
    file = put(kohya([QKV]) | of_clip("lora_te1_text_model_"))
    _, with_it = LoRA.execute(weights[0], file, 1.0, encoders).args
    assert "of CLIP-L: 4" in said[0]
    assert not any("not used" in line for line in said)
    vae = weights[2]

    def encoded(text_encoders: Any) -> Any:
        pipeline = PipelineNode.execute(
            dit=weights[0], text_encoders=text_encoders, vae=vae, vram_budget_gb=0.0,
            compute_precision="float32",
        ).args[0]  # fmt: skip
        return encode_prompts(pipeline, ["a dog"], lambda: None)[0][0]

    changed, plain = encoded(with_it), encoded(encoders)
    assert torch.equal(changed.tokens, plain.tokens)
    assert not torch.equal(changed.pooled, plain.pooled)
    encoders.forget()
    assert torch.equal(encoded(encoders).pooled, plain.pooled)


def test_encoders_go_through_a_file_without_a_part_for_them(weights, put: Put) -> None:
    assert LoRA.execute(weights[0], put(kohya([QKV])), 1.0, weights[1]).args[1] is weights[1]


def test_a_part_for_clip_that_nothing_is_linked_for_is_told(weights, put, said) -> None:
    width = 768  # of the real one
    given = {"encoder.layers.0.mlp.fc1": (random_of(2, width), random_of(4 * width, 2), 1.0)}
    of_text = written(given, "lora_te1_text_model_", DOWN_UP, underscores=True)
    dit, encoders = LoRA.execute(weights[0], put(kohya([QKV]) | of_text), 0.8).args
    assert len(dit.adapters) == 1
    assert encoders is None
    assert said[-2:] == [
        "strength 0.8",
        "The part for CLIP-L is not used: connect text_encoders.",
    ]


def test_a_file_is_read_once_for_all_nodes_and_strengths(weights, put, reads: list[Path]) -> None:
    file = put(kohya([QKV]))
    held = added(weights[0], file, 1.0)
    assert added(weights[0], file, 1.0).adapters[0][0] is held.adapters[0][0]
    del held
    gc.collect()
    for strength in (0.5, 0.0, -1.0):  # as ComfyUI, which first drops what the node gave
        LoRA.execute(weights[0], file, strength)
    other = DiTLoader.execute("majicflus_v134.safetensors", "float8_e4m3fn", False).args[0]
    assert added(other, file, 1.0).adapters[0][0] is added(weights[0], file, 1.0).adapters[0][0]
    assert len(reads) == 1
    put(kohya([QKV, PROJ]))
    assert len(added(weights[0], file, 1.0).adapters[0][0].terms) == 2
    assert len(reads) == 2


def test_what_is_kept_goes_with_the_transformer_and_has_a_limit(put, reads, monkeypatch) -> None:
    dit = DiTLoader.execute("majicflus_v134.safetensors", "float8_e4m3fn", False).args[0]
    files = [put(kohya([QKV], seed=n), f"{n}.safetensors") for n in range(3)]
    adapters = [weakref.ref(added(dit, file, 1.0).adapters[0][0]) for file in files]
    gc.collect()
    assert all(adapter() for adapter in adapters)
    monkeypatch.setattr(node, "KEPT_BYTES", adapters[0]().nbytes * 2)
    new = put(kohya([QKV], seed=9), "9.safetensors")
    added(dit, new, 1.0)
    gc.collect()
    assert [adapter() is None for adapter in adapters] == [True, True, False]
    monkeypatch.setattr(node, "KEPT_BYTES", 1)
    added(dit, put(kohya([QKV], seed=10), "10.safetensors"), 1.0)
    added(dit, "10.safetensors", 0.5)
    assert len(reads) == 5, "the last one is kept, however large it is"
    del dit
    gc.collect()
    assert adapters[2]() is None


def test_dora(weights, put: Put, reads: list[Path]) -> None:
    """Its norms are found once for each transformer, and belong to its weights."""
    file = put(dora([PROJ]))
    dit = added(weights[0], file, 1.0)
    (adapter, _), (layer,) = dit.adapters[0], dit.adapters[0][0].magnitudes
    weight = weights[0].weights.module.get_submodule(layer).weight
    whole = weight.float()
    for term in adapter.terms[layer]:
        whole = whole + term.scale * term.up.float() @ term.down.float()
    expected = adapter.magnitudes[layer] / whole.norm(dim=1)
    torch.testing.assert_close(adapter.gains[layer], expected, rtol=1e-4, atol=1e-5)
    assert added(weights[0], file, 0.5).adapters[0][0] is adapter
    other = DiTLoader.execute("majicflus_v134.safetensors", "int8 rotated", False).args[0]
    gains = added(other, file, 1.0).adapters[0][0].gains[layer]
    assert not torch.equal(gains, adapter.gains[layer])
    torch.testing.assert_close(gains, expected, rtol=1e-2, atol=1e-3)
    assert len(reads) == 1
    assert not torch.equal(latents(dit, weights), latents(weights[0], weights))


def test_a_control_lora(weights, put: Put, said: list[str]) -> None:
    """The handle takes a picture, the one that it stands beside does not."""
    file, style = put(control_lora()), put(kohya([QKV, "img_in"]), "other.safetensors")
    dit = added(weights[0], file, 0.5)
    assert (
        said[-1] == "A control LoRA: connect a depth map or edges to reference of the sample node."
    )
    assert dit.geometry.takes_picture
    assert not weights[0].geometry.takes_picture
    assert added(weights[0], file, 0.0) is weights[0]
    chained = added(dit, style, 1.0)
    assert chained.geometry.takes_picture
    assert chained.adapters[1][0] is added(weights[0], style, 1.0).adapters[0][0]
    with pytest.raises(MajicFluxError, match="is a control LoRA, which cannot be baked"):
        LoRA.execute(weights[0], file, 1.0, keep=True)
    baked = LoRA.execute(dit, style, 1.0, keep=True).args[0]
    assert baked.geometry.takes_picture
    assert not baked.without_adapters.geometry.takes_picture


def whole_weight() -> Tensors:
    return {f"diffusion_model.{PROJ}.diff": random_of(H, H)}


def cut(folder: Path) -> None:
    path = folder / "style.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


WRONG = {
    "SDXL": ({"lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k.lora_down.weight":
              random_of(4, 2048)}, "is a LoRA for SDXL, not a LoRA for Flux.1"),
    "nothing": ({"strange": random_of(1)}, "is not a LoRA for Flux.1"),
    "of CLIP-L a full weight": (
        {"lora_te1_text_model_encoder_layers_0_mlp_fc1.diff": random_of(3072, 768)},
        r"changes CLIP-L alone, in a way that MajicFlux cannot use \(of full rank\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("tensors_and_text", WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_before_the_queue_and_in_it(weights, put, tensors_and_text) -> None:
    tensors, text = tensors_and_text
    file = put(tensors)
    refusal = LoRA.validate_inputs(file)
    assert isinstance(refusal, str)
    with pytest.raises(ModelFileError, match=text) as caught:
        LoRA.execute(weights[0], file, 1.0)
    assert str(caught.value) == refusal


def test_wrong_files_of_which_only_the_model_or_the_values_tell(weights, put, folder) -> None:
    layer = f"diffusion_model.{PROJ}"
    wide = {f"{layer}.lora_A.weight": random_of(4, 512), f"{layer}.lora_B.weight": random_of(H, 4)}
    file = put(wide)
    assert LoRA.validate_inputs(file) is True
    with pytest.raises(ModelFileError, match="does not fit this model"):
        LoRA.execute(weights[0], file, 1.0)
    tensors = kohya([PROJ])
    tensors[next(n for n in tensors if n.endswith("down.weight"))][0, 0] = float("nan")
    put(tensors)
    with pytest.raises(ModelFileError, match="damaged"):
        LoRA.execute(weights[0], file, 1.0)
    put(kohya([PROJ]))
    cut(folder)
    assert "is cut off" in str(LoRA.validate_inputs(file))
    refusal = str(LoRA.validate_inputs("gone.safetensors"))
    assert "gone.safetensors is not in models/loras" in refusal
    assert LoRA.validate_inputs(None) is True, "it comes over a link"


def parameters(dit: Any) -> Tensors:
    return {name: p.detach() for name, p in dit.weights.module.named_parameters()}


def same_bits(one: Any, other: Any) -> bool:
    theirs = parameters(other)
    return all(
        torch.equal(p.view(torch.uint8), theirs[n].view(torch.uint8))
        for n, p in parameters(one).items()
    )


def kept(dit: Any, file: str, strength: float, encoders: Any = None) -> Any:
    return LoRA.execute(dit, file, strength, encoders, keep=True).args[0]


def test_a_file_that_needs_it_is_baked_as_a_whole_and_tells_it(weights, put, said) -> None:
    file = put(kohya([QKV]) | whole_weight())
    dit = added(weights[0], file, 0.5)
    assert not dit.adapters
    assert "layers that need baking in (of full rank): 1" in said[0]
    assert said[1:3] == ["strength 0.5", "baked in, layers: 2"]
    assert "style.safetensors @ 0.5: Flux.1 transformer" in said[3]
    assert same_bits(dit, kept(weights[0], file, 0.5))
    assert not same_bits(dit, weights[0])
    assert LoRA.validate_inputs(file) is True
    assert added(weights[0], file, 0.0) is weights[0]


def test_baked_and_beside_are_the_same_picture(weights, put, said: list[str]) -> None:
    """But for what bfloat16 rounds of the sum."""
    file = put(kohya([QKV, PROJ]))
    said.clear()
    baked = kept(weights[0], file, 0.7)
    assert said[1:3] == ["strength 0.7", "baked in, layers: 2"]
    beside, plain = latents(added(weights[0], file, 0.7), weights), latents(weights[0], weights)
    found = latents(baked, weights)
    assert (found - beside).norm() < 0.05 * (plain - beside).norm()
    assert torch.equal(latents(weights[0], weights), plain), "handles do not touch each other"


def test_dora_is_the_same_baked_and_beside(weights, put: Put) -> None:
    file = put(dora([PROJ]))
    beside, plain = latents(added(weights[0], file, 0.7), weights), latents(weights[0], weights)
    found = latents(kept(weights[0], file, 0.7), weights)
    assert (found - beside).norm() < 0.05 * (plain - beside).norm()


def test_a_baked_model_is_planned_as_a_plain_one(weights, put: Put) -> None:
    put(kohya([QKV, PROJ]) | whole_weight())
    for precision in ("bfloat16", "float8_e4m3fn", "int8 rotated"):
        dit = DiTLoader.execute("majicflus_v134.safetensors", precision, False).args[0]
        plans = []
        for handle in (dit, kept(dit, "style.safetensors", 1.0)):
            pipeline = PipelineNode.execute(
                dit=handle, text_encoders=weights[1], vae=weights[2], vram_budget_gb=0.0
            ).args[0]
            request = GenerationRequest("a cat", 1, 2, 3.5, width=64, height=64)
            plans.append(pipeline.plan(request.workload).as_dict())
        assert plans[0] == plans[1]


def test_chains_of_baked_ones_and_those_beside(weights, put: Put, reads: list[Path]) -> None:
    """Whatever their order; who is beside a model stays beside what it becomes."""
    one = put(kohya([QKV, PROJ]), "one.safetensors")
    two = put(whole_weight(), "two.safetensors")
    three = put(dora([PROJ]), "three.safetensors")
    first = kept(kept(weights[0], one, 1.0), two, 0.5)
    assert [(p.name, s) for p, s in first.origin.baked] == [(one, 1.0), (two, 0.5)]
    last = added(first, three, 0.7)
    between = kept(added(kept(weights[0], one, 1.0), three, 0.7), two, 0.5)
    assert last.weights is between.weights is first.weights
    assert torch.equal(latents(between, weights), latents(last, weights)), "DoRA's gains too"
    assert not torch.equal(latents(first, weights), latents(last, weights))


def test_the_same_chain_is_loaded_once_while_somebody_has_it(weights, put: Put) -> None:
    file, other = put(whole_weight()), put(kohya([QKV]), "other.safetensors")
    held = kept(added(weights[0], other, 1.0), file, 1.0)
    gc.collect()
    assert kept(weights[0], file, 1.0).weights is held.weights
    assert kept(weights[0], file, 0.5).weights is not held.weights
    alive = weakref.ref(held.weights)
    del held
    gc.collect()
    assert alive() is None
    put(kohya([PROJ]))
    assert same_bits(kept(weights[0], file, 1.0), kept(weights[0], file, 1.0))


def test_the_part_for_clip_of_a_baked_file_stays_beside(weights, put: Put) -> None:
    file = put(whole_weight() | of_clip("lora_te1_text_model_"))
    dit, encoders = LoRA.execute(weights[0], file, 0.5, weights[1]).args
    ((adapter, strength),) = encoders.adapters
    assert (len(adapter.text_encoder), strength) == (4, 0.5)
    assert not adapter.reaches_transformer
    assert not dit.adapters


def test_a_part_for_clip_that_terms_cannot_express_is_told(weights, put, said) -> None:
    put(kohya([QKV]) | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.diff": random_of(3072, 768)})
    assert len(added(weights[0], "style.safetensors", 1.0).adapters) == 1, "not baked for that"
    assert "tensors not used (of full rank): 1, as lora_te1_text_model_encoder" in said[0]


def test_it_changes_for_the_host_with_the_file_alone(put: Put) -> None:
    """ComfyUI asks with all inputs, None for those over links."""
    inputs = {"dit": None, "file": put(kohya([QKV])), "text_encoders": None}
    first = LoRA.fingerprint_inputs(**inputs, strength=1.0)
    assert first == LoRA.fingerprint_inputs(**inputs, strength=0.5)
    put(kohya([QKV, PROJ]))
    assert first != LoRA.fingerprint_inputs(**inputs, strength=1.0)
    assert LoRA.fingerprint_inputs(None) is None


def test_the_choices_are_the_files_of_the_folder(put: Put, folder: Path) -> None:
    put(kohya([QKV]), "b.safetensors")
    put(kohya([QKV]), "a.safetensors")
    (folder / "._a.safetensors").write_bytes(b"\x00")
    (file,) = (i for i in LoRA.define_schema().inputs if i.id == "file")
    assert (file.options["options"], file.options["default"]) == (
        ["a.safetensors", "b.safetensors"],
        "a.safetensors",
    )


def test_one_lora_beside_several_precisions(weights, put: Put, reads: list[Path]) -> None:
    """As in the template compare_precisions with the node behind each loader."""
    file = put(kohya([QKV, PROJ]))
    exact = latents(added(weights[0], file, 1.0), weights)
    plain = latents(weights[0], weights)
    for precision in ("float8_e4m3fn", "int8 rotated"):
        dit = DiTLoader.execute("majicflus_v134.safetensors", precision, False).args[0]
        found = latents(added(dit, file, 1.0), weights)
        assert (found - exact).norm() < (found - plain).norm()
    assert len(reads) == 1


def with_lora(**inputs: Any) -> dict[str, Any]:
    graph = json.loads(API.read_text(encoding="utf-8"))
    graph["5"]["inputs"].update(width=64, height=48, steps=1, seed=1)
    graph["9"] = {"class_type": "MajicFluxLoRA", "inputs": {
        "dit": ["1", 0], "file": "style.safetensors", "strength": 1.0, **inputs}}  # fmt: skip
    graph["4"]["inputs"]["dit"] = ["9", 0]
    return graph


def test_a_graph_with_it_runs_without_a_server(folder, tmp_path, put: Put, capsys) -> None:
    put(kohya([QKV, PROJ]))
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(with_lora()), encoding="utf-8")
    pictures = []
    for strength in ("1", "0"):
        out = tmp_path / strength
        given = ["run", str(path), "--models", str(folder.parent), "--output", str(out)]
        assert not main([*given, "--set", f"9.strength={strength}"])
        (picture,) = out.rglob("*.png")
        pictures.append(picture.read_bytes())
    assert pictures[0] != pictures[1]


def test_a_graph_that_bakes_runs_without_a_server(folder, tmp_path, put: Put, capsys) -> None:
    put(kohya([QKV, PROJ]) | whole_weight())
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(with_lora(keep=True)), encoding="utf-8")
    given = ["run", str(path), "--models", str(folder.parent), "--output", str(tmp_path / "out")]
    for _ in range(2):
        assert not main([*given, "--set", "9.strength=0.5"])
    assert len([*(tmp_path / "out").rglob("*.png")]) == 2
    names = [path.name for path in (folder.parent / "majicflux_prepared").iterdir()]
    assert sum("+style@0.5-" in name for name in names) == 1


def test_a_workflow_that_was_saved_before_there_was_keep() -> None:
    canvas = json.loads((API.parents[1] / "text_to_image_lora.json").read_text(encoding="utf-8"))
    (saved,) = (node for node in canvas["nodes"] if node["type"] == "MajicFluxLoRA")
    file, strength, keep = saved["widgets_values"]
    saved["widgets_values"] = [file, strength]
    saved["inputs"] = [i for i in saved["inputs"] if i["name"] != "keep"]
    schemas = {saved["type"]: LoRA.define_schema()}
    found = to_graph({"nodes": [saved], "links": canvas["links"]}, schemas)
    given = found[str(saved["id"])]["inputs"]
    assert (given["file"], given["strength"], keep) == (file, strength, False)
    assert "keep" not in given


def test_the_doctor_tells_the_files_of_the_folder(put: Put) -> None:
    put(kohya([QKV]))
    put(WRONG["SDXL"][0], "sdxl.safetensors")
    put({"strange": random_of(1)}, "strange.safetensors")
    found = diagnosis().partition("- loras:\n")[2].splitlines()[:3]
    assert found == [
        "  - a LoRA for SDXL: sdxl.safetensors",
        "  - nothing that MajicFlux knows: strange.safetensors",
        "  - a LoRA for Flux.1: style.safetensors",
    ]


def test_a_prompt_that_would_add_one_elsewhere_is_told(weights, said: list[str]) -> None:
    pipeline = PipelineNode.execute(
        dit=weights[0], text_encoders=weights[1], vae=weights[2], vram_budget_gb=0.0,
        compute_precision="float32",
    ).args[0]  # fmt: skip
    said.clear()
    prompt = "a cat <lora:my style:0.8>, (<lora:b:1:0.5>:1.2) <LoRA:c> <lora:my style:1>"
    Sample.execute(pipeline, prompt, 0, 1, 3.5, 64, 64, 1)
    assert said[0].startswith(
        "<lora:my style>, <lora:b>, <lora:c> in the prompt was read as words, as ComfyUI"
    )
    said.clear()
    Sample.execute(pipeline, "a <cat> lora: 1", 0, 1, 3.5, 64, 64, 1)
    assert not any("LoRA" in line for line in said)


def test_a_lora_of_no_node_is_kept_nowhere(weights, put: Put) -> None:
    """Of what is shared between nodes, nobody is the owner."""
    added(weights[0], put(kohya([QKV])), 1.0)
    assert len(node._kept) == 1
    node._kept.clear()
    gc.collect()
    assert not [h for h in model_files._in_use.values() if hasattr(h, "magnitudes")]
