"""The shipped workflows as a user meets them: opened, looked at, run."""

import json
import re
import time
from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from browser.conftest import READY, canvas_of, open_workflow
from PIL import Image, ImageColor
from playwright.sync_api import Browser, Page, Route
from translators import write_marian

from comfyui_server import Server
from majicflux.downloads.catalogue import MAJICFLUS_FLOAT8
from majicflux.engine.plan.estimate import estimate_plan
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.engine.run.report import Report, StageReport
from majicflux.host.canvas import with_values
from majicflux.loaders.demo_models import DIT_FILE
from majicflux.messages import say
from majicflux.nodes import NODES
from majicflux.nodes.sample import CUSTOM
from majicflux.workflows import build

STAGES = ("text", "denoise", "decode")
WORKFLOWS = Path(__file__).parents[2] / "workflows"
NAMES = [make().name for make in build.BUILDERS]  # from simple to special
ERROR_BANNER = "text=/(errors?|issues?) found/"
SMALL = {
    "steps": 2,
    "width": 64,
    "height": 64,
    "cell_width": 64,
    "cell_height": 64,
    "feathering": 0,  # which ComfyUI does one pixel after the other
}
# Left, top, right and bottom of each node, its title included; in Nodes 2.0 as they are drawn.
BOXES = """() => app.rootGraph.nodes.map(n => {
    const drawn = LiteGraph.vueNodesMode && document.querySelector(`[data-node-id="${n.id}"]`);
    if (!drawn) return [n.type, [n.pos[0], n.pos[1] - LiteGraph.NODE_TITLE_HEIGHT,
        n.pos[0] + n.size[0], n.pos[1] + n.size[1]]];
    const { left, top, right, bottom } = drawn.getBoundingClientRect();
    return [n.type, [left, top, right, bottom]]; })"""
# What our part of the canvas shows on each node.
TEXTS = """() => Object.fromEntries(app.rootGraph.nodes.map(n => [n.id,
    n.widgets?.find(w => w.name === "majicflux_text")?.element.innerText ?? ""]))"""
SHOWS = """([node, words]) => app.rootGraph.getNodeById(node)?.widgets?.find(
    w => w.name === "majicflux_text")?.element.innerText.includes(words)"""
ALL_SHOWN = """() => app.rootGraph.nodes.filter(n => n.type === "SaveImage").every(n => {
    const drawn = LiteGraph.vueNodesMode
        ? [...document.querySelectorAll(`[data-node-id="${n.id}"] img`)] : n.imgs ?? [];
    return drawn.length && drawn.every(i => i.naturalWidth >= 64); })"""


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def made_small(name: str = "text_to_image", values: Mapping[str, object] = SMALL) -> dict:
    """A template with values that paint a picture in a second, or with these."""
    graph = read(WORKFLOWS / "api" / f"{name}.json")
    for node in graph.values():
        node["inputs"] |= {key: values[key] for key in node["inputs"].keys() & values.keys()}
    return with_values(read(WORKFLOWS / f"{name}.json"), graph, build.schemas())


