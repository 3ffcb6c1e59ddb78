"""Translators in folders of real layouts: what they say, and what is refused."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MarianMTModel
from translators import CHAT, LEARNT, write_marian, write_qwen

from majicflux.loaders.safetensors_file import ModelFileError
from majicflux.translation.conversion import convert_pickled
from majicflux.translation.translator import inspect_translator, load_translator

SENTENCES = {"雨夜, 一辆红色的汽车": "A rainy night, a red car.", "两棵松树": "Two pine trees."}
WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_marian(tmp_path_factory.mktemp("models") / "translation" / "opus-mt-zh-en")


@pytest.fixture
def marian(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "models" / "translation" / "opus-mt-zh-en"))


def pickled(folder: Path, old: bool = False) -> None:
    """The weights as they are published: in a pickle, with each name of what is shared."""
    tensors = MarianMTModel.from_pretrained(folder).state_dict()
    assert tensors["lm_head.weight"].data_ptr() == tensors["model.shared.weight"].data_ptr()
    torch.save(tensors, folder / PICKLED, _use_new_zipfile_serialization=not old)
    (folder / WEIGHTS).unlink()


def test_marian_translates_each_clause_within_its_frame(made: Path) -> None:
    translator = load_translator(made)
    for chinese, english in LEARNT.items():
        assert translator(chinese) == english.rstrip(".")
    assert translator("雨夜，一辆（红色：1.3）的汽车、neon，两棵松树。\n“红色”，下雪") == (
        "Rainy night, A (red:1.3) car, neon, Two pine trees.\n“红色”, falling snow"
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_translates_whole_sentences_by_its_chat_template(family: str, tmp_path: Path) -> None:
    """Learnt after a closed thought, as the template writes it where thinking is off; the
    generation_config of the folder would draw."""
    translator = load_translator(write_qwen(tmp_path / "Qwen", family, SENTENCES))
    assert translator("雨夜，一辆红色的汽车。\n(两棵松树:1.2)") == (
        "A rainy night, a red car.\n(Two pine trees:1.2)"
    )


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHAT.replace("<think>\n\n</think>\n\n", "<think>\n"), "the kind Qwen2.* <think>, which"),
        ("", r"cannot be loaded \(.*chat.template"),
    ],
)
def test_a_model_that_would_think_or_cannot_be_asked_is_refused(
    tmp_path: Path, template: str, said: str
) -> None:
    folder = write_qwen(tmp_path / "Qwen", "qwen2", SENTENCES, steps=0)
    (folder / "chat_template.jinja").write_text(template)
    if not template:
        (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelFileError, match=said):
        load_translator(folder)


def test_a_text_is_translated_once_and_english_never(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    translator, asked = load_translator(made), []
    assert translator("雨夜，雨夜", lambda: asked.append(1)) == "Rainy night, Rainy night"
    assert len(asked) == 1
    monkeypatch.setattr(MarianMTModel, "generate", lambda *_, **__: pytest.fail("again"))
    assert translator("(雨夜:1.2)") == "(Rainy night:1.2)"
    assert translator(" a cat,\r\n(b:1.2) ") == " a cat,\r\n(b:1.2) "


def test_a_translation_can_be_cancelled(made: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_translator(made)("雨夜", stop)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "of 2020"])
def test_a_pickle_is_refused_until_it_is_converted(made: Path, marian: Path, old: bool) -> None:
    pickled(marian, old)
    with pytest.raises(ModelFileError, match="pickle, which can run code") as refused:
        load_translator(marian)
    models = marian.parents[1]
    assert f'download translator --models "{models}"' in str(refused.value)
    assert [*convert_pickled(models / "translation")] == [marian / WEIGHTS]
    ours, theirs = load_file(marian / WEIGHTS), load_file(made / WEIGHTS)
    assert ours.keys() - theirs.keys() <= {f"model.{side}.embed_positions.weight" for side in
                                           ("encoder", "decoder")}  # fmt: skip
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert load_translator(marian)("雨夜") == "Rainy night"
    assert [*convert_pickled(models)] == [], "what is there stays"


def test_a_pickle_below_its_makers_folder_is_converted_by_the_same_command(tmp_path: Path) -> None:
    folder = tmp_path / "translation" / "Qwen" / "Qwen3-0.6B"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / PICKLED).touch()
    with pytest.raises(ModelFileError, match=f'translator --models "{tmp_path}" with'):
        inspect_translator(folder)


class Harm:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return sys.exit, ("code of the pickle was run",)


@pytest.mark.parametrize(
    "content", [pickle.dumps(Harm()), b"", b"PK\x03\x04", b"<html>", b"\x80\x02."]
)
def test_a_pickle_with_anything_else_is_not_converted(marian: Path, content: bytes) -> None:
    (marian / WEIGHTS).unlink()
    (marian / PICKLED).write_bytes(content)
    with pytest.raises(ModelFileError, match="damaged, or holds more than tensors"):
        next(convert_pickled(marian))
    torch.save({"a": 1, "b": torch.ones(2)}, marian / PICKLED)
    with pytest.raises(ModelFileError, match="damaged, or holds more than tensors"):
        next(convert_pickled(marian))
    assert not {path.suffix for path in marian.iterdir()} & {".safetensors", ".part"}


def without_a_weight(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / WEIGHTS)
    del tensors["model.encoder.layers.0.fc1.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def with_config(folder: Path, **values: object) -> None:
    with_json(folder / "config.json", **values)


def with_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json cannot be opened: No such file"),
        (lambda f: (f / "config.json").write_text("{"), "does not say which model this is"),
        (lambda f: (f / "config.json").write_text("[1]"), "does not say which model this is"),
        (lambda f: with_config(f, model_type="llama"), "of the kind llama, .* Take opus-mt-zh-en"),
        (lambda f: with_config(f, model_type=["marian"]), "does not translate here"),
        (
            lambda f: with_json(f / "tokenizer_config.json", target_lang="zho"),
            "of the kind .* - zho, which does not translate here",
        ),
        (lambda f: (f / "source.spm").unlink(), "lacks source.spm. Download the whole folder"),
        (lambda f: (f / WEIGHTS).unlink(), f"lacks {WEIGHTS}"),
        (lambda f: (f / WEIGHTS).write_bytes(b"<html>"), "is a web page, not the model"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "is cut off: 9 of"),
        (lambda f: (f / "vocab.json").write_text("{"), r"cannot be loaded \(.*Download that"),
        (lambda f: (f / "target.spm").write_bytes(b"no"), r"cannot be loaded \("),
        (lambda f: with_config(f, d_model=32), r"cannot be loaded \("),
        (without_a_weight, "lacks the weight model.encoder.layers.0.fc1.weight"),
        (
            lambda f: (f / "vocab.json").write_text('{"</s>": 0, "<unk>": 1, "红": 99999}'),
            "its tokenizer is that of another model",
        ),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_translator_is_told(marian: Path, spoil: Callable, said: str) -> None:
    spoil(marian)
    with pytest.raises(ModelFileError, match=said):
        load_translator(marian)


def test_a_missing_package_is_named_with_the_command(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ModelFileError, match="python -m pip install sentencepiece"):
        load_translator(made)


def test_code_in_a_folder_is_not_run(marian: Path) -> None:
    names = {"AutoConfig": "code.C", "AutoModelForSeq2SeqLM": "code.M", "AutoTokenizer": "code.T"}
    with_config(marian, auto_map=names)
    (marian / "code.py").write_text("raise SystemExit('it was run')")
    assert load_translator(marian)("雨夜") == "Rainy night"


def test_a_look_at_a_folder_reads_no_weights(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MarianMTModel, "from_pretrained", lambda *_: pytest.fail("it was loaded"))
    assert inspect_translator(made).class_name == "MarianMTModel"
