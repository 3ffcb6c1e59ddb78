"""ComfyUI's bundled tokenizers, which have the vocabularies of the real text encoders."""

from pathlib import Path

import pytest

from majicflux.loaders.tokenizers import CLIP_TOKENIZER, T5_TOKENIZER, load_tokenizer

PROMPT = "赛博朋克 a cat, (masterpiece) on the roof's edge!"


@pytest.mark.parametrize("prompt", ["", PROMPT, "long words " * 300])
def test_ids_are_those_of_comfyuis_own_tokenizers(comfy, tmp_path: Path, prompt: str) -> None:
    from comfy.text_encoders.flux import FluxTokenizer

    door = comfy.pack("host.comfyui")
    model = tmp_path / "model.safetensors"
    clip = load_tokenizer(CLIP_TOKENIZER, model, 49408, door.clip_tokenizer_folder())
    t5 = load_tokenizer(T5_TOKENIZER, model, 32128, door.t5_tokenizer_folder())
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
