"""Translators in folders as they are published, read by Transformers and run on the CPU.

Marian, such as Helsinki-NLP/opus-mt-zh-en, translates clause by clause; an instruction model of
the Qwen2.5 or Qwen3 family sentence by sentence. Only safetensors are read, nothing is fetched,
and no code of a folder is run. Both are greedy or search by beams, so that a text has one
translation.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..loaders.safetensors_file import ModelFileError, SafetensorsFile
from ..messages import command_line, say
from .frame import Unit, translated

BEAMS = 2  # of Marian: the 4 that were published take twice as long
MOST_REASON = 200  # characters of another library's message
MOST_KNOWN = 4096  # translations that are remembered
INSTRUCTION = (
    "Translate the text into English. It is part of the description of a picture. Keep every "
    "detail and add none. Answer with the translation only, in one line."
)
THINKING, END_OF_THINKING = "<think>", "</think>"
PICKLES = (".bin", ".pt", ".pth")
FOLDER = "translation"  # of a models folder; translators lie in it, or one deeper, by their makers


@dataclass(frozen=True)
class Kind:
    """Of translators: its class in Transformers, the files of its tokenizer, what it reads at
    once."""

    class_name: str
    files: tuple[str, ...]
    unit: Unit


KINDS = {  # by the model_type in config.json
    "marian": Kind("MarianMTModel", ("source.spm", "target.spm", "vocab.json"), Unit.CLAUSE),
    "qwen2": Kind("Qwen2ForCausalLM", ("tokenizer.json",), Unit.SENTENCE),
    "qwen3": Kind("Qwen3ForCausalLM", ("tokenizer.json",), Unit.SENTENCE),
}


class Translator:
    """Prompts in Chinese -> prompts in English. Remembers the translation of each text."""

    def __init__(self, translate: Callable[[str], str], unit: Unit):
        self._translate, self._unit = translate, unit
        self._known: dict[str, str] = {}

    def __call__(self, prompt: str, before_text: Callable[[], None] = lambda: None) -> str:
        """before_text: called before each text that is new, and may raise."""

        def english(texts: Sequence[str]) -> list[str]:
            for text in texts:
                if text not in self._known:
                    before_text()
                    self._known[text] = self._translate(text) or text
            found = [self._known[text] for text in texts]
            while len(self._known) > MOST_KNOWN:
                del self._known[next(iter(self._known))]
            return found

        return translated(prompt, english, self._unit)


def inspect_translator(folder: Path) -> Kind:
    """What a folder translates with, from its config and the headers of its weights.

    Raises ModelFileError when it is no translator, or lacks a file.
    """
    kind = _kind(folder)
    missing = [name for name in kind.files if not (folder / name).is_file()]
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
        if pickles:
            raise ModelFileError(_pickled(folder, pickles[0]))
        missing.append("model.safetensors")
    if missing:
        raise ModelFileError(
            say(
                "{folder} lacks {files}. Download the whole folder again.",
                folder=folder,
                files=", ".join(missing),
            )
        )
    for path in weights:
        SafetensorsFile(path)
    return kind


def load_translator(folder: Path) -> Translator:
    """Raises ModelFileError when the folder is damaged, or a package is missing."""
    kind = inspect_translator(folder)
    load = _marian if kind.unit is Unit.CLAUSE else _qwen
    try:
        return Translator(load(folder, kind.class_name), kind.unit)
    except ModelFileError:
        raise
    except Exception as error:  # anything: transformers checks little of what it reads
        reason = str(error).strip().partition("\n")[0][:MOST_REASON] or type(error).__name__
        raise ModelFileError(
            say(
                "The translator in {folder} cannot be loaded ({reason}). Download that folder "
                "again.",
                folder=folder,
                reason=reason,
            )
        ) from error


def _kind(folder: Path) -> Kind:
    config = folder / "config.json"
    try:
        name = json.loads(config.read_bytes())["model_type"]
    except OSError as error:
        raise ModelFileError(
            say("{file} cannot be opened: {reason}.", file=config, reason=error)
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelFileError(
            say("{file} does not say which model this is. Download it again.", file=config)
        ) from error
    if not isinstance(name, str) or name not in KINDS:
        raise _wrong_kind(folder, name)
    return KINDS[name]


def _wrong_kind(folder: Path, kind: object) -> ModelFileError:
    return ModelFileError(
        say(
            "{folder} is a model of the kind {kind}, which does not translate here. Take "
            "opus-mt-zh-en, or an instruction model of the Qwen2.5 or Qwen3 family.",
            folder=folder,
            kind=kind,
        )
    )


def _pickled(folder: Path, name: str) -> str:
    place = next((each for each in folder.parents if each.name == FOLDER), folder.parent)
    command = command_line(f'download translator --models "{place.parent}"')
    return say(
        "{file} is a Python pickle, which can run code when opened. Make safetensors of it once, "
        "without running any: {command} with ComfyUI's own Python.",
        file=folder / name,
        command=command,
    )


def _marian(folder: Path, class_name: str) -> Callable[[str], str]:
    try:
        import sentencepiece  # noqa: F401  # which Transformers would miss with less of a sentence
    except ImportError as error:
        raise ModelFileError(
            say(
                "The translator in {folder} needs a package that is not installed: {command}",
                folder=folder,
                command="python -m pip install sentencepiece",
            )
        ) from error
    import torch
    from transformers import MarianTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sacremoses, which would only mend punctuation
        tokenizer: Any = MarianTokenizer.from_pretrained(str(folder), local_files_only=True)
    if not (tokenizer.target_lang or "en").startswith("en"):  # "eng" of a pair with Chinese
        raise _wrong_kind(folder, f"{tokenizer.source_lang} - {tokenizer.target_lang}")
    model = _model(folder, class_name, torch.float32, tokenizer)

    def translate(text: str) -> str:
        tokens = tokenizer(text, return_tensors="pt")
        most = 2 * tokens.input_ids.shape[1] + 16
        with torch.inference_mode():
            made = model.generate(**tokens, max_length=most, num_beams=BEAMS, do_sample=False)
        return tokenizer.decode(made[0], skip_special_tokens=True)

    return translate


def _qwen(folder: Path, class_name: str) -> Callable[[str], str]:
    import torch
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)

    def question(text: str) -> str:
        asked = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": text},
        ]
        return tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    if question("").rstrip().endswith(THINKING):  # it would, at length, whatever is said
        raise _wrong_kind(folder, f"{class_name} {THINKING}")
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    model = _model(folder, class_name, torch.bfloat16 if fast else torch.float32, tokenizer)

    def translate(text: str) -> str:
        tokens = tokenizer(question(text), add_special_tokens=False, return_tensors="pt")
        ids, most = tokens.input_ids, 3 * len(tokenizer(text).input_ids) + 32
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=tokens.attention_mask, max_new_tokens=most, num_beams=1,
                do_sample=False, temperature=None, top_p=None, top_k=None,
            )  # fmt: skip
        answer = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        return " ".join(answer.rpartition(END_OF_THINKING)[2].split())

    return translate


def _model(folder: Path, class_name: str, dtype: Any, tokenizer: Any) -> Any:
    """Raises ValueError unless the folder has every weight, and a row for each token."""
    import transformers

    model, found = getattr(transformers, class_name).from_pretrained(
        str(folder),
        local_files_only=True,
        use_safetensors=True,
        dtype=dtype,
        output_loading_info=True,
    )
    if found["missing_keys"]:
        raise ValueError(say("it lacks the weight {name}", name=min(found["missing_keys"])))
    if max(tokenizer.get_vocab().values()) >= model.config.vocab_size:
        raise ValueError(say("its tokenizer is that of another model"))
    return model.eval()
