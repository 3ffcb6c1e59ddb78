"""What a real server is given: values over links, wrong ones, files that break."""

import copy
import json
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from text_to_image import ALL_NODES, pixels, seeded, small

from comfyui_server import Refused, Server


@pytest.fixture
def graph() -> dict:
    return small()


def refusal(server: Server, graph: dict) -> dict[str, list[str]]:
    with pytest.raises(Refused) as caught:
        server.run(graph)
    return caught.value.errors


@pytest.mark.parametrize(
    ("node", "name", "value", "said"),
    [
        ("1", "file", "gone.safetensors", "gone.safetensors is not in models/diffusion_models"),
        ("1", "file", "lora.safetensors", "is a LoRA, not a Flux.1 transformer"),
        ("1", "file", "short.safetensors", "is cut off"),
        ("2", "t5", "clip_l.safetensors", "is a CLIP text encoder, not a T5 text encoder"),
        ("2", "t5", "text_encoder_2", "lacks model-00002-of-00002.safetensors"),
        ("3", "file", "../text_encoders/clip_l.safetensors", "is not in models/vae"),
        ("5", "width", 15, "smaller than min of 16"),
        ("5", "height", 8200, "bigger than max of 8192"),
        ("5", "steps", 0, "smaller than min of 1"),
        ("5", "seed", 2**64, "bigger than max"),
    ],
)
def test_bad_input_is_refused_with_a_sentence_and_the_host_lives_on(
    server: Server, graph: dict, node: str, name: str, value: object, said: str
) -> None:
    models = server.base / "models"
    save_file({"a.lora_A.weight": torch.zeros(1)}, models / "diffusion_models/lora.safetensors")
    whole = (models / "diffusion_models/majicflus_v134.safetensors").read_bytes()
    (models / "diffusion_models/short.safetensors").write_bytes(whole[:100_000])
    shard = models / "text_encoders/text_encoder_2/model-00001-of-00002.safetensors"
    shard.parent.mkdir(exist_ok=True)
    save_file({"shared.weight": torch.zeros(1)}, shard)

    bad = copy.deepcopy(graph)
    bad[node]["inputs"][name] = value
    before = psutil.Process(server.process.pid).memory_info().rss
    errors = refusal(server, bad)
    assert any(said in message for message in errors[node]), errors
    assert psutil.Process(server.process.pid).memory_info().rss - before < 20e6
    assert not server.run(graph).of("execution_error")


def linked(graph: dict, node: str, name: str, value: object, kind: str = "AnyValue") -> dict:
    """The graph with the value of one input coming over a link of any type."""
    key = f"{node} {name}"
    source = {"class_type": kind, "inputs": {"json": json.dumps(value)}}
    changed = {**copy.deepcopy(graph), key: source}
    changed[node]["inputs"][name] = [key, 0]
    return changed


def test_every_widget_may_come_over_a_link(server: Server, graph: dict) -> None:
    graph["5"]["inputs"].update(seed=800, cfg=1.5, negative_prompt="fog", batch_size=2)
    expected = [pixels(path) for path in server.outputs(server.run(graph))]
    everything = copy.deepcopy(graph)
    for node in ("1", "2", "3", "4", "5"):
        for name, value in graph[node]["inputs"].items():
            if not isinstance(value, list):
                everything = linked(everything, node, name, value)
    run = server.run(everything)
    assert not run.of("execution_error")
    assert [pixels(path) for path in server.outputs(run)] == expected
    again = server.run(everything)
    assert not again.executed_nodes & ALL_NODES, "it is cached as well"


def test_a_loader_takes_a_list_of_names(server: Server, graph: dict) -> None:
    """As an XY plot gives them."""
    vae = server.base / "models" / "vae"
    (vae / "other.safetensors").write_bytes((vae / "ae.safetensors").read_bytes())
    names = ["ae.safetensors", "other.safetensors"]
    run = server.run(linked(seeded(graph, 810), "3", "file", names, "AnyValues"))
    assert not run.of("execution_error")
    one, other = map(pixels, server.outputs(run))
    assert one == other


@pytest.mark.parametrize(
    ("node", "name", "value", "said"),
    [
        ("1", "file", "gone.safetensors", "gone.safetensors is not in models/diffusion_models"),
        ("1", "file", None, "file must be a text, not None"),
        ("1", "file", ["ae.safetensors"], "file must be a text, not 'list'"),
        ("1", "weight_precision", "float16", "weight_precision must be one of: float8_e4m3fn, "),
        ("1", "keep_prepared", "no", "keep_prepared must be true or false, not 'no'"),
        ("2", "t5", "clip_l.safetensors", "is a CLIP text encoder, not a T5 text encoder"),
        ("2", "precision", "float64", "precision must be one of: bfloat16, float32"),
        ("3", "file", "../text_encoders/clip_l.safetensors", "is not in models/vae"),
        ("4", "dit", "a model", "dit takes MAJICFLUX_DIT, but is linked to str"),
        ("4", "vram_budget_gb", float("nan"), "vram_budget_gb must be a number, not nan"),
        ("4", "compute_precision", 16, "compute_precision must be one of: auto, bfloat16"),
        ("5", "pipeline", None, "pipeline takes MAJICFLUX_PIPELINE, but is linked to NoneType"),
        ("5", "prompt", None, "prompt must be a text, not None"),
        ("5", "seed", 2**64, "seed must be -1 to 18446744073709551615"),
        ("5", "steps", "many", "steps must be a whole number, not 'many'"),
        ("5", "guidance", float("inf"), "guidance must be a number, not inf"),
        ("5", "width", "abc", "width must be a whole number, not 'abc'"),
        ("5", "width", 15, "width must be 16 to 8192, not 15"),
        ("5", "height", 8200, "height must be 16 to 8192, not 8200"),
        ("5", "cfg", {}, "cfg must be a number, not 'dict'"),
        ("5", "solver", "dpmpp_2m", "solver must be one of: euler, deis_2m, deis_3m, heun"),
        ("5", "schedule", "karras", "schedule must be one of: DiffSynth (shift 3), "),
        ("5", "size", "huge", "size must be one of: width x height, "),
        ("5", "image", "a picture", "image takes IMAGE, but is linked to str"),
        ("5", "latent", {"samples": 1}, "latent takes LATENT, but is linked to int"),
        ("5", "positive", [1], "CONDITIONING of positive is not one that ComfyUI's nodes make"),
    ],
)
def test_a_wrong_value_over_a_link_is_told_at_its_node_and_by_its_input(
    server: Server, graph: dict, node: str, name: str, value: object, said: str
) -> None:
    (error,) = server.run(linked(graph, node, name, value)).of("execution_error")
    assert error["node_id"] == node
    assert said in error["exception_message"]
    assert not server.run(graph).of("execution_error")


