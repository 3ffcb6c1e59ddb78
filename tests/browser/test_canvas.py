"""The shipped workflow as a user meets it: opened, looked at, run."""

import copy
import json
from pathlib import Path

import pytest

from comfyui_server import Server
from majicflux.engine.memory import PhaseReport, Report
from majicflux.engine.plan_alone import plan_alone
from majicflux.engine.precision import PRECISIONS

PHASES = ("text encoders", "denoising", "VAE decode")
WORKFLOWS = Path(__file__).parents[2] / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
ERROR_BANNER = "text=/errors? found/"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def made_small(workflow: dict) -> dict:
    small = copy.deepcopy(workflow)
    for node in small["nodes"]:
        if node["type"] == "MajicFluxSample":
            _, seed, control, _, guidance, _, _, batch = node["widgets_values"]
            node["widgets_values"] = ["a cat", seed, control, 2, guidance, 64, 64, batch]
    return small


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_without_a_warning_and_is_the_graph_of_the_queue(open_canvas, name: str) -> None:
    page = open_canvas(read(WORKFLOWS / f"{name}.json"))
    page.wait_for_timeout(2000)
    assert page.locator(ERROR_BANNER).count() == 0
    assert page.get_by_role("dialog").count() == 0
    queued = page.evaluate("async () => (await app.graphToPrompt()).output")
    assert queued == read(WORKFLOWS / "api" / f"{name}.json")


def test_it_runs_and_the_picture_appears(open_canvas, server: Server) -> None:
    server.post("/free", {"unload_models": True, "free_memory": True})  # so that loaders run
    page = open_canvas(made_small(read(WORKFLOWS / "text_to_image.json")))
    graph = "async () => (await app.graphToPrompt()).output"
    before = page.evaluate(graph)
    page.get_by_role("button", name="Run").first.click()
    page.wait_for_function("app.rootGraph.getNodeById(6).imgs?.length === 1", timeout=120_000)
    size = page.evaluate("() => { const i = app.rootGraph.getNodeById(6).imgs[0];"
                         " return [i.naturalWidth, i.naturalHeight] }")  # fmt: skip
    assert size == [64, 64]
    assert page.locator(ERROR_BANNER).count() == 0
    page.get_by_text("Flux.1 transformer, 2 + 4 blocks").first.wait_for(timeout=10_000)
    assert page.evaluate(graph) == before, "what a loader reports is no part of the workflow"


CUT_OFF = """words => {
    const shows = element => element.textContent.includes(words);
    let element = [...document.querySelectorAll("div, span, p")].filter(shows).at(-1);
    for (; element; element = element.parentElement)
        if (element.scrollHeight > element.clientHeight + 1
                && getComputedStyle(element).overflowY !== "visible")
            return true;
    return false;
}"""
LAST_WIDGET = "app.rootGraph.getNodeById({node}).widgets.at(-1).value"


def a_real_plan() -> str:
    """The longest text: a transformer of which a part visits, and a prediction."""
    plan = plan_alone(
        None, PRECISIONS["float8_e4m3fn"], (1024, 1024, 1, 20), 8.0, True, 25.0, 300.0
    )
    computing = "computes in float8_e4m3fn, bfloat16 on NVIDIA GeForce RTX 4060 Laptop GPU"
    return f"transformer: {computing}\n{plan}"


def a_real_report() -> str:
    phases = [PhaseReport(name, 8 * 10**9, 8 * 10**9, 123.4, 98 * 10**9) for name in PHASES]
    return str(Report(8 * 10**9, phases))


def test_the_plan_and_the_report_fit_on_their_nodes(open_canvas, server: Server) -> None:
    server.post("/free", {"unload_models": True, "free_memory": True})  # so that all nodes run
    page = open_canvas(made_small(read(WORKFLOWS / "text_to_image.json")))
    page.get_by_role("button", name="Run").first.click()
    page.wait_for_function("app.rootGraph.getNodeById(6).imgs?.length === 1", timeout=120_000)
    for node, shown, text in (
        (4, "no VRAM is used", a_real_plan()),
        (5, "VAE decode: ", a_real_report()),
    ):
        last = text.splitlines()[-1]
        page.wait_for_function(f"{LAST_WIDGET.format(node=node)}?.includes('{shown}')")
        page.evaluate(f"text => {{ {LAST_WIDGET.format(node=node)} = text }}", text)
        page.get_by_text(last).first.wait_for(timeout=10_000)
        page.wait_for_timeout(500)
        assert not page.evaluate(CUT_OFF, last)


def test_it_opens_as_an_app_with_prompt_seed_and_steps(open_canvas, server: Server) -> None:
    workflow = made_small(read(WORKFLOWS / "text_to_image.json"))
    workflow["extra"]["linearMode"] = True
    page = open_canvas(workflow)
    for label in ("prompt", "seed", "steps"):
        page.get_by_text(label, exact=True).first.wait_for(timeout=30_000)
    assert page.get_by_text("guidance", exact=True).count() == 0
    page.get_by_role("button", name="Run").first.click()
    page.wait_for_selector("img[src*='filename=MajicFlux']", timeout=120_000)


def test_missing_models_are_listed_with_their_downloads(open_canvas, server: Server) -> None:
    models, away = server.base / "models", server.base / "models_away"
    models.rename(away)
    try:
        for folder in ("diffusion_models", "text_encoders", "vae"):
            (models / folder).mkdir(parents=True)
        workflow = read(WORKFLOWS / "text_to_image.json")
        # The note names the files too; what is looked for is the list of missing models.
        workflow["nodes"] = [n for n in workflow["nodes"] if n["type"] != "MarkdownNote"]
        page = open_canvas(workflow)
        page.get_by_text("4 errors found").wait_for(timeout=30_000)
        page.get_by_text("View details").click()
        for name in ("majicflus_v134", "clip_l", "t5xxl_fp16", "ae"):
            download = page.get_by_role("button", name=f"Download {name}.safetensors", exact=True)
            download.wait_for(timeout=10_000)
    finally:
        for folder in ("diffusion_models", "text_encoders", "vae"):
            (models / folder).rmdir()
        models.rmdir()
        away.rename(models)


def test_a_wrong_file_shows_our_sentence(open_canvas, server: Server) -> None:
    workflow = made_small(read(WORKFLOWS / "text_to_image.json"))
    text_encoders = next(n for n in workflow["nodes"] if n["type"] == "MajicFluxTextEncoders")
    text_encoders["widgets_values"][1] = "clip_l.safetensors"
    page = open_canvas(workflow)
    page.get_by_role("button", name="Run").first.click()
    page.get_by_text("View details").click(timeout=30_000)
    page.locator("button:has(i[class*=info])").first.click()
    sentence = "is a CLIP text encoder, not a T5 text encoder"
    page.get_by_text(sentence).first.wait_for(timeout=10_000)
