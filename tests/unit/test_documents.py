"""The documents: the same in both languages, with the figures, names and files of today."""

import json
import re
import shlex
from pathlib import Path

import pytest

from majicflux import cli
from majicflux.engine.flux.geometry import ControlGeometry, FluxGeometry
from majicflux.engine.plan import estimate
from majicflux.engine.plan.plan import DENOISE, Plan
from majicflux.engine.plan.units import GB, in_gb_above
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.engine.sampling.schedules import SCHEDULES
from majicflux.engine.sampling.solvers import SOLVERS
from majicflux.nodes import NODES
from majicflux.nodes.pipeline import COMPUTE_PRECISIONS, INT8_ATTENTION

ROOT = Path(__file__).parents[2]
PAIRS = [(english, english.with_suffix(".zh-CN.md")) for english in (
    ROOT / "README.md", *(path for path in (ROOT / "docs").glob("*.md") if "zh-CN" not in path.name)
)]  # fmt: skip
PAGES = [page for pair in PAIRS for page in pair]
LINKED = [
    *PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
]
LEFT_TO_OTHERS = 1  # GB of a card, in the recommended budget
LANGUAGES = ("en", "ja", "zh", "zh-TW")
CARDS = (4, 6, 8, 12, 16, 24)
SIDES = (512, 1024, 2048)


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: names(pair[0]))
def test_both_languages_have_the_same_parts(pair: tuple[Path, Path]) -> None:
    def shape(page: Path) -> list[str]:
        marks = ("###", "##", "#", "```", "|", "![", "- ", "1. ")
        lines = text(page).splitlines()
        return [next(m for m in marks if x.startswith(m)) for x in lines if x.startswith(marks)]

    def commands(page: Path) -> list[str]:
        return re.findall(r"^```\n(.+?)^```", text(page), re.DOTALL | re.MULTILINE)

    english, chinese = pair
    assert shape(english) == shape(chinese)
    assert commands(english) == commands(chinese)


@pytest.mark.parametrize("page", LINKED, ids=names)
def test_links_lead_somewhere(page: Path) -> None:
    def anchors(target: Path) -> set[str]:
        titles = re.findall(r"^#+ (.+)", text(target), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    for link in re.findall(r"\]\((?!https?:)(.+?)\)", text(page)):
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize(("page", "language"), [("README.md", "en"), ("README.zh-CN.md", "zh")])
def test_every_node_is_there_under_its_name_on_the_canvas(page: str, language: str) -> None:
    titles = json.loads(text(ROOT / "locales" / language / "nodeDefs.json"))
    first_cells = "\n".join(re.findall(r"^\| (.+?) \|", text(ROOT / page), re.MULTILINE))
    for node in NODES:
        assert titles[node.define_schema().node_id]["display_name"] in first_cells


def test_nodes_are_called_by_their_titles_in_chinese() -> None:
    """As a reader finds them on the canvas: not “采样节点” for 麦橘采样."""
    locales = [*ROOT.glob("locales/zh*/*.json")]
    pages = [*locales, *ROOT.glob("web/docs/*/zh.md"), *(chinese for _, chinese in PAIRS)]
    titles = {
        node["display_name"]
        for path in locales if path.name == "nodeDefs.json"
        for node in json.loads(text(path)).values()
    }  # fmt: skip
    branded = [title[2:] for title in titles if title[:2] in ("麦橘", "麥橘")]
    assert {"采样", "取樣"} < {*branded}
    bare = re.compile(f"(?<![麦麥]橘)({'|'.join(branded)})[”」]?(节点|節點)")
    found = {names(path): bare.findall(text(path)) for path in pages}
    assert not any(found.values()), found


@pytest.mark.parametrize("page", [
    "README.md", "README.zh-CN.md", "docs/sampling.md", "docs/sampling.zh-CN.md",
    *(f"web/docs/MajicFlux{node}/{code}.md" for node in ("Sample", "EncodePrompt")
      for code in ("en", "zh")),
])  # fmt: skip
def test_who_writes_a_prompt_is_told_that_it_is_read_in_english(page: str) -> None:
    told = text(ROOT / page)
    assert re.search("T5 cannot read Chinese.*CLIP-L hardly|T5 读不了中文.*CLIP-L 几乎读不了", told)
    assert not re.search("English (or|and) Chinese prompt|(中英文|中文英文)都可以", told)


IN_ONE_HOP = (
    "#lora", "#controlnet", "Kontext.+Fill.+Redux", "docs/sampling", "docs/settings", "docs/batch",
    "docs/compare", "docs/from-gradio", "benchmarks/README.md", "Ray", "8 bits|8 位注意力",
    "need not be computed|不必计算的步", "Chinese prompts|中文提示词", "2.06.+4.32.+2.12.+6.63",
)  # fmt: skip
NOT_THERE = ("IP-Adapter", "PuLID", "XLabs", "GGUF", "nunchaku", "NVIDIA")


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_page_one_begins_with_what_it_does_and_a_picture_then_the_sure_way_to_install(
    page: str,
) -> None:
    opening, install, on_a_bare_machine, limits = text(ROOT / page).split("\n## ")[:4]
    assert opening.index("DiffSynth") < opening.index("![")
    assert all(re.search(found, opening) for found in IN_ONE_HOP)
    assert f"](#{limits.splitlines()[0].lower().replace(' ', '-')})" in opening
    assert all(missing in limits for missing in NOT_THERE)
    by_hand = install.index("pip install -r custom_nodes/majicflux/requirements.txt")
    unreleased = re.search("need a published release|需要已经发布的版本", install)
    assert by_hand < unreleased.start() < install.index("comfy node install")
    assert "\npython dev.py demo\npython dev.py test\n" in on_a_bare_machine


COMMAND = re.compile(
    r"(?:^|`)(?:\.venv/bin/|python custom_nodes/)?majicflux ([a-z][^`\n]*)", re.MULTILINE
)


@pytest.mark.parametrize("page", [*LINKED, *ROOT.glob("web/docs/*/*.md")], ids=names)
def test_every_command_that_is_shown_is_one(page: Path) -> None:
    commands = {command.__name__.rpartition(".")[2] for command in cli.COMMANDS} | {"demo-models"}
    for shown in map(shlex.split, COMMAND.findall(text(page))):
        assert shown[0] in commands
        if shown[1:]:  # else it is the command's name alone
            cli._parser().parse_args(shown)


def test_the_changelog_begins_with_this_version() -> None:
    (version,) = re.findall(r'^version = "(.+)"', text(ROOT / "pyproject.toml"), re.MULTILINE)
    assert re.findall(r"^## (.+)", text(ROOT / "CHANGELOG.md"), re.MULTILINE)[0] == version


CHOICES = [*PRECISIONS, *COMPUTE_PRECISIONS, *INT8_ATTENTION]


def test_every_choice_is_explained() -> None:
    for suffix in (".md", ".zh-CN.md"):
        settings, about_sampling = (
            text(ROOT / "docs" / f"{n}{suffix}") for n in ("settings", "sampling")
        )
        assert all(f" `{name}` |" in settings for name in CHOICES)
        assert all(f"`{n}`" in about_sampling for n in [*SOLVERS, *SCHEDULES])


def planned(
    gb: float, side: int = 1024, channels: int = 64, references: int = 0, union_pros: int = 0
) -> Plan:
    """references: of 1024 x 1024; union_pros: control nets, Union-Pro 2.0's."""
    given = (PRECISIONS["float8_e4m3fn"], (side, side, 1, 20), gb, True, None, None)
    geometry = FluxGeometry(in_channels=channels)
    seen = [(1024, 1024)] * references, [ControlGeometry()] * union_pros
    return estimate.estimate_plan(geometry, *given, *seen)


def in_gb(size: int) -> str:
    return f"{size / GB:.2f} GB"


def travelling(gb: float, *job: int) -> str:
    return in_gb(planned(gb, *job).of(DENOISE).visiting)


def rows(*cells: list[object]) -> str:
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in cells)


