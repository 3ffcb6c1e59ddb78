"""The canvas of a browser that is set to another language."""

import json
import re
import time
from pathlib import Path

import pytest
from playwright.sync_api import Page

from comfyui_server import Server

ROOT = Path(__file__).parents[2]
WORKFLOW = json.loads((ROOT / "workflows/text_to_image.json").read_text(encoding="utf-8"))
OURS = [node["type"] for node in WORKFLOW["nodes"] if node["type"].startswith("MajicFlux")]
CONTROL = "control_after_generate"  # ComfyUI's own widget below a seed
SHOWN = """() => app.rootGraph.nodes.filter(n => n.type.startsWith("MajicFlux")).map(n => [
    n.type, n.title, n.constructor.category, n.constructor.nodeData.description,
    n.inputs.map(i => i.localized_name),
    n.widgets.filter(w => w.name !== "control_after_generate").map(w => w.label),
    n.outputs.map(o => o.localized_name)])"""
# On a first visit the canvas may have registered its nodes before it has the language.
IN_ITS_LANGUAGE = """async title => {
    await app.registerNodes();
    return LiteGraph.registered_node_types.MajicFluxSample.title === title }"""
EVERY_NODE = """types => { app.rootGraph.clear(); for (const type of types)
    app.rootGraph.add(LiteGraph.createNode(type)); }"""
# Of each node: what stands on it, but for numbers and the names of files.
WRITTEN = """() => {
    const label = w => value => w.options.getOptionLabel?.(value) ?? value;
    const on = w => w.name === "majicflux_text" ? []  // empty before a run
        : w.element ? [w.element.placeholder, w.element.parentElement.title]
        : w.type === "toggle" ? [w.options.on, w.options.off]
        : w.type === "combo" && !/safetensors|opus-mt/.test(w.options.values)  // names of files
            ? w.options.values.map(label(w)) : [];
    return app.rootGraph.nodes.map(n => [n.type, [n.title,
        ...n.inputs.map(i => i.localized_name), ...n.outputs.map(o => o.localized_name),
        ...(n.widgets ?? []).flatMap(w => [w.label, ...on(w)])]]); }"""
SAME_IN_CHINESE = {"DiT", "VAE", "CFG", "Latent"}
SPOTS = """() => {
    const node = app.rootGraph.nodes.find(n => n.type === "MajicFluxSample");
    const { ds } = app.canvas, drawn = node.widgets.filter(w => !w.element);
    return [
        [node.pos[0] + 60, node.pos[1] - 15],
        ...node.inputs.map((_, i) => node.getInputPos(i)),
        ...node.outputs.map((_, i) => node.getOutputPos(i)),
        ...drawn.filter(w => node.isWidgetVisible(w)).map(
            w => [node.pos[0] + node.size[0] / 2, node.pos[1] + w.y + 10]),
    ].map(([x, y]) => [(x + ds.offset[0]) * ds.scale, (y + ds.offset[1]) * ds.scale]); }"""
# As if cfg were not 1, an image linked and the rare inputs asked for.
UNFOLD = """() => {
    const node = app.rootGraph.nodes.find(n => n.type === "MajicFluxSample");
    node.showAdvanced = true;
    for (const w of node.widgets) w.hidden = w.options.hidden = false;
    node.setSize([node.size[0], 900]);
    app.canvas.draw(true, true); }"""  # which puts the widgets in their places
SELECT = "type => app.canvas.selectItems(app.rootGraph.nodes.filter(n => n.type === type))"