@pytest.mark.parametrize(
    ("node", "name", "value", "said"),
    [
        ("1", "file", 5, "5 is not in models/diffusion_models"),
        ("1", "file", {"__value__": ["a", "b"]}, "is not in models/diffusion_models"),
        ("2", "clip_l", True, "True is not in models/text_encoders"),
        ("5", "width", "abc", "width, abc, invalid literal"),
        ("5", "height", None, "height, None"),
        ("5", "solver", "dpmpp_2m", "Value not in list: solver"),
        ("5", "cfg", "NaN", None),
    ],
)
def test_a_wrong_value_of_any_type_is_refused(
    server: Server, graph: dict, node: str, name: str, value: object, said: str | None
) -> None:
    graph[node]["inputs"][name] = value
    if said is None:  # ComfyUI compares it with limits, which says nothing of it
        (error,) = server.run(graph).of("execution_error")
        assert "cfg must be a number, not nan" in error["exception_message"]
        return
    assert any(said in message for message in refusal(server, graph)[node])


def test_a_new_seed_over_a_link_is_drawn_each_time(server: Server, graph: dict) -> None:
    def seed_of(graph: dict) -> int | None:
        run = server.run(graph, workflow={})
        if "5" not in run.executed_nodes:
            return None
        with Image.open(server.outputs(run)[0]) as picture:
            return json.loads(picture.text["majicflux"])["seed"]

    fresh = linked(graph, "5", "seed", -1)
    fixed = linked(graph, "5", "seed", 820)
    found = [seed_of(each) for each in (fresh, fresh, fresh, fixed, fixed)]
    assert len({*found[:3]} - {None}) == 3
    assert found[3:] == [820, None], "and a seed that is not -1 is cached"


@pytest.mark.parametrize(
    "workflow", ["text", [1, 2], {"nodes": [None, 5, {"id": None}]}, {"nodes": None}, 5], ids=str
)
def test_a_workflow_of_any_form_stops_no_picture(
    server: Server, graph: dict, workflow: object
) -> None:
    run = server.run(seeded(graph, -1), workflow=workflow)
    assert not run.of("execution_error")
    assert server.outputs(run)


def test_an_empty_mask_is_told_and_takes_no_step(server: Server, graph: dict) -> None:
    graph["7"] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}}
    graph["8"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 64, "height": 64}}
    graph["5"]["inputs"].update(image=["7", 0], mask=["8", 0], seed=840)
    run = server.run(graph)
    assert not [p for p in run.of("progress") if p["node"] == "5"]
    assert "The mask is empty" in run.texts["5"]
    with Image.open(server.base / "input" / "example.png") as original:
        assert pixels(server.outputs(run)[0]) == original.convert("RGB").tobytes()


def test_a_file_that_breaks_while_it_loads_names_itself(
    server: Server, graph: dict, models: Path
) -> None:
    from safetensors.torch import load_file

    tensors = load_file(models / "diffusion_models/majicflus_v134.safetensors")
    name = "model.diffusion_model.single_blocks.0.linear2.weight"
    tensors[name][0, 0] = float("inf")
    save_file(tensors, server.base / "models/diffusion_models/infinite.safetensors")
    bad = copy.deepcopy(graph)
    bad["1"]["inputs"]["file"] = "infinite.safetensors"
    (error,) = server.run(bad).of("execution_error")
    assert error["node_type"] == "MajicFluxDiTLoader"
    assert error["exception_type"] == "majicflux.ModelFileError"
    assert name in error["exception_message"]
    assert "download it again" in error["exception_message"]
    assert not server.run(graph).of("execution_error")


def test_an_empty_prompt_paints(server: Server, graph: dict) -> None:
    graph["5"]["inputs"]["prompt"] = ""
    assert not server.run(graph).of("execution_error")


def test_a_size_of_any_pixels_is_rounded_and_told(server: Server, graph: dict) -> None:
    graph = seeded(graph, 110)
    graph["5"]["inputs"].update(width=63, height=41)
    run = server.run(graph)
    with Image.open(server.outputs(run)[0]) as picture:
        assert picture.size == (64, 48)
    assert "The size was rounded from 63 x 41 to 64 x 48" in run.texts["5"]
    graph["5"]["inputs"].update(height=8200)
    assert refusal(server, graph) == {"5": ["Value 8200 bigger than max of 8192: height"]}