@pytest.mark.parametrize(("page", "kontext"), [
    ("README.md", "Kontext with one reference"), ("README.zh-CN.md", "Kontext 带一张参考图"),
])  # fmt: skip
def test_the_figures_of_the_readmes_are_the_planners(page: str, kontext: str) -> None:
    jobs = {f"{side}×{side}": (side,) for side in SIDES}
    jobs |= {
        f"1024×1024, {kontext}": (1024, 64, 1),
        "1024×1024, Fill": (1024, 384),
        "1024×1024, ControlNet Union-Pro 2.0": (1024, 64, 0, 1),
    }

    def row(name: str, job: tuple[int, ...]) -> list[object]:
        smallest = in_gb_above(planned(4, *job).smallest_bytes)
        name = name.replace(", ", "，") if "zh" in page else name
        return [name, f"{smallest} GB", *(travelling(gb, *job) for gb in (4, 8, 12))]

    assert rows(*(row(*each) for each in jobs.items())) in text(ROOT / page)


@pytest.mark.parametrize("path", [
    "README.md", "README.zh-CN.md", "web/docs/MajicFluxPipeline/en.md",
    "web/docs/MajicFluxPipeline/zh.md", *(f"locales/{code}/nodeDefs.json" for code in LANGUAGES),
])  # fmt: skip
def test_a_budget_is_named_for_each_small_card(path: str) -> None:
    for card in CARDS[:3]:
        budget = card - LEFT_TO_OTHERS
        assert re.search(rf"\b{card} GB[^\d.]* {budget}\b", text(ROOT / path))


@pytest.mark.parametrize("page", ["settings.md", "settings.zh-CN.md"])
def test_the_figures_for_each_card_are_the_planners(page: str) -> None:
    def row(card: int) -> list[object]:
        gb = card - LEFT_TO_OTHERS
        plan = planned(gb)
        plan.require_budget()
        steps = [travelling(gb, side) for side in SIDES]
        return [f"{card} GB", gb, in_gb(plan.peak_bytes), *steps, in_gb(plan.stages[1].once)]

    found = text(ROOT / "docs" / page)
    assert rows(*map(row, CARDS)) in found
    assert in_gb(planned(max(CARDS) - LEFT_TO_OTHERS).stages[0].visiting) in found
