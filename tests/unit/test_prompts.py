"""Weights, long prompts, counts, and what is remembered. ComfyUI's own code: see tests/host."""

import logging
import time
from itertools import chain

import pytest
import torch

from majicflux.engine.flux import text_encoders
from majicflux.engine.flux.prompts import (
    MOST_CHARACTERS,
    MOST_T5_TOKENS,
    TokenCounts,
    tokenize,
    weighted_segments,
)
from majicflux.engine.flux.text_encoders import TextEncoders

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")
CHINESE = "赛博朋克风格的猫，屋顶上，月光"


@pytest.fixture
def encoders(make_pipeline) -> TextEncoders:
    return make_pipeline(dtype=torch.float32).text_encoders


def encode(encoders: TextEncoders, prompt: str) -> text_encoders.TextEmbedding:
    with torch.inference_mode():
        return encoders.encode(prompt)[0]


@pytest.fixture
def runs(encoders: TextEncoders) -> list[int]:
    """The number of tokens of each run of T5."""
    found: list[int] = []
    t5 = encoders.weights.module.t5
    t5.register_forward_pre_hook(lambda _, given: found.append(given[0].shape[1]))
    return found


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a cat", [("a cat", 1)]),
        ("(detailed texture:1.3), a cat", [("detailed texture", 1.3), (", a cat", 1)]),
        ("(a)", [("a", 1.1)]),
        ("((a) b)", [("a", 1.1 * 1.1), (" b", 1.1)]),
        ("(a (b:1.5):0.5)", [("a ", 0.5), ("b", 1.5)]),
        ("(a (b):0.5)", [("a ", 0.5), ("b", 0.5 * 1.1)]),
        ("(a:-1e1)(b: 2 )", [("a", -10), ("b", 2)]),
        ("(12:30 o'clock)", [("12:30 o'clock", 1.1)]),
        (r"rose \(flower\) (red\):1.2)", [("rose (flower) ", 1), ("red)", 1.2)]),
        (r"(a\)", [("(a)", 1)]),
        ("()", []),
        ("(:1.3)", [(":1.3", 1.1)]),
        ("((a", [("((a", 1)]),
        ("a) (b:2)", [("a) (b:2)", 1)]),
        ("(a (b:2)", [("a ", 2), ("(b", 2)]),
        ("a (cat:1.0) b (dog:1.3)", [("a cat b ", 1), ("dog", 1.3)]),
        ("(a:inf) (b:nan)", [("a:inf", 1.1), (" ", 1), ("b:nan", 1.1)]),
        (f"({CHINESE}:1.2)", [(CHINESE, 1.2)]),
    ],
)
def test_weights_are_read_as_written(prompt: str, expected: list) -> None:
    found = weighted_segments(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_brackets_may_be_nested_as_deep_as_somebody_likes() -> None:
    assert weighted_segments("(" * 1100 + "a:1.5" + ")" * 1100) == (("a", 1.5),)


@pytest.mark.parametrize(
    "prompt",
    [
        "(" * 16000 + "a" + ")" * 16000,
        "(" * MOST_CHARACTERS,
        "(" * 30000 + "a" + ")" * 20000,
        ")" * MOST_CHARACTERS,
        "(a:1.0)" * 9000,
        "(a:" * 12000 + "1.2" + ")" * 12000,
        "((a:1.2)" * 8000,
        "\\(" * 30000,
        "(:" * 30000 + ")" * 2,
    ],
    ids=lambda prompt: prompt[:10],
)
def test_a_prompt_of_brackets_is_read_at_once(prompt: str) -> None:
    start = time.perf_counter()
    weighted_segments(prompt)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("prompt", ["a" * 10**7, "(" * 10**6 + ")" * 10**6, CHINESE * 10**6])
def test_a_prompt_that_nobody_can_read_is_refused_by_its_length(
    encoders: TextEncoders, prompt: str
) -> None:
    start = time.perf_counter()
    for refuse in (encoders.count, encoders.encode, encoders.recall):
        with pytest.raises(ValueError, match=f"has {len(prompt)} characters, more than the 65536"):
            refuse(prompt)
    assert time.perf_counter() - start < 1
    assert not encoders._read


def test_a_prompt_is_read_once_and_may_be_cancelled_meanwhile(
    encoders: TextEncoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    parse = text_encoders.weighted_segments
    monkeypatch.setattr(
        text_encoders, "weighted_segments", lambda text: read.append(text) or parse(text)
    )

    def cancelled() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        encoders.read("a (cat:1.2)", cancelled)
    assert read.pop() == "a (cat:1.2)"
    assert encoders.recall("a (cat:1.2)") is None
    encode(encoders, "a (cat:1.2)")
    assert encoders.count("a (cat:1.2)").t5 == 6
    assert encoders.recall("a (cat:1.2)") is not None
    assert sorted(read) == ["", "a (cat:1.2)"]
    for number in range(100):
        encoders.count(str(number))
    assert len(encoders._read) < 70


@pytest.mark.parametrize("prompt", ["(" * 8000 + "a" + ")" * 8000, "(a:1e39)", "(a:-3e38) b"])
def test_a_weight_that_no_number_can_be_multiplied_by_is_refused(
    encoders: TextEncoders, prompt: str
) -> None:
    with pytest.raises(ValueError, match="weight in the prompt is too large: "):
        encode(encoders, prompt)
    assert encode(encoders, "(a:30) (b:-30)").tokens.isfinite().all()


@pytest.mark.parametrize("prompt", ["", "a cat (", CHINESE, "word " * 70])
def test_without_weights_ids_are_the_tokenizers_own(encoders: TextEncoders, prompt: str) -> None:
    given = encoders.clip_tokenizer, encoders.t5_tokenizer
    tokens = tokenize(weighted_segments(prompt), *given)
    for tokenizer, ids, length in zip(given, (tokens.clip, tokens.t5), (77, 512), strict=True):
        whole = tokenizer(prompt, padding="max_length", max_length=length, truncation=True)
        assert ids == whole.input_ids


def test_a_weight_moves_t5s_vectors_from_those_of_no_words(encoders: TextEncoders) -> None:
    found = encode(encoders, "a (big:1.5) cat")
    tokenizer, t5 = encoders.t5_tokenizer, encoders.weights.module.t5
    parts = [tokenizer(text).input_ids[:-1] for text in ("a ", "big", " cat")]
    ids, none = torch.zeros(2, 1, 512, dtype=torch.int64)
    read = torch.tensor([*chain(*parts), tokenizer.eos_token_id])
    ids[0, : len(read)], none[0, 0] = read, tokenizer.eos_token_id
    with torch.inference_mode():
        expected, empty = t5(ids), t5(none)
        big = slice(len(parts[0]), len(parts[0]) + len(parts[1]))
        expected[:, big] = empty[:, big] + 1.5 * (expected[:, big] - empty[:, big])
    torch.testing.assert_close(found.tokens, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.tokens[:, big.stop :], expected[:, big.stop :])
    other = encode(encoders, "a (big:1.2) cat")
    assert (other.tokens - expected).abs().max() > 0.01
    assert torch.equal(other.pooled, found.pooled), "as in ComfyUI"


def test_weights_of_one_are_no_weights(encoders: TextEncoders, runs: list[int]) -> None:
    plain = encode(encoders, "a cat on a roof")
    assert encoders.recall("a (cat:1.0) on (a roof:1)") is plain
    encoders._remembered.clear()
    again = encode(encoders, "a (cat:1.0) on (a roof:1)")
    assert torch.equal(again.tokens, plain.tokens)
    assert torch.equal(again.pooled, plain.pooled)
    assert runs == [512, 512], "no empty prompt"


def test_the_empty_prompt_is_encoded_once_for_each_length(
    encoders: TextEncoders, runs: list[int]
) -> None:
    for prompt in ("(a:1.2)", "(b:1.2)", "a" * 600 + "(b:1.2)", "b" * 600 + "(b:1.2)", ""):
        if encoders.recall(prompt) is None:
            encode(encoders, prompt)
    assert runs == [512] * 2 + [768] * 2, "together with the first that is measured from it"


def test_the_empty_prompt_costs_no_visit_of_its_own(make_pipeline) -> None:
    encoders = make_pipeline(device=torch.device("cpu", 0)).text_encoders
    with torch.inference_mode():
        moved = [encoders.encode(prompt)[1] for prompt in ("a", "(a:1.2)", "(b:1.2)")]
    assert moved[0]
    assert moved == [moved[0]] * 3


@pytest.mark.parametrize(("letters", "words"), [(511, 512), (512, 768), (767, 768), (768, 1024)])
def test_t5_reads_a_long_prompt_to_its_end(
    encoders: TextEncoders, letters: int, words: int
) -> None:
    prompt = "a" * (letters - 2) + "b"  # besides the mark of a word
    assert encoders.count(prompt).t5 == letters
    assert encoders.count(prompt).text_tokens == words
    found = encode(encoders, prompt)
    assert found.tokens.shape[1] == words
    other = encode(encoders, prompt[:-1] + "c")
    assert not torch.equal(found.tokens, other.tokens)
    assert torch.equal(found.pooled, other.pooled), "CLIP has read its 75"


def test_a_prompt_beyond_all_measure_is_refused(encoders: TextEncoders, caplog) -> None:
    longest = "a" * (MOST_T5_TOKENS - 2)
    with caplog.at_level(logging.WARNING):
        assert encoders.count(longest).text_tokens == MOST_T5_TOKENS
    assert not caplog.records, "no warning of the tokenizers"
    for refuse in (encoders.count, encoders.encode):
        with pytest.raises(ValueError, match="has 4096 T5 tokens, more than the 4095"):
            refuse(longest + "a")


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (TokenCounts(12, 14, 12), "CLIP-L read all 12 tokens, T5 all 14"),
        (TokenCounts(132, 210, 75), "CLIP-L read 75 of 132 tokens, T5 all 210"),
    ],
)
def test_counts_are_said(counts: TokenCounts, said: str) -> None:
    assert str(counts) == said


