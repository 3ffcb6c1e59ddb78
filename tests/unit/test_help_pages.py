"""The help page of each node, in English and Chinese."""

import ast
import json
import re

import pytest
from rooms import FILES, ROOT

from majicflux.nodes import NODES

DOCS = ROOT / "web" / "docs"
LANGUAGES = ["en", "zh"]
NAMES = [node.define_schema().node_id for node in NODES]
# Of an error or a report, as a page quotes it; "…" stands for what differs.
QUOTE = re.compile('["“]([^"”]*…[^"”]*|[A-Z][^"”]* [^"”]*)["”]')
FIGURE = re.compile(r"\d+(?:\.\d+)?")


def page(node: str, language: str) -> str:
    return (DOCS / node / f"{language}.md").read_text(encoding="utf-8")


def texts(node: str, language: str) -> dict:
    path = ROOT / "locales" / language / "nodeDefs.json"
    return json.loads(path.read_text(encoding="utf-8"))[node]


def said_by_the_code() -> str:
    """Every string literal of the pack, those in several pieces as one."""
    strings = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    return "\n".join(strings)


def said_in(language: str, node: str) -> str:
    """The messages in another language, and what the canvas says of the node."""
    path = ROOT / "locales" / language / "messages.json"
    messages = json.loads(path.read_text(encoding="utf-8"))
    return "\n".join([*messages.values(), str(texts(node, language))])


def shown() -> set[str]:
    """The pictures in the pages; the canvas looks for them from the folder of all pages on."""
    texts = (page(node, language) for node in NAMES for language in LANGUAGES)
    return {path for text in texts for path in re.findall(r"!\[.+\]\((.+)\)", text)}


def test_pictures_are_there_and_small() -> None:
    assert shown()
    for path in shown():
        assert (DOCS / path).stat().st_size < 100_000


def test_every_node_has_its_pages_and_there_are_no_others() -> None:
    found = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.*")} - shown()
    assert found == {f"{node}/{language}.md" for node in NAMES for language in LANGUAGES}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node", NAMES)
def test_a_page_names_every_input_and_output_as_the_canvas_does(node: str, language: str) -> None:
    lines, names = page(node, language).splitlines(), texts(node, language)
    assert lines[0] == f"# {names['display_name']}"
    bold = re.findall(r"^- \*\*(.*?)\*\*(?:（`(\w+)`）)?[:：] ?\S", "\n".join(lines), re.MULTILINE)
    own = {i.id for node_class in NODES for i in node_class.define_schema().inputs}
    inputs = [(i["name"], key) for key, i in names.get("inputs", {}).items() if key in own]
    outputs = [(o["name"], "") for o in names["outputs"].values()]
    if language == "en":
        inputs = [(name, "") for name, _ in inputs]
    assert bold == inputs + outputs


@pytest.mark.parametrize("node", NAMES)
def test_both_languages_have_the_same_parts(node: str) -> None:
    def parts(language: str) -> list[str]:
        starts = re.findall(r"^(#+ |- |\w)", page(node, language), re.MULTILINE)
        return ["text" if start.isalpha() else start for start in starts]

    assert parts("en") == parts("zh")
    english, chinese = (set(FIGURE.findall(page(node, language))) for language in LANGUAGES)
    assert english <= chinese


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node", NAMES)
def test_what_a_page_quotes_is_what_the_code_says(node: str, language: str) -> None:
    code = said_by_the_code() if language == "en" else said_in(language, node)
    for quote in QUOTE.findall(page(node, language)):
        for piece in filter(None, (piece.strip(" .()") for piece in quote.split("…"))):
            assert re.sub(r"(?<=models/)\w+", "", piece) in code, quote
