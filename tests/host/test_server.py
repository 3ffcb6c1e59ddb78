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
from text_to_image import ALL_NODES, API, SIZE, STEPS, pixels, seeded, small

from comfyui_server import Server
from majicflux.nodes import NODES

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
    return small()


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
