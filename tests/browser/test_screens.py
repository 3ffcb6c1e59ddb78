"""What a person sees on the screen of a laptop, in both renderers, before and after a run."""

from itertools import combinations
from typing import Any

import pytest
from browser.conftest import READY
from browser.test_canvas import (
    ALL_SHOWN,
    BOXES,
    NAMES,
    WORKFLOWS,
    a_real_plan,
    a_real_report,
    made_small,
    press_run,
    read,
)
from playwright.sync_api import Page

from comfyui_server import Server
from majicflux.messages import say, speak

SCREENS = [  # width, height, language, Nodes 2.0
    (1366, 650, "zh-CN", True),
    (1366, 650, "en-US", False),
    (1536, 730, "zh-CN", False),
    (1600, 900, "en-US", True),
]
SAMPLE_HEIGHT = 604  # its sockets, widgets and report; half of it were empty once
# As the server tells the canvas what a node has done.
DONE = """outputs => { for (const node of app.rootGraph.nodes) if (outputs[node.type])
    app.api.dispatchCustomEvent("executed", { node: node.id, display_node: node.id,
        output: { majicflux: [outputs[node.type]] } }) }"""
# The words of which a part cannot be seen. Notes may be scrolled.
CLIPPED = """() => [...document.querySelectorAll(
    ".majicflux_text, [data-node-id] textarea, textarea.comfy-multiline-input")].filter(
        e => e.checkVisibility() && e.scrollHeight > e.clientHeight + 1
    ).map(e => e.value ?? e.innerText)"""
LINES = """() => [...document.querySelectorAll(".majicflux_text")].filter(
    e => e.checkVisibility() && e.innerText.trim()).map(e => e.innerText)"""


def outputs(*rates: float | None) -> dict[str, dict[str, Any]]:
    """The longest texts that nodes show, in the language of the messages."""
    dit = say(
        "Flux.1 transformer, {blocks} blocks of width {width}, {size}",
        blocks="19 + 38",
        width=3072,
        size="11.90 B, 11.91 GB: float8_e4m3fn 98%, bfloat16 2%, 123.4 s",
    )
    return {
        "MajicFluxDiTLoader": {"text": f"majicflus_v1.safetensors: {dit}"},
        "MajicFluxTextEncoders": {"text": f"clip_l.safetensors, t5xxl_fp16.safetensors: {dit}"},
        "MajicFluxPipeline": a_real_plan(*rates),
        "MajicFluxSample": {"text": a_real_report()},
        "MajicFluxDenoise": {"text": a_real_report()},
    }


