"""What Python shows in the user's language: every message is translated, and translated where it
is shown."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import pytest
import torch
from rooms import FILES, ROOT, room_of

from majicflux import messages
from majicflux.engine.errors import BudgetError
from majicflux.engine.flux.prompts import TokenCounts
from majicflux.engine.plan.plan import Plan, StagePlan, Workload
from majicflux.engine.plan.units import GB
from majicflux.engine.run.pipeline import paint
from majicflux.engine.run.report import Report, StageReport
from majicflux.engine.run.request import GenerationRequest
from majicflux.host import standalone
from majicflux.lab.doctor import diagnosis
from majicflux.loaders import demo_models
from majicflux.loaders.flux_dit import inspect_flux_dit
from majicflux.loaders.safetensors_file import ModelFileError
from majicflux.messages import MajicFluxError, later, say
from majicflux.nodes import DiTLoader
from majicflux.nodes.advice import advise

LANGUAGES = ["ja", "zh", "zh-TW"]
WORD = re.compile("[A-Za-z]{3}")
HAN_OR_KANA = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
# What must not be lost: figures, and what is typed, chosen or looked for as it stands.
KEPT = re.compile(r"\d+(?:\.\d+)?|%\(\w+\)s|--\w+|[\w./-]*\w[_/]\w[\w./-]*|[\w-]*\.\w+")
FOR_PROGRAMMERS = ("ArgumentTypeError", "RuntimeError", "TypeError")
# Raised by what nobody can reach by a node, or caught and put into a message or the log.
NEVER_SHOWN = {
    " blocks are more than a header of prepared weights can hold",
    " has buffers, which would not move with it",
    "a scale is not finite",
    "its contents have changed",
    "its size is wrong",
    "the disk is too full",
    "a product's kernel needs multiples of 16, not x",
    "the weight holds an infinity or a NaN",
}
PLAN = Plan(
    Workload(64, 48, 2, 4, text_tokens=768),
    2 * GB,
    (
        StagePlan("text", None, GB // 2, 0, 0, GB, 0, 0, 0, GB),
        StagePlan("denoise", None, GB, 0, GB, 0, 8 * GB, 0, 0, 3 * GB),
    ),
    1.5,
)


def translations(language: str) -> dict[str, str]:
    return json.loads((ROOT / "locales" / language / "messages.json").read_text(encoding="utf-8"))


def nodes(*rooms: str) -> Iterator[ast.AST]:
    """Of the files in these rooms, by default in all."""
    for path in FILES:
        if rooms and room_of(path) not in rooms:
            continue
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def errors_that_say() -> set[str]:
    """The names of MajicFluxError and of those that are made of it."""
    classes = [node for node in nodes() if isinstance(node, ast.ClassDef)]
    found, before = {"MajicFluxError"}, set()
    while found != before:
        before = {*found}
        found |= {c.name for c in classes if {*map(ast.unparse, c.bases)} & found}
    return found


ERRORS = errors_that_say()


def calls(*names: str) -> Iterator[ast.Call]:
    for node in nodes():
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in names and node.args:
            yield node


def of_help_pages() -> list[ast.expr]:
    """What `--help` shows of a command and its arguments, and gives to `say`."""
    said = [node for node in nodes("commands", "cli.py") if isinstance(node, ast.keyword)]
    return [word.value for word in said if word.arg in ("description", "help")]


def fields(text: str) -> list[tuple[str | None, ...]]:
    return sorted(field[1:] for field in Formatter().parse(text) if field[1] is not None)


def words(text: str) -> str:
    return "".join(literal for literal, *_ in Formatter().parse(text))


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_message_is_translated_and_no_other(language: str) -> None:
    texts = [call.args[0] for call in calls("say", "later", *ERRORS)] + of_help_pages()
    said = {text.value for text in texts if isinstance(text, ast.Constant)}
    translated = translations(language)
    assert list(translated) == sorted(said)
    for english, text in translated.items():
        assert fields(text) == fields(english), english
        kept = {*KEPT.findall(words(english))}
        assert {word for word in kept if word.strip("./") not in text} == set(), english
        assert not WORD.search(words(english)) or HAN_OR_KANA.search(words(text)), english
        # So that `doctor` can leave the file out, which it names behind the message.
        assert text.startswith("{file}") == english.startswith("{file}"), english


def test_what_is_marked_is_a_literal_and_what_is_looked_up_has_its_fields() -> None:
    marked = [call.args[0] for call in calls("later")] + of_help_pages()
    assert all(type(text) is ast.Constant for text in marked)
    for call in calls("say", *ERRORS):
        if type(call.args[0]) is ast.Constant and all(word.arg for word in call.keywords):
            wanted = {name for name, *_ in fields(call.args[0].value)}
            assert wanted == {word.arg for word in call.keywords}, call.args[0].value


def test_no_error_that_a_user_meets_is_raised_in_english_only() -> None:
    def literal(node: ast.expr) -> str:
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        return "".join(p.value for p in parts if type(p) is ast.Constant and type(p.value) is str)

    found = set()
    for node in nodes():
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            assert not any(isinstance(given, ast.BinOp) for given in node.exc.args)
            name = ast.unparse(node.exc.func)
            if not name.endswith(FOR_PROGRAMMERS):
                said = name in ERRORS  # a literal of theirs; not one that has fields already
                found |= {
                    literal(given)
                    for given in node.exc.args
                    if not (said and type(given) is ast.Constant)
                }
    assert {text for text in found if WORD.search(text)} == NEVER_SHOWN


def test_values_are_neither_translated_nor_formatted(chinese: None) -> None:
    assert say("error: {error}", error="{0} {error} stopped") == "错误：{0} {error} stopped"
    assert str(MajicFluxError("error: {error}", error="{0} stopped")) == "错误：{0} stopped"
    assert str(MajicFluxError(say("error: {error}", error="{0} stopped"))) == "错误：{0} stopped"
    assert say("error: {error}", error=OSError(28, "disk full", "a.png")) == "错误：disk full"
    assert say("stopped") == "已停止"
    assert later("stopped") == "stopped"


def test_english_is_said_where_nothing_else_can_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> str:
        raise OSError("no settings")

    for language in (lambda: "fr", lambda: ["zh"], lambda: "\0", broken):
        monkeypatch.setattr(messages, "_language", language)
        assert say("seed {seed}", seed=5) == "seed 5"
    monkeypatch.setattr(messages, "_language", lambda: "zh")
    assert say("not among the messages: {it}", it=1) == "not among the messages: 1"
    monkeypatch.setattr(messages, "FOLDER", tmp_path)
    for name, content in (("a", "{"), ("b", '["stopped"]'), ("c", '{"seed {seed}": "种子 {}"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "messages.json").write_text(content, encoding="utf-8")
        monkeypatch.setattr(messages, "_language", lambda n=name: n)
        assert [say("seed {seed}", seed=5) for _ in range(2)] == ["seed 5"] * 2
    assert caplog.text.count("cannot be read") == 1


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_SG"}, "zh"),
        ({"LANG": "zh_TW.UTF-8"}, "zh-TW"),
        ({"LANG": "zh_HK"}, "zh-TW"),
        ({"LANG": "ja_JP.eucJP"}, "ja"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LC_ALL": "", "LC_MESSAGES": "en_US.UTF-8", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, "en"),
        ("Chinese (Simplified)_China", "zh"),
        ("Chinese (Traditional)_Taiwan", "zh-TW"),
        ("Chinese_Taiwan", "zh-TW"),
        ("Japanese_Japan", "ja"),
        ("English_United States", "en"),
        (None, "en"),
    ],
)
def test_the_language_is_the_environments_or_windows(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str] | str | None, language: str
) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    if isinstance(environment, dict):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
    else:
        monkeypatch.setattr("locale.getlocale", lambda: (environment, "936"))
    assert standalone.language() == language


def test_a_wrong_file_is_told_in_chinese(models: Path, chinese: None) -> None:
    with pytest.raises(ModelFileError) as refused:
        inspect_flux_dit(models / demo_models.CLIP_FILE)
    assert str(refused.value) == (
        "clip_l.safetensors 是 CLIP 文本编码器，不是 Flux.1 的 Transformer。"
        "请在“bf16 文本编码器”节点里选作 CLIP-L；应放在 models/text_encoders。"
    )


def test_a_plan_and_its_refusal_are_in_chinese(chinese: None) -> None:
    assert str(PLAN).splitlines() == [
        "2 x 64x48，4 步，预算 2.00 GB",
        "文本编码器：1.50 GB",
        "去噪：2.00 GB；每遍传入 8.00 GB 权重",
        "最小可用预算：3.0 GB",
        "预计每步 1.50 秒",
    ]
    with pytest.raises(BudgetError) as refused:
        PLAN.require_budget()
    advise(refused.value)
    assert str(refused.value) == (
        "2.00 GB 显存不够画 2 x 64x48：“去噪”阶段需要 3.00 GB。"
        "请把显存预算（vram_budget_gb）设为 3.0 或更大，或减小图片尺寸或批量，或缩短提示词。"
        "\n文本编码器：至少 1.0 GB\n去噪：至少 3.0 GB"
    )


def test_a_report_is_shown_in_chinese_and_kept_in_english(chinese: None) -> None:
    report = Report(2 * GB, [StageReport("decode", GB, GB // 2, 3.0, 5 * GB)])
    assert str(report).splitlines() == [
        "显存：用了 0.50 GB（上限 2.00 GB，计划 1.00 GB），传输 5.0 GB",
        "VAE 解码 3.0 秒",
    ]
    assert report.as_dict()["phases"][0]["name"] == "VAE decode"
    assert PLAN.as_dict()["phases"][1]["name"] == "denoising"


@pytest.mark.usefixtures("narrow")
def test_a_run_paints_in_chinese_as_in_english(make_pipeline, monkeypatch) -> None:
    pipeline, request = make_pipeline(), GenerationRequest("a cat", 1, 1, 3.5, 32, 32)
    expected = paint(pipeline, request, lambda _: None, lambda: None)[0]
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    pipeline.text_encoders.forget()
    picture, _, report = paint(pipeline, request, lambda _: None, lambda: None)
    assert torch.equal(picture, expected)
    assert re.sub(r"[\d.]+", "N", str(report)).splitlines() == [
        "文本编码器 N 秒, 去噪 N 秒, VAE 解码 N 秒"
    ]


def test_counts_of_tokens_are_in_chinese(chinese: None) -> None:
    counts = TokenCounts(90, 120, 75, 7, 52)
    assert str(counts) == "CLIP-L 读了 90 个 token 中的 75 个，T5 读了全部 120 个"
    assert (
        counts.warning
        == "T5 读不了 52 个字符中的 7 个：提示词请用英文，或者在前面接上“翻译提示词”。"
    )


def test_the_doctor_speaks_chinese(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chinese: None
) -> None:
    monkeypatch.setattr(standalone, "models_folder", tmp_path)
    (tmp_path / "vae").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"vae/{name}.safetensors").write_bytes(b"PK\x03\x04")
    (tmp_path / "diffusion_models").symlink_to(models / "diffusion_models")
    lines = diagnosis().splitlines()
    assert "  - Flux.1 的 Transformer: majicflus_v134.safetensors" in lines
    assert (
        "  - 不能用（是 PyTorch 的 pickle 文件，打开时可能执行代码；请用 .safetensors）: "
        "a.safetensors, b.safetensors"
    ) in lines
    missing = [line for line in lines if "缺少" in line]
    assert len(missing) == 3
    assert missing[2].startswith("- models/vae 里缺少 VAE 模型，例如 ModelScope ")
    assert "- float8_e4m3fn 权重: 用 " in "\n".join(lines)


def test_validation_on_the_canvas_speaks_the_language_of_the_moment(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standalone, "models_folder", models)
    for locale, said in (("ja_JP", "ありません"), ("en_US", "is not in"), ("zh_TW", "請放進去")):
        monkeypatch.setenv("LC_ALL", locale)
        assert said in DiTLoader.validate_inputs("gone.safetensors")


def test_the_command_line_speaks_chinese_on_any_console(tmp_path: Path) -> None:
    def said(*arguments: str, encoding: str) -> tuple[str, str]:
        environment = {**os.environ, "LC_ALL": "zh_CN.UTF-8", "PYTHONIOENCODING": encoding}
        command = [sys.executable, "-m", "majicflux.cli", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, encoding=encoding, env=environment
        )
        return done.stdout, done.stderr

    clear = ("cache", "clear", "--models", "models")
    assert said(*clear, encoding="utf-8")[0] == "models/majicflux_prepared 里释放了 0.00 GB\n"
    assert said(*clear, encoding="ascii")[0] == "models/majicflux_prepared ???? 0.00 GB\n"
    assert said("run", "gone.json", encoding="utf-8")[1].startswith("错误：gone.json 无法打开：")
    assert said("run", "--help", encoding="ascii")[0].startswith("??: majicflux run [-h] [--debug]")