def texts(language: str, file: str) -> dict:
    return json.loads((ROOT / "locales" / language / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize(("browser_language", "language"), [
    ("zh-CN", "zh"), ("zh-TW", "zh-TW"), ("ja-JP", "ja")])  # fmt: skip
def test_titles_labels_and_category_are_in_the_language_of_the_browser(
    open_canvas, browser_language: str, language: str
) -> None:
    nodes = texts(language, "nodeDefs.json")
    (group,) = texts(language, "main.json")["nodeCategories"].values()
    page = open_canvas(WORKFLOW, browser_language)
    page.wait_for_function(IN_ITS_LANGUAGE, arg=nodes["MajicFluxSample"]["display_name"])
    page.evaluate("workflow => app.loadGraphData(workflow)", WORKFLOW)
    shown = page.evaluate(SHOWN)
    assert sorted(node[0] for node in shown) == sorted(OURS)
    for node, title, category, description, inputs, widgets, outputs in shown:
        names = [
            socket["name"] for name, socket in nodes[node]["inputs"].items() if name != CONTROL
        ]
        assert title == nodes[node]["display_name"]
        assert category == group
        assert description == nodes[node]["description"]
        assert sorted(inputs) == sorted(names)
        assert set(widgets) <= set(names)
        assert outputs == [socket["name"] for socket in nodes[node]["outputs"].values()]


@pytest.fixture
def chinese(open_canvas) -> Page:
    page = open_canvas(WORKFLOW, "zh-CN", nodes2=False)  # of which the tests know the places
    page.wait_for_function(IN_ITS_LANGUAGE, arg="麦橘采样")
    page.evaluate("workflow => app.loadGraphData(workflow)", WORKFLOW)
    return page


def test_no_english_is_left_on_any_node(chinese: Page) -> None:
    nodes = texts("zh", "nodeDefs.json")
    chinese.evaluate(EVERY_NODE, list(nodes))
    chinese.wait_for_timeout(500)
    shown = chinese.evaluate(WRITTEN)
    assert [node for node, _ in shown] == list(nodes)
    for node, written in shown:
        for text in written:
            assert text in SAME_IN_CHINESE or re.search("[\u4e00-\u9fff]", text or ""), (node, text)


def test_every_tooltip_under_the_mouse_is_chinese(chinese: Page) -> None:
    chinese.evaluate(UNFOLD)
    chinese.evaluate("app.extensionManager.setting.set('LiteGraph.Node.TooltipDelay', 0)")
    chinese.wait_for_timeout(500)  # in which the canvas puts everything in its place
    node = texts("zh", "nodeDefs.json")["MajicFluxSample"]
    said = {node["description"]}
    said |= {socket["tooltip"] for part in ("inputs", "outputs") for socket in node[part].values()}
    shown = set()
    for spot in chinese.evaluate(SPOTS):
        chinese.mouse.move(*spot)
        chinese.wait_for_timeout(300)
        shown |= set(chinese.locator(".node-tooltip").all_inner_texts())
    boxes = {node["inputs"][name]["tooltip"] for name in ("prompt", "negative_prompt")}
    assert said - boxes <= shown - {""} <= said  # the canvas may lie under a text box or not


def test_chinese_words_find_the_nodes(chinese: Page) -> None:
    for word, node in (("麦橘", "麦橘 float8 DiT 加载器"), ("低显存", "CPU 卸载流水线")):
        chinese.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        chinese.keyboard.type(word)
        chinese.get_by_role("option").filter(has_text=node).wait_for(timeout=10_000)
        chinese.keyboard.press("Escape")
        chinese.get_by_role("option").first.wait_for(state="hidden")
    chinese.evaluate(
        "app.extensionManager.command.execute('Workspace.ToggleSidebarTab.node-library')"
    )
    library = chinese.get_by_role("tabpanel", name="全部节点")
    library.get_by_text("MajicFlux 麦橘超然", exact=True).wait_for(timeout=10_000)


def test_a_choice_is_queued_and_saved_as_it_is_known_to_the_node(chinese: Page) -> None:
    chinese.evaluate(UNFOLD)
    chinese.wait_for_timeout(500)
    solver = "app.rootGraph.getNodeById(5).widgets.find(w => w.name === 'solver')"
    x, y = chinese.evaluate(
        "() => { const n = app.rootGraph.getNodeById(5), { ds } = app.canvas;"
        " return [(n.pos[0] + n.size[0] / 2 + ds.offset[0]) * ds.scale,"
        f" (n.pos[1] + {solver}.y + 10 + ds.offset[1]) * ds.scale] }}"
    )
    chinese.mouse.click(x, y)
    chinese.get_by_text("heun（每步两遍）", exact=True).click()
    queued = chinese.evaluate("async () => (await app.graphToPrompt()).output[5].inputs.solver")
    assert queued == "heun"
    saved = chinese.evaluate("app.rootGraph.serialize()")
    (sample,) = (node for node in saved["nodes"] if node["id"] == 5)
    assert "heun" in sample["widgets_values"]
    # A value of a later version, or of another pack, stays what it is.
    sample["widgets_values"] = [
        "unipc" if value == "heun" else value for value in sample["widgets_values"]
    ]
    chinese.evaluate("workflow => app.loadGraphData(workflow)", saved)
    assert chinese.evaluate(f"[{solver}.value, {solver}._displayValue]") == ["unipc", "unipc"]


def test_the_server_learns_the_language_of_the_browser_and_of_the_settings(
    chinese: Page, server: Server
) -> None:
    def require(language: str) -> dict:
        end = time.monotonic() + 10
        while (settings := server.get("/settings")).get("MajicFlux.Language") != language:
            assert time.monotonic() < end, settings
            time.sleep(0.1)
        return settings

    assert "Comfy.Locale" not in require("zh")
    chinese.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'ja')")
    require("ja")
    chinese.wait_for_function(
        "app.rootGraph.getNodeById(5)?.widgets"
        ".find(w => w.name === 'keep_unmasked')?.options.on === 'オン'",
        timeout=30_000,
    )


def test_help_opens_in_chinese(open_canvas) -> None:
    page = open_canvas(WORKFLOW, "zh-CN")
    page.evaluate(SELECT, "MajicFluxPipeline")
    page.get_by_test_id("info-button").click()
    for heading in ("CPU 卸载流水线", "输入", "出问题时"):  # only the page has them all
        page.get_by_role("heading", name=heading, exact=True).wait_for(timeout=10_000)
    page.wait_for_function(
        "[...document.images].some(i => i.src.endsWith('MajicFluxPipeline/zh.png')"
        " && i.naturalWidth > 300)"
    )
