"""Which inputs of which nodes are prompts."""

from collections.abc import Callable
from typing import Any

from ..translation.frame import has_chinese
from .encode_prompt import EncodePrompt
from .sample import Sample

PROMPT = "prompt"
NEGATIVE = "negative_prompt"
INPUTS = {
    Sample.define_schema().node_id: (PROMPT, NEGATIVE),
    EncodePrompt.define_schema().node_id: (PROMPT,),
}


def translate_prompts(graph: dict[str, Any], translate: Callable[[str], str]) -> list[str]:
    """Put the prompts of a graph that have Chinese in them into English; returns these."""
    translated = []
    for node in graph.values():
        for name in INPUTS.get(node["class_type"], ()):
            prompt = node["inputs"].get(name)
            if isinstance(prompt, str) and has_chinese(prompt):
                node["inputs"][name] = translate(prompt)
                translated.append(node["inputs"][name])
    return translated


def prompts_of(node: dict[str, Any]) -> dict[str, str]:
    """By input, the texts that a node of a graph encodes; not those that come over a link."""
    inputs = node["inputs"]
    texts = {name: inputs.get(name) for name in INPUTS.get(node["class_type"], ())}
    if inputs.get("positive") is not None:
        texts.pop(PROMPT, None)
    if inputs.get("cfg", 1) == 1 or inputs.get("negative") is not None:
        texts.pop(NEGATIVE, None)
    return {name: text for name, text in texts.items() if isinstance(text, str)}