def test_tokens_are_counted_as_they_are_read(encoders: TextEncoders) -> None:
    assert encoders.count("") == TokenCounts(0, 0, 0)
    assert encoders.count("a (cat:1.3)") == TokenCounts(
        4, 6, 4, 0, 4
    )  # T5 marks the start of a word
    long = encoders.count("word " * 30)
    assert (long.clip, long.clip_read) == (120, 75)
    # A short text that does not fit ends what is read, as in ComfyUI.
    assert encoders.count("a" * 73 + "(cat:1.3)(b)").clip_read == 73
    assert encoders.count("a" * 72 + "(cat:1.3)").clip_read == 75


def test_a_chinese_prompt_is_read_whole(encoders: TextEncoders) -> None:
    assert weighted_segments(CHINESE) == ((CHINESE, 1),)
    ids = tokenize(((CHINESE, 1.0),), encoders.clip_tokenizer, encoders.t5_tokenizer).clip
    assert encoders.clip_tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == CHINESE


def test_the_memory_of_prompts_is_bounded(
    encoders: TextEncoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 3 * encode(encoders, "a").nbytes
    monkeypatch.setattr(text_encoders, "REMEMBERED_BYTES", room)
    for prompt in "bc":
        encode(encoders, prompt)
    assert encoders.recall("a") is not None  # now the latest
    encode(encoders, "d")
    assert [encoders.recall(p) is not None for p in "abcd"] == [True, False, True, True]
    encode(encoders, "e" * 600)
    assert sum(known.nbytes for known in encoders._remembered.values()) <= room
    assert encoders.recall("e" * 600) is not None
    assert encoders.recall("c") is None, "a long one takes the room of two"
