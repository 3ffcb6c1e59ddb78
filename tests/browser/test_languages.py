"""The canvas of a browser that is set to another language."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOW = json.loads((ROOT / "workflows/text_to_image.json").read_text(encoding="utf-8"))
OURS = [node["type"] for node in WORKFLOW["nodes"] if node["type"].startswith("MajicFlux")]
SHOWN = """() => app.rootGraph.nodes.filter(n => n.type.startsWith("MajicFlux")).map(n => [
    n.type, n.title, n.constructor.category, n.constructor.nodeData.description,
    n.inputs.map(i => i.localized_name),
    n.widgets.filter(w => w.name !== "control_after_generate").map(w => w.label),
    n.outputs.map(o => o.localized_name)])"""
# On a first visit the canvas may have registered its nodes before it has the language.
IN_ITS_LANGUAGE = """async title => {
    await app.registerNodes();
    return LiteGraph.registered_node_types.MajicFluxSample.title === title }"""
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
        names = [socket["name"] for socket in nodes[node]["inputs"].values()]
        assert title == nodes[node]["display_name"]
        assert category == group
        assert description == nodes[node]["description"]
        assert sorted(inputs) == sorted(names)
        assert set(widgets) <= set(names)
        assert outputs == [socket["name"] for socket in nodes[node]["outputs"].values()]


def test_help_opens_in_chinese(open_canvas) -> None:
    page = open_canvas(WORKFLOW, "zh-CN")
    page.evaluate(SELECT, "MajicFluxPipeline")
    page.get_by_test_id("info-button").click()
    for heading in ("CPU 卸载流水线", "输入", "出问题时"):  # only the page has them all
        page.get_by_role("heading", name=heading, exact=True).wait_for(timeout=10_000)
