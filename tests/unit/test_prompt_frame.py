"""What of a prompt is translated, and that the rest stays as it is."""

import time
from collections.abc import Sequence

import pytest

from majicflux.engine.flux.prompts import MOST_CHARACTERS, weighted_segments
from majicflux.translation.frame import Unit, has_chinese, plain, translated

WORDS = {
    "一只": "A", "红色": "red", "的猫": "cat", "坐在": "sits in", "门口": "door", "夜晚": "night",
    "雨夜": "rainy night", "和狗": "and a dog", "女孩": "girl", "长发": "long hair", "猫": "cat",
    "狗": "dog", "8K画质": "8K quality", "2只狗": "2 dogs", "50岁的男人": "50-year-old man",
    "模型": "model", "T恤": "T-shirt", "纸": "paper", "《千与千寻》风格": "Spirited Away style",
    "列奥纳多・达芬奇": "Leonardo da Vinci", "写着": "says", "的招牌": "sign", "站着": "stands",
}  # fmt: skip


def word_by_word(texts: Sequence[str]) -> list[str]:
    return [f" {WORDS[text]}." for text in texts]


@pytest.mark.parametrize(
    ("prompt", "english"),
    [
        ("一只(红色:1.3)的猫", "A (red:1.3) cat"),
        ("一只（红色：1.3）的猫", "A (red:1.3) cat"),
        ("（（雨夜））， [狗:0.7]", "((rainy night)), [dog:0.7]"),
        ("女孩(长发)(红色 : .5)站着", "girl (long hair)(red : .5) stands"),
        (r"猫\(红色\)", r"cat \(red\)"),
        ("雨夜，neon lights,夜晚", "rainy night, neon lights, night"),
        ("一只cat和狗", "A cat and a dog"),
        ("夜晚。\n雨夜！\r\n\n猫", "night.\nrainy night!\r\n\ncat"),
        ("写着“咖啡店”的招牌", "says “咖啡店” sign"),
        ("写着「咖啡，店」的招牌", "says 「咖啡，店」 sign"),
        ("写着\"咖啡\"的招牌，写着'猫（'", "says \"咖啡\" sign, says '猫（'"),
        ("girl's 猫, it's 狗", "girl's cat, it's dog"),
        ("<lora:麦橘:0.8>女孩", "<lora:麦橘:0.8> girl"),
        ("8K画质、2只狗，50岁的男人", "8K quality, 2 dogs, 50-year-old man"),
        ("SD1.5模型；A4纸；T恤", "SD1.5 model; A4 paper; T-shirt"),
        ("猫, 1024, 狗", "cat, 1024, dog"),
        ("猫：狗　夜晚", "cat: dog night"),
        ("{猫|狗}站着", "{cat|dog} stands"),
        ("{2$$红色|猫}站着，__颜色__、猫", "{2$$red|cat} stands, __颜色__, cat"),
        ("embedding:麦橘, 猫，(embedding:麦橘:1.2)", "embedding:麦橘, cat, (embedding:麦橘:1.2)"),
        ("猫🐱狗", "cat🐱dog"),
        ("赤い猫が座っている、猫が3匹, 猫", "赤い猫が座っている, 猫が3匹, cat"),
        ("スーパー銭湯、列奥纳多・达芬奇", "スーパー銭湯, Leonardo da Vinci"),
        ("고양이 그림, 猫", "고양이 그림, cat"),
        ("《千与千寻》风格", "Spirited Away style"),
        ("猫，", "cat,"),
        ("【雨夜】ＡＢＣ１", "[rainy night]ABC1"),
        ("a cat，a dog（red：1.2）。", "a cat, a dog(red:1.2)."),
        ('<>""“”猫', '<>""“” cat'),
    ],
)
def test_the_frame_of_a_prompt_survives(prompt: str, english: str) -> None:
    assert translated(prompt, word_by_word, Unit.CLAUSE) == english


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a cat",
        'a sign that says "咖啡"',
        "夜の街を歩く女の子, 고양이",
        ' (a  cat:1.3),\r\n\tit\'s <lora:x:1> "b" \\(é\\) 1.5 ',
    ],
)
def test_english_is_left_as_it_is_and_translates_nothing(prompt: str) -> None:
    assert translated(prompt, lambda _: pytest.fail("nothing is Chinese"), Unit.CLAUSE) == prompt
    assert not has_chinese(prompt)


def test_a_sentence_is_translated_at_once_between_brackets_and_lines() -> None:
    asked: list[str] = []

    def translate(texts: Sequence[str]) -> list[str]:
        asked.extend(texts)
        return ["English"] * len(texts)

    found = translated(
        "雨夜，猫、狗：纸，(夜晚:1.2)，girl，女孩。\n猫,狗", translate, Unit.SENTENCE
    )
    assert asked == ["雨夜, 猫, 狗:纸", "夜晚", "女孩", "猫,狗"]
    assert found == "English, (English:1.2), girl, English.\nEnglish"


def test_a_translation_brings_no_weights() -> None:
    found = translated("一只猫，狗", lambda texts: ["(c) a [cat:2]", "<dog>"], Unit.CLAUSE)
    assert found == "c a cat 2, dog"
    assert weighted_segments(found) == ((found, 1.0),)
    found = translated("(雨夜)", lambda _: ["3:30."], Unit.CLAUSE)
    assert weighted_segments(found) == (("3 30", pytest.approx(1.1)),)


def test_weights_are_read_as_before() -> None:
    found = translated("一只（红色：1.3）的猫，((雨夜))", word_by_word, Unit.CLAUSE)
    assert [weight for _, weight in weighted_segments(found)] == pytest.approx([1, 1.3, 1, 1.21])


def test_no_text_is_longer_than_a_model_reads() -> None:
    """Which is 512 tokens of Marian, and one a character at worst."""
    asked: list[str] = []
    translated("猫" * 2000, lambda texts: asked.extend(texts) or texts, Unit.CLAUSE)
    assert "".join(asked) == "猫" * 2000
    assert max(map(len, asked)) < 200


@pytest.mark.parametrize(
    "text", ["1", "猫", "3猫", "猫1", "(", "（", "“", "猫,", "a", "猫 a", "《", ":1", "'"]
)
@pytest.mark.parametrize("unit", Unit)
def test_the_longest_prompt_is_split_at_once(text: str, unit: Unit) -> None:
    prompt = (text * MOST_CHARACTERS)[:MOST_CHARACTERS]
    start = time.process_time()
    found = translated(prompt, lambda texts: texts, unit)
    assert time.process_time() - start < 2
    assert found.replace(" ", "") == plain(prompt).replace(" ", "")