def require_no_overlap(page: Page) -> None:
    for (one, a), (other, b) in combinations(page.evaluate(BOXES), 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{one} and {other}"


def warnings_of(page: Page) -> list[str]:
    """What the canvas says of a workflow that it has opened."""
    page.wait_for_timeout(2000)
    said = page.locator(ERROR_BANNER).all_inner_texts()
    # The setting Comfy.Validation.Workflows makes it compare with its own schema, in a toast.
    said += page.locator(".p-toast-message, [data-testid=toast]").all_inner_texts()
    return said + page.get_by_role("dialog").all_inner_texts()


def no_place(workflow: dict) -> None:
    del workflow["nodes"][0]["pos"]


def no_version(workflow: dict) -> None:
    workflow["nodes"][0]["properties"]["ver"] = "dev"


def dangling_link(workflow: dict) -> None:
    workflow["links"][0][3] = 99


@pytest.mark.parametrize(("spoil", "said"), [
    (no_place, 'at "nodes[0].pos"'),
    (no_version, 'Node pack version has invalid semantic version: "dev"'),
    (dangling_link, "Workflow Links Fixed"),
])  # fmt: skip
def test_a_workflow_that_the_canvas_does_not_accept_is_seen(open_canvas, spoil, said: str) -> None:
    workflow = read(WORKFLOWS / "text_to_image.json")
    spoil(workflow)
    assert said in "\n".join(warnings_of(open_canvas(workflow)))


class TestTemplates:
    """One canvas opens them all, as from its menu: starting it takes longer than the rest."""

    @pytest.fixture(scope="class")
    @classmethod
    def page(cls, browser: Browser, server: Server, newest: bool) -> Iterator[Page]:
        with server.real_vocabularies(), canvas_of(browser, server, newest) as open_canvas:
            yield open_canvas(None)

    @pytest.mark.parametrize("name", NAMES)
    def test_it_opens_without_a_warning_is_the_graph_of_the_queue_and_runs(
        self, page: Page, name: str
    ) -> None:
        open_workflow(page, read(WORKFLOWS / f"{name}.json"))
        assert warnings_of(page) == []
        queued = page.evaluate("async () => (await app.graphToPrompt()).output")
        for node in queued.values():
            if "size" in node["inputs"]:
                node["inputs"]["size"] = CUSTOM
            if (
                node["inputs"].get("file") == Path(DIT_FILE).name
            ):  # that is there, in place of the other
                node["inputs"]["file"] = MAJICFLUS_FLOAT8.name
            node["_meta"] = {"title": node["_meta"]["title"]}  # newer canvases name the pack too
        assert queued == read(WORKFLOWS / "api" / f"{name}.json")
        require_no_overlap(page)
        if name == "text_to_image":
            return  # runs below
        page.evaluate("workflow => app.loadGraphData(workflow)", made_small(name))
        page.evaluate("app.canvas.ds.scale = 0.25")  # what is not on the screen loads no pictures
        page.get_by_role("button", name="Run").first.click()
        page.wait_for_function(ALL_SHOWN, timeout=60_000)
        assert page.locator(ERROR_BANNER).count() == 0
        require_no_overlap(page)


def press_run(page: Page) -> None:
    page.get_by_role("button", name=re.compile("^(Run|运行)$")).first.click()


def wait_for_text(page: Page, node: int, words: str) -> None:
    page.wait_for_function(SHOWS, arg=[node, words], timeout=60_000)


def test_it_runs_and_runs_again_to_another_picture_and_the_reports_stay(
    open_canvas, server: Server
) -> None:
    server.post("/free", {"unload_models": True, "free_memory": True})  # so that loaders run
    page = open_canvas(made_small())
    assert not page.evaluate("app.canvas.low_quality"), "too small a scale for text on the nodes"
    graph = "async () => (await app.graphToPrompt()).output"
    before = page.evaluate(graph)
    saved = set((server.base / "output").glob("MajicFlux_0*.png"))
    shown = []
    for number in (1, 2):
        press_run(page)
        page.wait_for_function(
            "number => app.rootGraph.getNodeById(6).imgs?.[0].src.includes(number)",
            arg=f"MajicFlux_{len(saved) + number:05}_",
            timeout=60_000,
        )
        wait_for_text(page, 5, "denoising")
        page.wait_for_timeout(1000)  # the last report comes after the picture
        shown.append(page.evaluate(TEXTS))
    size = page.evaluate("() => { const i = app.rootGraph.getNodeById(6).imgs[0];"
                         " return [i.naturalWidth, i.naturalHeight] }")  # fmt: skip
    assert size == [64, 64]
    one, other = set((server.base / "output").glob("MajicFlux_0*.png")) - saved
    assert Image.open(one).tobytes() != Image.open(other).tobytes()
    assert page.locator(ERROR_BANNER).count() == 0
    assert "Flux.1 transformer, 2 + 4 blocks" in shown[0]["1"]
    for node in ("1", "2", "3", "4"):  # which the second run has cached
        assert shown[0][node] == shown[1][node] != ""
    after = page.evaluate(graph)
    assert before["5"]["inputs"].pop("seed") == 0 != after["5"]["inputs"].pop("seed")
    assert after == before, "what a loader reports is no part of the workflow"
    page.wait_for_timeout(1000)  # in which the canvas keeps what is open
    page.reload()
    page.wait_for_function(READY, timeout=60_000)
    wait_for_text(page, 5, "denoising")
    assert page.evaluate(TEXTS) == shown[1]
    page.evaluate("workflow => app.loadGraphData(workflow, true, true, 'new')", made_small())
    page.wait_for_timeout(1000)
    assert not any(page.evaluate(TEXTS).values()), "a template as it is shipped has not run"


def set_value(page: Page, node: int, name: str, value: object) -> None:
    page.evaluate(
        "([id, name, value]) => { const widget = app.rootGraph.getNodeById(id).widgets.find("
        "w => w.name === name); widget.value = value; widget.callback?.(value) }",
        [node, name, value],
    )


LATE = 5  # seconds, in which models are loaded and a run has failed


def answer_late(route: Route) -> None:
    """As where a run fails before the canvas has heard that it is queued."""
    response = route.fetch()
    time.sleep(LATE)
    route.fulfill(response=response)


def test_what_is_wrong_stands_on_the_node_until_the_next_run(open_canvas) -> None:
    page = open_canvas(made_small(), "zh-CN")
    page.evaluate("app.registerNodes()")  # in its language, which a first visit may come before
    page.evaluate("workflow => app.loadGraphData(workflow)", made_small())

    def require(node: int, words: str) -> None:
        press_run(page)
        wait_for_text(page, node, words)
        assert [key for key, text in page.evaluate(TEXTS).items() if text] == [str(node)]

    set_value(page, 5, "steps", 900)
    require(5, "采样步数须在 1 到 100 之间，不能是 900。")
    set_value(page, 5, "steps", 2)
    set_value(page, 2, "t5", "clip_l.safetensors")
    require(2, "clip_l.safetensors 是 CLIP 文本编码器，不是 T5 文本编码器。")
    set_value(page, 2, "t5", "t5xxl_fp16.safetensors")
    page.route("**/prompt", answer_late)
    set_value(page, 5, "strength", 0.5)
    press_run(page)
    wait_for_text(page, 5, "重绘强度为 0.5 时需要一张起始图")
    page.wait_for_timeout(1000 * LATE + 1000)
    wait_for_text(page, 5, "重绘强度为 0.5 时需要一张起始图")
    page.unroute("**/prompt")
    set_value(page, 5, "strength", 1)
    press_run(page)
    wait_for_text(page, 5, "去噪")
    assert "重绘强度" not in page.evaluate(TEXTS)["5"]


def test_a_run_says_where_it_is_and_that_it_was_stopped(open_canvas) -> None:
    page = open_canvas(made_small(), "zh-CN")
    set_value(page, 5, "steps", 100)
    press_run(page)
    wait_for_text(page, 5, "100")
    assert re.search(r"\d+", page.evaluate(TEXTS)["5"])
    page.evaluate("app.api.interrupt()")
    page.wait_for_function(
        SHOWS.replace("includes(words)", "trim() === words"), arg=[5, "已停止"], timeout=60_000
    )


def a_real_plan(*rates: float | None) -> dict[str, Any]:
    """The longest text: a transformer of which a part visits, and a prediction; and its bar."""
    job = (1024, 1024, 1, 20)
    rates = rates or (25.0, 300.0)
    plan = estimate_plan(None, PRECISIONS["float8_e4m3fn"], job, 8.0, True, *rates)
    card, formats = "NVIDIA GeForce RTX 4060 Laptop GPU", "float8_e4m3fn, bfloat16"
    computing = say("computes in {formats} on {device}", formats=formats, device=card)
    text = say("transformer: {report}", report=computing) + f"\n{plan}"
    return {"text": text, "bar": plan.bar()}


def a_real_report() -> str:
    stages = [StageReport(name, 8 * 10**9, 8 * 10**9, 123.4, 98 * 10**9) for name in STAGES]
    counts = "CLIP-L read 75 of 183 tokens, T5 all 14"
    return f"{Report(8 * 10**9, stages)}\n{counts}\nseed 1125899906842623"


OUTPUT_COLORS = """() => Object.fromEntries(app.rootGraph.nodes.flatMap(
    n => n.outputs.map((o, i) => { const { ds } = app.canvas, [x, y] = n.getOutputPos(i);
    return [o.type, [LGraphCanvas.link_type_colors[o.type],
        getComputedStyle(document.documentElement).getPropertyValue("--color-datatype-" + o.type),
        (x + ds.offset[0]) * ds.scale, (y + ds.offset[1]) * ds.scale]] })))"""


LINK_COLORS = "names => names.map(name => LGraphCanvas.link_type_colors[name])"


def test_every_socket_type_of_ours_has_its_color_in_every_palette(open_canvas) -> None:
    page = open_canvas(made_small())
    types = {s.io_type for node in NODES for s in node.define_schema().outputs}
    ours = {name for name in types if name.startswith("MAJICFLUX_")}
    for palette in ("light", "dark"):
        page.evaluate(f"app.extensionManager.setting.set('Comfy.ColorPalette', '{palette}')")
        page.wait_for_timeout(1000)
        found = page.evaluate(OUTPUT_COLORS)
        assert len({*page.evaluate(LINK_COLORS, [*ours])} - {None}) == len(ours) == 5
        pixels = Image.open(BytesIO(page.screenshot())).convert("RGB")
        for name in ours & found.keys():
            link, node_of_vue, x, y = found[name]
            assert link == node_of_vue
            wanted = ImageColor.getrgb(link)
            difference = zip(wanted, pixels.getpixel((round(x), round(y))), strict=True)
            assert max(abs(a - b) for a, b in difference) < 24, (palette, name)


def test_it_opens_as_an_app_with_what_one_changes(open_canvas, server: Server) -> None:
    workflow = made_small()
    workflow["extra"]["linearMode"] = True
    page = open_canvas(workflow)
    for label in ("prompt", "size", "seed", "steps", "guidance"):
        page.locator(f"text='{label}' >> visible=true").first.wait_for(timeout=30_000)
    assert page.locator("text='solver' >> visible=true").count() == 0
    page.get_by_role("button", name="Run").first.click()
    picture = page.locator("img[src*='filename=MajicFlux'] >> visible=true")
    picture.first.wait_for(timeout=60_000)


def test_the_app_shows_the_english_beneath_the_prompt(open_canvas, server: Server) -> None:
    write_marian(server.base / "models" / "translation" / "opus-mt-zh-en")
    workflow = made_small("text_to_image_translated")
    workflow["extra"]["linearMode"] = True
    (translate,) = (n for n in workflow["nodes"] if n["type"] == "MajicFluxTranslate")
    translate["widgets_values"][0] = "雨夜，一辆(红色:1.3)的汽车"
    page = open_canvas(workflow)
    page.get_by_role("button", name="Run").first.click()
    english = page.locator("text=/^Rainy night, A .red:1.3. car/ >> visible=true").first
    english.wait_for(timeout=60_000)
    prompt = page.locator("textarea >> visible=true").first
    assert prompt.input_value() == translate["widgets_values"][0]
    assert english.bounding_box()["y"] > prompt.bounding_box()["y"]
    assert page.locator("text='english' >> visible=true").count() == 1


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
        page.get_by_text(re.compile("4 (errors|issues) found")).wait_for(timeout=30_000)
        page.get_by_text("View details").click()
        for name in ("majicflus_v1", "clip_l", "t5xxl_fp16", "ae"):
            download = page.get_by_role("button", name=f"Download {name}.safetensors", exact=True)
            download.wait_for(timeout=10_000)
    finally:
        for folder in ("diffusion_models", "text_encoders", "vae"):
            (models / folder).rmdir()
        models.rmdir()
        away.rename(models)
