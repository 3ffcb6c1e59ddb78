"""The node that translates a prompt."""

import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..downloads import model_folders
from ..downloads.catalogue import TRANSLATION, TRANSLATOR
from ..engine.flux.prompts import require_length
from ..host import current as host
from ..loaders.safetensors_file import ModelFileError
from ..messages import log, say
from ..translation.frame import has_chinese, plain
from .arguments import checked
from .sockets import CATEGORY, Node, found_by, io

if TYPE_CHECKING:
    from ..translation.translator import Translator

State = tuple[tuple[str, int, int], ...]


def _options() -> dict[str, Any]:
    """`options` and `default` of the combo: the small translator, or the first other one."""
    names = [*model_folders.whole_folders(TRANSLATION)]
    small = [name for name in names if TRANSLATOR in name]
    return {"options": names, "default": (small or names or [""])[0]}


class Translate(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxTranslate",
            display_name="translate prompt",
            category=CATEGORY,
            description="Translates the Chinese in a prompt into English, on this machine and "
            "without a network. English, weights, brackets, line breaks and quoted text stay as "
            "they are.",
            search_aliases=found_by(
                "translate, translation, chinese prompt, opus-mt, qwen",
                "翻译, 中文提示词, 中译英, 麦橘 超然",
            ),
            inputs=[
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="In Chinese, English or both. (词:1.3) keeps its weight; “quoted text” "
                    "stays in Chinese, to be painted.",
                ),
                io.Combo.Input(
                    "model",
                    optional=True,
                    tooltip="A folder in models/translation: opus-mt-zh-en, which is small and "
                    "fast, or a Qwen2.5 or Qwen3 instruction model, for long sentences.",
                    **_options(),
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.String.Output(
                    display_name="english", tooltip="The prompt in English, for a prompt input."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, model: str = "") -> bool | str:
        from ..translation.translator import inspect_translator

        folder = model_folders.whole_folders(TRANSLATION).get(model or "")
        try:
            if folder is not None:  # without one the prompt stays as it is
                inspect_translator(folder)
        except ModelFileError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model: str | None = "", **others: Any) -> Any:
        folder = model_folders.whole_folders(TRANSLATION).get(model or "")
        return None if folder is None else _state(folder)

    @classmethod
    @checked
    def execute(cls, prompt: str, model: str = "") -> io.NodeOutput:
        require_length(prompt)
        if not has_chinese(prompt):
            return io.NodeOutput(plain(prompt), ui=host.node_text([plain(prompt)]))
        if model not in model_folders.whole_folders(TRANSLATION):
            stays = say(
                "The prompt stays in Chinese, which T5 cannot read and CLIP-L hardly: the picture "
                "will follow it poorly."
            )
            lines = [stays, _missing(model)]
            log.warning("%s", " ".join(lines))
            return io.NodeOutput(prompt, ui=host.node_text(lines))
        start = time.perf_counter()
        english = translator_of(model)(prompt, host.check_cancelled)
        seconds = time.perf_counter() - start
        log.info("%s (%s, %.1f s)", english, model, seconds)
        by = say("translated by {model}, {seconds:.1f} s", model=model, seconds=seconds)
        return io.NodeOutput(english, ui=host.node_text([english, by]))


def translator_of(model: str) -> "Translator":
    """The model of that name, read once.

    Raises ModelFileError when it is not in the host's folders, or cannot be used.
    """
    folder = model_folders.whole_folders(TRANSLATION).get(model)
    if folder is None:
        raise ModelFileError(_missing(model))
    return _translator(folder, _state(folder))


def _missing(model: str) -> str:
    return say(
        "No translator {model} is in models/translation. Fetch {known} with {command} and "
        "ComfyUI's own Python, then press R and choose it.",
        model=model or TRANSLATOR,
        known=TRANSLATOR,
        command=model_folders.download_command(TRANSLATION, "translator"),
    )


@lru_cache(maxsize=1)  # they are large, and their use is over in seconds
def _translator(folder: Path, state: State) -> "Translator":
    from ..translation.translator import load_translator

    return load_translator(folder)


def _state(folder: Path) -> State:
    """Changes when a file of the folder does: name, bytes and time of each."""
    found = [(p.name, p.stat()) for p in sorted(folder.iterdir()) if p.is_file()]
    return tuple((name, s.st_size, s.st_mtime_ns) for name, s in found)
