"""A real server process, used through its API queue as a client does."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from comfyui_server import Refused, Server
from majicflux.nodes import NODES

API = Path(__file__).parents[2] / "workflows" / "api" / "text_to_image.json"
ALL_NODES = {"1", "2", "3", "4", "5", "6"}
STEPS = 3
SIZE = (64, 48)  # width, height
PHASES = ["text encoders", "denoising", "VAE decode"]
MAKE_TAESD = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from comfy.cli_args import args
args.cpu = True
from comfy.taesd.taesd import TAESD
folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
weights = TAESD(latent_channels=16).taesd_decoder.state_dict()
save_file(weights, folder / "taef1_decoder.safetensors")
"""


@pytest.fixture
def graph() -> dict:
    graph = json.loads(API.read_text(encoding="utf-8"))
    graph["5"]["inputs"].update(width=SIZE[0], height=SIZE[1], steps=STEPS)
    return graph


def seeded(graph: dict, seed: int) -> dict:
    changed = copy.deepcopy(graph)
    changed["5"]["inputs"]["seed"] = seed
    return changed


def refusal(server: Server, graph: dict) -> dict[str, list[str]]:
    with pytest.raises(Refused) as caught:
        server.run(graph)
    return caught.value.errors


def let_go(server: Server, *flags: str) -> None:
    server.post("/free", dict.fromkeys(flags, True))
    empty = {"1": {"class_type": "EmptyImage", "inputs": {
        "width": 8, "height": 8, "batch_size": 1, "color": 0}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}  # fmt: skip
    server.run(empty)  # the flags are handled between prompts


def test_the_shipped_graph_paints_with_progress_and_previews(server: Server, graph: dict) -> None:
    run = server.run(seeded(graph, 100), preview_method="latent2rgb")
    assert not run.of("execution_error")
    sampled = [p for p in run.of("progress") if p["node"] == "5"]
    assert [p["value"] for p in sampled] == list(range(1, STEPS + 1))
    assert {p["max"] for p in sampled} == {STEPS}
    assert run.previews == STEPS
    (path,) = server.outputs(run)
    with Image.open(path) as picture:
        assert picture.size == SIZE
        assert json.loads(picture.text["prompt"])["5"]["inputs"]["seed"] == 100
        assert "majicflux" not in picture.text, "a client that sends no workflow gets no metadata"


def test_progress_counts_the_steps_of_a_guided_second_order_solver(
    server: Server, graph: dict
) -> None:
    graph["5"]["inputs"].update(seed=110, cfg=2.0, solver="heun")
    run = server.run(graph, preview_method="latent2rgb")
    sampled = [p for p in run.of("progress") if p["node"] == "5"]
    values = [p["value"] for p in sampled]  # the host leaves some out that follow fast
    assert values == sorted({*values})
    assert (values[-1], {p["max"] for p in sampled}) == (STEPS, {STEPS})
    assert run.previews == STEPS
    told = [text for node, text in run.live_texts if node == "5"]
    phases = [text for text in told if text.endswith("…")]
    assert phases == ["text encoders …", "denoising …", "VAE decode …"]
    labels = [text for text in told if text.startswith("step ")]
    assert labels[0].endswith(" s left")
    assert [label.split()[1] for label in labels] == ["1", "2", "3"]
    assert re.fullmatch(rf"step {STEPS} of {STEPS}, \d+\.\d\d s a step, 0 s left", labels[-1])


def test_a_new_seed_each_time_is_written_into_the_picture(server: Server, graph: dict) -> None:
    seeds, pixels = [], b""
    for _ in range(2):
        run = server.run(seeded(graph, -1), workflow={})
        (path,) = server.outputs(run)
        with Image.open(path) as picture:
            seed = json.loads(picture.text["prompt"])["5"]["inputs"]["seed"]
            assert json.loads(picture.text["majicflux"])["seed"] == seed
            seeds.append(seed)
            pixels = picture.tobytes()
        assert f"seed {seed}" in run.texts["5"]
    assert seeds[0] != seeds[1]
    (again,) = server.outputs(server.run(seeded(graph, seeds[1])))
    with Image.open(again) as picture:
        assert picture.tobytes() == pixels


def test_a_size_of_any_pixels_is_rounded_and_told(server: Server, graph: dict) -> None:
    graph = seeded(graph, 110)
    graph["5"]["inputs"].update(width=63, height=41)
    run = server.run(graph)
    with Image.open(server.outputs(run)[0]) as picture:
        assert picture.size == (64, 48)
    assert "The size was rounded from 63 x 41 to 64 x 48" in run.texts["5"]
    graph["5"]["inputs"].update(height=8200)
    assert refusal(server, graph) == {"5": ["Value 8200 bigger than max of 8192: height"]}


def test_the_small_decoder_that_the_user_chose_makes_the_previews(
    server: Server, graph: dict
) -> None:
    """With random weights: what it shows is ComfyUI's affair."""
    made = subprocess.run(
        [sys.executable, "-c", MAKE_TAESD, str(server.base / "models" / "vae_approx")],
        cwd=os.environ["COMFYUI_PATH"], capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    run = server.run(seeded(graph, 120), preview_method="taesd")
    assert run.previews == STEPS
    assert "TAESD previews enabled, but could not find" not in server.log()


def test_each_loader_shows_what_it_loaded(server: Server, graph: dict) -> None:
    let_go(server, "unload_models", "free_memory")
    run = server.run(seeded(graph, 150))
    assert not run.of("execution_error")
    texts = {node: run.texts[node] for node in ("1", "2", "3")}
    assert "Flux.1 transformer, 2 + 4 blocks of width 256, 0.01 B parameters" in texts["1"]
    assert "0.01 GB as float8_e4m3fn" in texts["1"]
    assert texts["2"].startswith("clip_l.safetensors, t5xxl_fp16.safetensors: text encoders")
    assert texts["3"].startswith("ae.safetensors: Flux VAE, 0.34 GB as float32")
    log = server.log()
    for text in texts.values():
        for line in text.splitlines():
            assert line in log


def test_a_run_says_what_it_planned_and_used(server: Server, graph: dict) -> None:
    let_go(server, "unload_models")
    graph["4"]["inputs"]["vram_budget_gb"] = 7.5  # so that it was not executed before
    graph["5"]["inputs"]["prompt"] = "a prompt that is new"
    run = server.run(graph, workflow={"nodes": []})

    computing, plan = run.texts["4"].splitlines()
    assert computing.startswith("transformer: computes in float32 on CPU")
    assert plan == "on the CPU: no VRAM is used"
    times, counts = run.texts["5"].splitlines()
    assert counts == "CLIP-L read all 16 tokens, T5 all 21"
    assert re.sub(r" \d+\.\d s(?=,|$)", "", times).split(", ") == PHASES

    (path,) = server.outputs(run)
    with Image.open(path) as picture:
        assert json.loads(picture.text["workflow"]) == {"nodes": []}
        report = json.loads(picture.text["majicflux"])
    assert (report["budget_bytes"], report["peak_bytes"]) == (None, None)
    assert [phase["name"] for phase in report["phases"]] == PHASES
    for phase in report["phases"]:
        assert phase["planned_bytes"] > 0
        assert phase["peak_bytes"] is None, "nothing is measured on a CPU"
        assert phase["seconds"] > 0
        assert phase["moved_bytes"] == 0, "weights are computed with where they are"


def test_two_pictures_of_one_graph_carry_their_own_reports(server: Server, graph: dict) -> None:
    graph["5"]["inputs"].update(prompt="one more new prompt", seed=180)
    graph["15"], graph["16"] = copy.deepcopy(graph["5"]), copy.deepcopy(graph["6"])
    graph["15"]["inputs"]["seed"] = 181
    graph["16"]["inputs"]["images"] = ["15", 0]
    phases = []
    for path in server.outputs(server.run(graph, workflow={})):
        with Image.open(path) as picture:
            report = json.loads(picture.text["majicflux"])
            phases.append([phase["name"] for phase in report["phases"]])
    # Whichever was painted first encoded the prompt for both.
    assert sorted(phases, key=len) == [PHASES[1:], PHASES]


def test_the_same_prompt_again_is_cached_and_a_new_seed_runs_only_sample(
    server: Server, graph: dict
) -> None:
    server.run(seeded(graph, 200))
    again = server.run(seeded(graph, 200))
    assert set(again.of("execution_cached")[0]["nodes"]) == ALL_NODES
    other = server.run(seeded(graph, 201))
    assert other.executed_nodes == {"5", "6"}


def test_pictures_are_shown_once_by_the_node_that_saves_them(server: Server, graph: dict) -> None:
    graph["5"]["inputs"]["batch_size"] = 2
    graph["7"] = {"class_type": "MajicFluxDecode", "inputs": {
        "pipeline": ["4", 0], "latent": ["5", 1]}}  # fmt: skip
    graph["8"] = {"class_type": "SaveImage", "inputs": {
        "images": ["7", 0], "filename_prefix": "decoded"}}  # fmt: skip
    graph = seeded(graph, 150)
    for run in (server.run(graph, workflow={}), server.run(graph, workflow={})):
        assert not any(server.images(run, "temp").values())
        saved = {node: paths for node, paths in server.images(run, "output").items() if paths}
        assert {node: len(paths) for node, paths in saved.items()} == {"6": 2, "8": 2}
        for path in (*saved["6"], *saved["8"]):
            with Image.open(path) as picture:
                assert picture.text.keys() == {"prompt", "workflow", "majicflux"}
    # All of it was remembered, and is shown again where a canvas has been reloaded.
    assert run.executed_nodes == set()
    assert {"5", "7"} <= run.texts.keys()


def test_another_precision_reads_only_the_transformer_again(server: Server, graph: dict) -> None:
    server.run(seeded(graph, 250))
    changed = seeded(graph, 250)
    changed["1"]["inputs"]["weight_precision"] = "bfloat16"
    assert server.run(changed).executed_nodes == {"1", "4", "5", "6"}


def test_the_same_seed_gives_the_same_picture_as_without_comfyui(
    server: Server, graph: dict, models: Path, tmp_path: Path
) -> None:
    (ours,) = server.outputs(server.run(seeded(graph, 300)))
    arguments = [
        f"--set={name}"
        for name in ("seed=300", f"width={SIZE[0]}", f"height={SIZE[1]}", f"steps={STEPS}")
    ]
    # In a process of its own, which knows nothing of what ComfyUI sets for a whole process.
    command = [sys.executable, "-m", "majicflux.cli", "run", API, "--models", models]
    subprocess.run([*command, "--output", ".", *arguments], check=True, cwd=tmp_path)
    (alone,) = tmp_path.glob("*.png")
    with Image.open(ours) as one, Image.open(alone) as other:
        assert one.tobytes() == other.tobytes()


def test_interrupt_ends_the_run_early(server: Server, graph: dict) -> None:
    long = seeded(graph, 400)
    long["5"]["inputs"]["steps"] = 100

    def stop_when_it_has_begun(message: dict) -> None:
        if message["type"] == "progress":
            server.post("/interrupt", {})

    run = server.run(long, on_message=stop_when_it_has_begun)
    assert run.messages[-1]["type"] == "execution_interrupted"
    assert max(p["value"] for p in run.of("progress")) < 20
    assert not server.run(seeded(graph, 401)).of("execution_error")


def test_free_lets_the_weights_go(server: Server, graph: dict) -> None:
    server.run(seeded(graph, 500))
    process = psutil.Process(server.process.pid)
    held = process.memory_info().rss
    let_go(server, "unload_models", "free_memory")
    assert held - process.memory_info().rss > 100e6  # the VAE alone is 168 MB
    again = server.run(seeded(graph, 500))
    assert {"1", "2", "3"} <= again.executed_nodes


def test_unloading_without_forgetting_keeps_the_loaders_cached(server: Server, graph: dict) -> None:
    server.run(seeded(graph, 600))
    server.post("/free", {"unload_models": True})
    assert server.run(seeded(graph, 601)).executed_nodes == {"5", "6"}


def test_native_nodes_take_our_image_and_latent(server: Server, graph: dict) -> None:
    mixed = seeded(graph, 700)
    mixed["10"] = {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}}
    mixed["11"] = {"class_type": "VAEDecode", "inputs": {"samples": ["5", 1], "vae": ["10", 0]}}
    mixed["12"] = {"class_type": "SaveImage", "inputs": {
        "images": ["11", 0], "filename_prefix": "native"}}  # fmt: skip
    run = server.run(mixed)
    assert not run.of("execution_error")
    paths = {path.name.split("_")[0]: path for path in server.outputs(run)}
    with Image.open(paths["MajicFlux"]) as ours, Image.open(paths["native"]) as theirs:
        pixels = [
            torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in (ours, theirs)
        ]
    difference = (pixels[0].float() - pixels[1].float()).abs().mean()
    assert difference < 3  # of 255; rounded to bytes by both


def test_the_mixed_template_paints_with_the_stock_text_encoders_and_vae(server: Server) -> None:
    mixed = json.loads(API.with_name("mixed_with_stock_nodes.json").read_text(encoding="utf-8"))
    nodes = {node["class_type"]: node["inputs"] for node in mixed.values()}
    assert {"text_encoders", "vae"}.isdisjoint(nodes["MajicFluxPipeline"])
    nodes["EmptySD3LatentImage"].update(width=64, height=64)
    nodes["MajicFluxDenoise"]["steps"] = 2
    with server.real_vocabularies():
        run = server.run(mixed)
    assert not run.of("execution_error")
    (path,) = server.outputs(run)
    with Image.open(path) as picture:
        assert picture.size == (64, 64)


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


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


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


def test_guidance_may_be_disabled(server: Server, graph: dict) -> None:
    graph = seeded(graph, 830)
    graph["7"] = {"class_type": "MajicFluxEncodePrompt", "inputs": {
        "pipeline": ["4", 0], "prompt": "a cat", "guidance": 3.5}}  # fmt: skip
    graph["5"]["inputs"]["positive"] = ["7", 0]
    guided = server.outputs(server.run(graph))[0]
    graph["8"] = {"class_type": "FluxDisableGuidance", "inputs": {"conditioning": ["7", 0]}}
    graph["5"]["inputs"]["positive"] = ["8", 0]
    run = server.run(graph)
    assert not run.of("execution_error")
    assert pixels(server.outputs(run)[0]) != pixels(guided)


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


def test_a_lora_that_comfyui_has_merged_paints_here(server: Server, graph: dict) -> None:
    """As the README advises."""
    matrix = "double_blocks.0.img_attn.proj"
    lora = {f"diffusion_model.{matrix}.lora_A.weight": torch.randn(4, 256)}
    lora[f"diffusion_model.{matrix}.lora_B.weight"] = torch.randn(256, 4)
    (server.base / "models" / "loras").mkdir(exist_ok=True)
    save_file(lora, server.base / "models" / "loras" / "style.safetensors")
    (plain,) = server.outputs(server.run(seeded(graph, 710)))
    merging = {
        "1": {"class_type": "UNETLoader", "inputs": {
            "unet_name": "majicflus_v134.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "LoraLoaderModelOnly", "inputs": {
            "model": ["1", 0], "lora_name": "style.safetensors", "strength_model": 1.0}},
        "3": {"class_type": "ModelSave", "inputs": {
            "model": ["2", 0], "filename_prefix": "styled"}},
    }  # fmt: skip
    assert not server.run(merging).of("execution_error")
    (merged,) = (server.base / "output").glob("styled*")
    merged.rename(server.base / "models" / "diffusion_models" / merged.name)
    graph["1"]["inputs"]["file"] = merged.name
    run = server.run(seeded(graph, 710))
    assert f"{merged.name}: Flux.1 transformer" in run.texts["1"]
    (styled,) = server.outputs(run)
    with Image.open(plain) as one, Image.open(styled) as other:
        assert one.tobytes() != other.tobytes()


def test_an_empty_prompt_paints(server: Server, graph: dict) -> None:
    graph["5"]["inputs"]["prompt"] = ""
    assert not server.run(graph).of("execution_error")


def test_the_templates_are_listed(server: Server) -> None:
    (found,) = server.get("/api/workflow_templates").values()
    assert sorted(found) == sorted(path.stem for path in API.parents[1].glob("*.json"))
    assert "text_to_image" in found


def test_every_socket_is_explained_and_found_in_chinese(server: Server) -> None:
    found = {name: info for name, info in server.get("/object_info").items() if "MajicFlux" in name}
    assert len(found) == len(NODES)
    for info in found.values():
        assert info["description"]
        assert any("麦橘" in alias for alias in info["search_aliases"])
        assert all(info["output_tooltips"])
        for _, options in info["input"]["required"].values():
            assert options["tooltip"]
