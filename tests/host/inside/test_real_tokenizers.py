"""ComfyUI's bundled tokenizers, which have the vocabularies of the real text encoders."""

from pathlib import Path
from random import Random

import pytest

from majicflux.engine.flux.prompts import tokenize, weighted_segments
from majicflux.loaders.tokenizers import CLIP_TOKENIZER, T5_TOKENIZER, load_tokenizer

PROMPT = "赛博朋克 a cat, (masterpiece) on the roof's edge!"


@pytest.mark.parametrize("prompt", ["", PROMPT, "long words " * 300])
def test_ids_are_those_of_comfyuis_own_tokenizers(comfy, tmp_path: Path, prompt: str) -> None:
    from comfy.text_encoders.flux import FluxTokenizer

    door = comfy.pack("host.comfyui")
    model = tmp_path / "model.safetensors"
    clip = load_tokenizer(
        CLIP_TOKENIZER, model, 49408, door.bundled_folder(*CLIP_TOKENIZER.bundled)
    )
    t5 = load_tokenizer(T5_TOKENIZER, model, 32128, door.bundled_folder(*T5_TOKENIZER.bundled))
    # ComfyUI reads parentheses as weights unless they are escaped; the text is the same.
    escaped = prompt.replace("(", "\\(").replace(")", "\\)")
    theirs = FluxTokenizer().tokenize_with_weights(escaped)

    def same(tokenizer, length: int, batches: list) -> bool:
        ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
        expected = [token for token, _ in batches[0]]
        meaning = min(length - 1, len(expected) - 1)  # the last may be the end of a cut text
        return len(ids) == length and ids[:meaning] == expected[:meaning]

    assert same(clip, 77, theirs["l"])
    assert same(t5, 512, theirs["t5xxl"])


def test_weighted_texts_are_split_as_by_comfyui(comfy, tmp_path: Path) -> None:
    from comfy.text_encoders.flux import FluxTokenizer

    door, theirs = comfy.pack("host.comfyui"), FluxTokenizer()
    model = tmp_path / "model.safetensors"
    clip = load_tokenizer(
        CLIP_TOKENIZER, model, 49408, door.bundled_folder(*CLIP_TOKENIZER.bundled)
    )
    t5 = load_tokenizer(T5_TOKENIZER, model, 32128, door.bundled_folder(*T5_TOKENIZER.bundled))
    words = ["cat", "赛博朋克", "the roof's edge,", "masterpiece ", " ", r"\(blue\)", "long " * 12]
    brackets = ["{0}", "({0}:1.3)", "(({0}) {0}:0.7)", "({0})"]
    chinese = tokenize(weighted_segments("赛博朋克, a cat"), clip, t5).counts
    assert (chinese.unread, chinese.characters) == (4, 9), "T5's vocabulary is English"
    assert "read 4 of 9 characters" in chinese.warning
    assert not tokenize(weighted_segments("a cat"), clip, t5).counts.warning
    random, longest = Random(0), 0
    for _ in range(200):
        some = random.choices(words, k=random.randrange(1, 120))
        prompt = "".join(random.choice(brackets).format(word) for word in some)
        ours = tokenize(weighted_segments(prompt), clip, t5)
        options = {"t5xxl_min_length": len(ours.t5)}
        expected = theirs.tokenize_with_weights(prompt, tokenizer_options=options)
        assert ours.clip == [token for token, _ in expected["l"][0]]
        assert [*zip(ours.t5, ours.weights, strict=True)] == expected["t5xxl"][0]
        longest = max(longest, ours.counts.text_tokens)
    assert longest > 512
