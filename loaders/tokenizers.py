"""The two tokenizers, found beside the model files or in the host's own bundle."""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..engine.torch_state import torch
from ..messages import say
from .safetensors_file import ModelFileError

# A vocabulary is padded up to a multiple of 128 rows in the model, so it may be a little shorter.
PADDING_ROWS = 128
MOST_REASON = 200  # characters of another library's message
COMPANIONS = ("torchvision", "torchaudio")  # Transformers imports them, and fails where they do


@dataclass(frozen=True)
class TokenizerKind:
    """What a tokenizer is called and in which files it is kept."""

    name: str
    folder: str  # in the FLUX.1 repositories
    class_name: str  # in transformers
    files: tuple[tuple[str, ...], ...]  # any one of these sets is enough
    ends: int  # tokens that mark start and end
    bundled: tuple[str, ...]  # where ComfyUI has it, in its folder `comfy`


CLIP_TOKENIZER = TokenizerKind(
    "CLIP-L", "tokenizer", "CLIPTokenizer", (("tokenizer.json",), ("vocab.json", "merges.txt")), 2,
    ("sd1_tokenizer",),
)  # fmt: skip
T5_TOKENIZER = TokenizerKind(
    "T5", "tokenizer_2", "T5TokenizerFast", (("tokenizer.json",), ("spiece.model",)), 1,
    ("text_encoders", "t5_tokenizer"),
)  # fmt: skip


def load_tokenizer(
    kind: TokenizerKind, model_path: Path, vocabulary: int, bundled: Path | None
) -> Any:
    """The tokenizer that goes with a text encoder of `vocabulary` rows.

    Looked for beside the model file, one folder up (the layout of the FLUX.1 repositories), then
    in the host's bundle. One with another vocabulary is passed over: its ids would mean nothing.
    Raises ModelFileError when there is none, or when it is damaged.
    """
    candidates = [model_path.parent / kind.folder, model_path.parent.parent / kind.folder]
    if bundled is not None:
        candidates.append(bundled)
    for folder in candidates:
        if not any(all((folder / name).is_file() for name in files) for files in kind.files):
            continue
        tokenizer_class = _class_of(kind)
        try:
            tokenizer = tokenizer_class.from_pretrained(str(folder), local_files_only=True)
            if not 0 <= vocabulary - len(tokenizer) < PADDING_ROWS:
                continue
            _try(kind, tokenizer, vocabulary)
        except Exception as error:  # anything: transformers checks little of what it reads
            reason = str(error).strip().partition("\n")[0][:MOST_REASON]
            raise ModelFileError(
                "The {kind} tokenizer in {folder} is damaged ({reason}). Download that folder "
                "again.",
                kind=kind.name,
                folder=folder,
                reason=reason or type(error).__name__,
            ) from error
        return tokenizer
    raise ModelFileError(
        "No {kind} tokenizer with {entries} entries was found for {file}. Put the one that belongs "
        "to it, such as {folder} of the FLUX.1-dev repository, beside the file, as {place}.",
        kind=kind.name,
        entries=vocabulary,
        file=model_path.name,
        folder=kind.folder,
        place=candidates[0],
    )


def _try(kind: TokenizerKind, tokenizer: Any, vocabulary: int) -> None:
    """Raise ValueError unless it gives what the encoders take."""
    empty = tokenizer("").input_ids
    words = tokenizer("a cat", add_special_tokens=False).input_ids
    largest = max(tokenizer.get_vocab().values())
    padded = tokenizer.pad_token_id is not None
    if len(empty) != kind.ends or not words or not padded or largest >= vocabulary:
        raise ValueError(say("it gives other tokens than the encoder takes"))


def _class_of(kind: TokenizerKind) -> Any:
    """Raises ModelFileError, with the reason behind it, where Transformers cannot import it."""
    try:
        import transformers

        return getattr(transformers, kind.class_name)
    except Exception as error:  # anything, from whatever it imports besides
        first: BaseException = error  # Transformers tells another one, which names no cause
        while first.__cause__ is not None:
            first = first.__cause__
        reason = "; ".join([str(first).partition("\n")[0], *misfits()])
        raise ModelFileError(
            "Transformers cannot import its {kind} tokenizer: {reason}",
            kind=kind.name,
            reason=reason,
        ) from error


def misfits() -> list[str]:
    """The packages beside PyTorch that are made for another version of it, with what to do."""
    lines = []
    for name in COMPANIONS:
        if find_spec(name) is None:
            continue
        try:
            import_module(name)
        except Exception as error:  # anything: a missing symbol is an OSError
            lines.append(
                say(
                    "{package} does not fit PyTorch {torch} ({reason}). Install the one made for "
                    "it, or remove it: pip uninstall {package}",
                    package=name,
                    torch=torch.__version__,
                    reason=str(error).partition("\n")[0],
                )
            )
    return lines
