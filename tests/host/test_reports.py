"""Each picture carries the report of its own run, in a real ComfyUI."""

import copy
import json
import shutil
import time
from typing import Any

import pytest
from reported import node, read, save, saved_late, unsaved

from comfyui_server import Run, Server, reports_in

PHASES = ["text encoders", "denoising", "VAE decode"]


def carried(server: Server, run: Run) -> dict[str, Any]:
    """What the one picture of each SaveImage carries, by the node's id."""
    assert not run.of("execution_error")
    found = server.images(run, "output").items()
    return {key: read(path) for key, paths in found for path in paths}


def painted(server: Server, graph: dict, **extra: Any) -> dict[str, Any]:
    """The outputs in the history of a prompt that nobody follows; extra: what is sent with it."""
    queued = server.post("/prompt", {"prompt": graph, **extra})["prompt_id"]
    while not (done := server.ended(queued)):
        time.sleep(0.1)
    assert done["status"]["status_str"] == "success"
    return done["outputs"]


@pytest.fixture
def graph() -> dict[str, Any]:
    return unsaved()


@pytest.fixture
def two(graph: dict) -> dict:
    """Two pictures of different seeds, sizes and steps, which are saved after both were made."""
    graph["15"] = copy.deepcopy(graph["5"])
    graph["15"]["inputs"].update(seed=1, width=32, steps=1)
    for key in ("5", "15"):
        graph |= saved_late(key)
    return graph


def reseeded(graph: dict, first: int) -> dict:
    graph["5"]["inputs"].update(seed=first, prompt=f"prompt {first}")
    graph["15"]["inputs"].update(seed=first + 1, prompt=f"prompt {first + 1}")
    return graph


def test_pictures_that_are_saved_late_carry_their_own_runs(server: Server, two: dict) -> None:
    run = server.run(reseeded(two, 1000), workflow={})
    order = [data["node"] for data in run.of("executing")]
    assert max(map(order.index, ("5", "15"))) < min(map(order.index, ("5-save", "15-save")))
    found = carried(server, run)
    assert [found[f"{key}-save"]["seed"] for key in ("5", "15")] == [1000, 1001]
    seconds = [[phase["seconds"] for phase in one["phases"]] for one in found.values()]
    assert not set(seconds[0]) & set(seconds[1])
    for key in ("5", "15"):
        assert [phase["name"] for phase in found[f"{key}-save"]["phases"]] == PHASES
        assert not server.images(run, "temp")[key], "one picture in the history, not two"


def test_pictures_from_the_cache_carry_the_run_that_made_them(server: Server, two: dict) -> None:
    first = carried(server, server.run(reseeded(two, 1010), workflow={}))
    for key in ("5", "15"):
        two[f"{key}-save"]["inputs"]["filename_prefix"] = "again"
    run = server.run(two, workflow={})
    assert run.executed_nodes == {"5-save", "15-save"}
    assert carried(server, run) == first
    two["5-save"]["inputs"]["images"] = ["5", 0]
    two["15"]["inputs"].update(seed=-1)
    run = server.run(two, workflow={})
    assert "5" not in run.executed_nodes
    found = carried(server, run)
    assert found["5-save"] == first["5-save"]
    assert f"seed {found['15-save']['seed']}" in run.texts["15"]


def test_the_history_keeps_the_report_of_each_node(server: Server, two: dict) -> None:
    """For scripts too, which send no workflow and do not listen."""
    two["4"]["inputs"]["vram_budget_gb"] = 9.5  # so that it was not executed before
    two = reseeded(two, 1060)
    found = reports_in(painted(server, two))
    json.dumps(found, allow_nan=False)  # or no browser could read them
    assert found.keys() == {"1", "2", "3", "4", "5", "15"}
    assert found["4"]["text"].endswith("\non the CPU: no VRAM is used")
    seconds = []
    for key, seed in (("5", 1060), ("15", 1061)):
        assert found[key]["seed"] == seed
        assert [phase["name"] for phase in found[key]["phases"]] == PHASES
        assert "VAE decode" in found[key]["text"]
        seconds.append([phase["seconds"] for phase in found[key]["phases"]])
    assert seconds[0] != seconds[1]


