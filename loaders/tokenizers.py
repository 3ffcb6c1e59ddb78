"""The two tokenizers, found beside the model files or in the host's own bundle."""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..messages import say
from .safetensors_file import ModelFileError

# A vocabulary is padded up to a multiple of 128 rows in the model, so it may be a little shorter.
PADDING_ROWS = 128
COMPANIONS = ("torchvision", "torchaudio")  # Transformers imports them, and fails where they do


@dataclass(frozen=True)
class TokenizerKind:
    """What a tokenizer is called and in which files it is kept."""

    name: str
    folder: str  # in the FLUX.1 repositories
    class_name: str  # in transformers
    files: tuple[tuple[str, ...], ...]  # any one of these sets is enough


CLIP_TOKENIZER = TokenizerKind(
    "CLIP-L", "tokenizer", "CLIPTokenizer", (("tokenizer.json",), ("vocab.json", "merges.txt"))
)
T5_TOKENIZER = TokenizerKind(
    "T5", "tokenizer_2", "T5TokenizerFast", (("tokenizer.json",), ("spiece.model",))
)


def load_tokenizer(
    kind: TokenizerKind, model_path: Path, vocabulary: int, bundled: Path | None
) -> Any:
    """The tokenizer that goes with a text encoder of `vocabulary` rows.

    Looked for beside the model file, one folder up (the layout of the FLUX.1 repositories), then
    in the host's bundle. One with another vocabulary is passed over: its ids would mean nothing.
    Raises ModelFileError when there is none.
    """
    candidates = [model_path.parent / kind.folder, model_path.parent.parent / kind.folder]
    if bundled is not None:
        candidates.append(bundled)
    for folder in candidates:
        if not any(all((folder / name).is_file() for name in files) for files in kind.files):
            continue
        tokenizer = _class_of(kind).from_pretrained(str(folder), local_files_only=True)
        if 0 <= vocabulary - len(tokenizer) < PADDING_ROWS:
            return tokenizer
    raise ModelFileError(
        say(
            "No {kind} tokenizer with {entries} entries was found for {file}. Put the folder "
            "{folder} of the FLUX.1-dev repository beside the file, as {place}.",
            kind=kind.name,
            entries=vocabulary,
            file=model_path.name,
            folder=kind.folder,
            place=candidates[0],
        )
    )


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
            say(
                "Transformers cannot import its {kind} tokenizer: {reason}",
                kind=kind.name,
                reason=reason,
            )
        ) from error


def misfits() -> list[str]:
    """The packages beside PyTorch that are made for another version of it, with what to do."""
    import torch

    found = []
    for name in COMPANIONS:
        if find_spec(name) is None:
            continue
        try:
            import_module(name)
        except Exception as error:  # anything: a missing symbol is an OSError
            found.append(
                say(
                    "{package} does not fit PyTorch {torch} ({reason}). Install the one made for "
                    "it, or remove it: pip uninstall {package}",
                    package=name,
                    torch=torch.__version__,
                    reason=str(error).partition("\n")[0],
                )
            )
    return found
