"""The two tokenizers of the little world, in the files that those of Flux.1 come in.

T5's pieces are the words of the captions, CLIP's merges build the same words from bytes. An English
word that neither knows is spelled; a Chinese sign that T5 does not know is its unknown piece.
"""

import json
import random
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...loaders.tokenizers import CLIP_TOKENIZER, PADDING_ROWS, T5_TOKENIZER, load_tokenizer
from .captions import caption, phrases
from .scenes import draw_scene

CLIP_ROWS, T5_ROWS = 1024, 512
CLIP_LENGTH, T5_LENGTH = 77, 64  # tokens in training; the pack fills up T5's to 512
SAMPLES = 8000  # scenes that are told of to find every word
LETTERS = string.ascii_letters + string.digits + ",.;:!?'\"()-/&+%，。、；：！？"
WORD_START = "\u2581"  # how a Unigram model writes the space before a word
WORD_END = "</w>"  # and a BPE model of CLIP the end of one
PAD, END, UNKNOWN = 0, 1, 2  # T5's


class Words:
    """Prompt -> ids, as the pack makes them, from the files of `write_tokenizers`."""

    def __init__(self, folder: Path):
        beside = folder / "model.safetensors"  # which need not be there
        self.clip = load_tokenizer(CLIP_TOKENIZER, beside, CLIP_ROWS, bundled=None)
        self.t5 = load_tokenizer(T5_TOKENIZER, beside, T5_ROWS, bundled=None)
        self._start, self._end = self.clip("").input_ids

    def __call__(self, prompt: str, length: int = T5_LENGTH) -> tuple[list[int], list[int]]:
        """`length` ids for T5 and 77 for CLIP."""
        t5 = [*self.t5(prompt, add_special_tokens=False).input_ids[: length - 1], END]
        clip = self.clip(prompt, add_special_tokens=False).input_ids[: CLIP_LENGTH - 2]
        clip = [self._start, *clip, self._end]
        return (
            t5 + [PAD] * (length - len(t5)),
            clip + [self._end] * (CLIP_LENGTH - len(clip)),
        )


def write_tokenizers(folder: Path) -> None:
    """The same files at every call."""
    _write_t5(folder / T5_TOKENIZER.folder)
    _write_clip(folder / CLIP_TOKENIZER.folder)


def _words() -> tuple[set[str], set[str]]:
    """The English words of the captions, with a capital where they may begin one, and Chinese."""
    english, chinese = {"an", "An"}, set()
    for seed in range(SAMPLES):
        r = random.Random(seed)
        for in_english, in_chinese in phrases(draw_scene(r), r):
            words = in_english.split()
            english |= {*words, words[0][0].upper() + words[0][1:]}
            chinese |= {word for word in in_chinese.split("|") if not word.isascii()}
    return english, chinese


def _write_t5(folder: Path) -> None:
    """A Unigram model whose pieces are all as likely, so that the fewest of them win."""
    from tokenizers import Tokenizer, models

    special = ["<pad>", "</s>", "<unk>"]
    english, chinese = _words()
    pieces = [
        WORD_START,
        *LETTERS,
        *(WORD_START + word for word in sorted(english)),
        *sorted(chinese),
    ]
    scored = [*((piece, 0.0) for piece in special), *((piece, -2.0) for piece in pieces)]
    if not T5_ROWS - PADDING_ROWS < len(scored) <= T5_ROWS:
        raise RuntimeError(f"{len(scored)} pieces do not fit {T5_ROWS} rows")
    folder.mkdir(parents=True, exist_ok=True)
    Tokenizer(models.Unigram(scored, unk_id=UNKNOWN)).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5TokenizerFast", "extra_ids": 0}
    _write_json(folder / "tokenizer_config.json", config)


def _write_clip(folder: Path) -> None:
    """A byte-level BPE with as many merges as there is room for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = dict.fromkeys([*letters, *(letter + WORD_END for letter in letters)])
    merges = []
    for pair in _merges(letters):
        if len(tokens) == CLIP_ROWS - 2:
            break
        tokens["".join(pair)] = None
        merges.append(" ".join(pair))
    # CLIP pools at the highest id, so the end of the text must come last.
    ids = {token: n for n, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", ids)
    lines = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "merges.txt").write_text(lines, encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_LENGTH}
    _write_json(folder / "tokenizer_config.json", config)


def _merges(letters: list[str]) -> list[tuple[str, str]]:
    """The pairs that are most worth merging, learnt from captions in both languages."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2 * CLIP_ROWS,
        min_frequency=2,
        end_of_word_suffix=WORD_END,
        initial_alphabet=letters,
        show_progress=False,
    )
    bpe.train_from_iterator(_runs(), trainer)
    return [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]


def _runs() -> Iterator[str]:
    """What CLIP takes for words: English ones, Chinese up to the next mark, and the marks."""
    for seed in range(SAMPLES):
        r = random.Random(seed)
        text = caption(draw_scene(r), r, chinese=seed % 2 == 1).lower()
        yield from re.findall(r"[^\W\d]+|\d|[^\s\w]+", text)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