def test_remembered_nodes_report_again_what_they_did(server: Server, two: dict) -> None:
    first = server.run(reseeded(two, 1070))
    again = server.run(two)
    assert not again.executed_nodes & first.reports.keys()
    assert again.reports == first.reports != {}
    assert again.texts.keys() == {"1", "2", "3", "4", "5", "15"}, "those without a picture too"
    assert reports_in(painted(server, two)) == first.reports, "without a client too"


def test_pictures_of_one_batch_carry_both_runs_apart(server: Server, two: dict) -> None:
    two["both"] = node("ImageBatch", image1=["5-2", 0], image2=["15-2", 0])
    two["one"] = node("ImageFromBatch", image=["both", 0], batch_index=0, length=1)
    two["one-save"] = save("one", "one")
    two["canvas"] = node("EmptyImage", width=16, height=16, batch_size=1, color=0)
    two["canvas-save"] = save("canvas", "canvas")
    found = carried(server, server.run(reseeded(two, 1020), workflow={}))
    runs = {run.pop("node"): run for run in found["one-save"]["runs"]}
    assert runs == {"5": found["5-save"], "15": found["15-save"]}
    assert found["canvas-save"] == {"runs": []}, "made by none"


def test_a_picture_made_in_parts_carries_all_of_them_as_one(server: Server, graph: dict) -> None:
    del graph["5"]
    pipeline = ["4", 0]
    graph |= {
        "prompt": node("MajicFluxEncodePrompt", pipeline=pipeline, prompt="parts", guidance=3.5),
        "empty": node("EmptySD3LatentImage", width=64, height=48, batch_size=1),
        "vae": node("VAELoader", vae_name="ae.safetensors"),
    }
    for key, seed in (("a", 1030), ("b", 1031)):
        graph[key] = node(
            "MajicFluxDenoise", pipeline=pipeline, positive=["prompt", 0], latent=["empty", 0],
            seed=seed, steps=1, guidance=3.5,
        )  # fmt: skip
        graph[f"{key}-ours"] = node("MajicFluxDecode", pipeline=pipeline, latent=[key, 0])
        graph[f"{key}-theirs"] = node("VAEDecode", samples=[key, 0], vae=["vae", 0])
        for whose in ("ours", "theirs"):
            graph[f"{key}-{whose}-save"] = save(f"{key}-{whose}", whose)
    first = carried(server, server.run(graph, workflow={}))
    for key, seed in (("a", 1030), ("b", 1031)):
        for whose, phases in (("ours", PHASES), ("theirs", PHASES[:2])):
            found = first[f"{key}-{whose}-save"]
            assert found["seed"] == seed
            assert [phase["name"] for phase in found["phases"]] == phases
    graph["a-ours-save"]["inputs"]["filename_prefix"] = "again"
    again = carried(server, server.run(graph, workflow={}))
    assert again["a-ours-save"] == first["a-ours-save"]


def test_the_queue_and_the_history_are_json_at_any_time(server: Server, two: dict) -> None:
    other = copy.deepcopy(reseeded(two, 1050))
    workflow = {"id": "0a", "nodes": []}
    queues = []

    def look(message: dict) -> None:
        if message["type"] != "progress" or queues:
            return
        extra = {"extra_pnginfo": {"workflow": workflow}}
        waiting = server.post("/prompt", {"prompt": other, "extra_data": extra})["prompt_id"]
        queues.append(server.get("/queue"))
        assert server.get(f"/api/jobs/{waiting}")["id"] == waiting
        server.post("/queue", {"delete": [waiting]})

    run = server.run(reseeded(two, 1040), on_message=look, workflow=workflow)
    history = server.get(f"/history/{run.prompt_id}")[run.prompt_id]["prompt"]
    for prompt in (*queues[0]["queue_running"], *queues[0]["queue_pending"], history):
        assert prompt[3]["extra_pnginfo"]["workflow"] == workflow
    assert len(queues[0]["queue_pending"]) == 1
    # A script that queues what it finds in the history gets the picture's own run, not this.
    assert run.prompt_id in server.get("/history")
    found = carried(server, run)
    again = copy.deepcopy(history[2])
    again["5-save"]["inputs"]["filename_prefix"] = "again"
    body = {"graph": again, "extra_data": history[3]}
    assert "majicflux" in body["extra_data"]["extra_pnginfo"]
    shutil.rmtree(server.base / "output")
    painted(server, **body)
    (path,) = (server.base / "output").glob("again*")
    assert read(path) == found["5-save"]