def require_no_overlap(page: Page, name: str) -> None:
    for (one, a), (other, b) in combinations(page.evaluate(BOXES), 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{name}: {one} and {other}"


@pytest.mark.parametrize(("width", "height", "language", "nodes2"), SCREENS)
def test_templates_open_legibly_and_nothing_overlaps_or_is_cut_off(
    open_canvas, width: int, height: int, language: str, nodes2: bool
) -> None:
    page = open_canvas(None, language, nodes2, (width, height))
    speak(lambda: language.partition("-")[0])
    try:
        done = outputs()
    finally:
        speak(lambda: "en")
    for name in NAMES:
        page.evaluate(
            "([w, name]) => app.loadGraphData(w, true, true, name, { openSource: 'template' })",
            [read(WORKFLOWS / f"{name}.json"), name],
        )
        page.wait_for_timeout(700)
        assert not page.evaluate("app.canvas.low_quality"), name
        require_no_overlap(page, name)
        assert page.evaluate(CLIPPED) == [], name
        page.evaluate(DONE, done)
        page.wait_for_timeout(700)
        require_no_overlap(page, name)
        assert page.evaluate(CLIPPED) == [], name
        for text in page.evaluate(LINES):
            shown = [line.strip() for line in text.strip().splitlines()]
            of = [o["text"].splitlines() for o in done.values() if o["text"] in text]
            assert any([x.strip() for x in lines] == shown[-len(lines) :] for lines in of), text
        if not nodes2:
            heights = "() => app.rootGraph.nodes.map(n => [n.type, n.size[1]])"
            for kind, tall in page.evaluate(heights):
                assert kind != "MajicFluxSample" or tall <= SAMPLE_HEIGHT, name


@pytest.mark.parametrize("language", ["zh-CN", "en-US"])
def test_a_new_user_is_five_clicks_from_the_first_picture(
    open_canvas, server: Server, newest: bool, language: str
) -> None:
    page = open_canvas(None, language, newest, (1366, 650))
    group = {"zh-CN": "MajicFlux 麦橘超然", "en-US": "MajicFlux"}[language]
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")  # one click
    page.get_by_role("dialog").get_by_text(group, exact=True).first.click()
    cards = page.locator("[data-testid^=template-workflow-]")
    cards.first.wait_for(timeout=30_000)
    listed = [card.get_attribute("data-testid") for card in cards.all()]
    assert listed == [f"template-workflow-{name}" for name in NAMES]
    cards.first.click()
    page.wait_for_function("app.rootGraph.nodes.some(n => n.type === 'MajicFluxSample')")
    page.wait_for_timeout(1000)
    assert not page.evaluate("app.canvas.low_quality")
    for name in ("width", "height", "steps"):  # so that it takes a second
        page.evaluate(
            "([name, value]) => { app.rootGraph.nodes.find(n => n.type === 'MajicFluxSample')"
            ".widgets.find(w => w.name === name).value = value }",
            [name, 1 if name == "steps" else 64],
        )
    page.evaluate(
        "() => { app.rootGraph.nodes.find(n => n.type === 'MajicFluxSample')"
        ".widgets.find(w => w.name === 'size').value = 'width x height' }"
    )
    press_run(page)
    page.wait_for_function(ALL_SHOWN, timeout=60_000)


@pytest.mark.parametrize("nodes2", [True, False])
def test_a_doctor_from_the_menu_is_as_large_as_its_text(open_canvas, nodes2: bool) -> None:
    page = open_canvas(made_small(), nodes2=nodes2)
    page.evaluate(
        "() => { const node = LiteGraph.createNode('MajicFluxDoctor');"
        " node.pos = [1700, 0]; app.rootGraph.add(node) }"
    )
    text = "\n".join(
        ["MajicFlux: a line as long as those that tell of the card and the files"] * 30
    )
    page.evaluate(DONE, {"MajicFluxDoctor": {"text": text}})
    page.wait_for_timeout(700)
    assert page.evaluate(CLIPPED) == []
    width, height = page.evaluate(
        "[...app.rootGraph.nodes.find(n => n.type === 'MajicFluxDoctor').size]"
    )
    assert width >= 400
    assert 450 < height < 800, "two lines, or one column of words"


@pytest.mark.parametrize(("language", "word"), [("zh-CN", "麦橘超然"), ("en-US", "majicflux")])
def test_the_brand_finds_loader_and_sample_node_first(
    open_canvas, language: str, word: str
) -> None:
    page = open_canvas(None, language)
    page.evaluate("app.registerNodes()")
    page.wait_for_timeout(1000)
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.keyboard.type(word)
    titles = {
        "zh-CN": ["麦橘 float8 DiT 加载器", "麦橘采样"],
        "en-US": ["Majic float8 DiT loader", "sample"],
    }[language]
    page.get_by_role("option").filter(has_text=titles[0]).first.wait_for(timeout=10_000)
    page.wait_for_timeout(500)  # in which the list becomes that of the whole word
    found = [text.splitlines()[0] for text in page.get_by_role("option").all_inner_texts()]
    assert found[:2] == titles
    assert len(found) >= 10


def test_the_console_names_nothing_of_ours(open_canvas, server: Server) -> None:
    said: dict[bool, list[str]] = {}
    for ours in (False, True):
        lines = said[ours] = []
        page = open_canvas(None)
        if not ours:
            page.route("**/majicflux.js", lambda route: route.fulfill(
                body="", content_type="text/javascript"))  # fmt: skip
        page.on("console", lambda m, lines=lines: lines.append(m.text)
                if m.type in ("error", "warning") else None)  # fmt: skip
        page.on("pageerror", lambda error, lines=lines: lines.append(str(error)))
        page.reload()
        page.wait_for_function(READY, timeout=60_000)
        page.wait_for_timeout(2000)
        page.evaluate("workflow => app.loadGraphData(workflow)", made_small())
        press_run(page)
        page.wait_for_function(ALL_SHOWN, timeout=60_000)
    assert set(said[True]) <= set(said[False])
