"""What the engine refuses: facts without a word of the canvas, to which the nodes add advice."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any

import pytest

from majicflux.engine import errors
from majicflux.engine.errors import EngineError
from majicflux.engine.sizes import size_problem
from majicflux.host import current as host
from majicflux.messages import MajicFluxError
from majicflux.nodes.advice import ADVICE
from majicflux.nodes.arguments import checked

ENGINE = Path(errors.__file__).parent
OF_THE_CANVAS = re.compile(
    r"connect|link|node|input|output|socket|widget|button|press|workflow|ComfyUI|SIGMAS|\w_\w|\bset\b"
    "|choose|raise|lower|close",
    re.IGNORECASE,
)
MEMORY = {
    "budget": 2.0, "picture": "1 x 64x64", "phase": "denoising", "needed": 3.04, "enough": "3.1",
    "smaller": "a smaller picture or batch",
}  # fmt: skip
# As a node shows them.
SENTENCES: list[tuple[type[EngineError], dict[str, Any], str]] = [
    (errors.StepsError, {"most": 100, "steps": 0}, "Steps must be 1 to 100, not 0."),
    (errors.SeedError, {"most": 9, "seed": -1}, "The seed must be 0 to 9, not -1."),
    (errors.NumberError, {"where": "cfg", "value": "nan"}, "cfg must be a number, not nan."),
    (errors.BatchSizeError, {"batch": 0}, "The batch size must be at least 1, not 0."),
    (errors.StrengthError, {"strength": 2}, "Strength must be above 0 and at most 1, not 2."),
    (errors.MaskAloneError, {}, "A mask needs a picture. Connect an image or a latent too."),
    (
        errors.StrengthAloneError,
        {"strength": 0.5},
        "A strength of 0.5 needs a picture to begin from. Connect an image or a latent, or set "
        "strength to 1.",
    ),
    (
        errors.TwoPicturesError,
        {},
        "There are both a picture and latents to begin from. Connect an image or a latent, not "
        "both.",
    ),
    (
        errors.ReusedStepError,
        {"step": 0, "steps": 4, "last": 3},
        "Step 0 cannot be reused in a run of 4: they are 0 to 3, and 0 is always computed. Change "
        "reused_steps, or set reuse to off.",
    ),
    (
        errors.ReuseWithHeunError,
        {},
        "Steps cannot be reused with heun, which takes two passes for each. Choose another solver, "
        "or set reuse to off.",
    ),
    (
        errors.TooFewLevelsError,
        {"shape": (1,)},
        "Noise levels must be a list of at least two, not of shape (1,). Raise the steps or the "
        "denoise of the scheduler that SIGMAS come from.",
    ),
    (
        errors.LevelNumbersError,
        {},
        "Noise levels must be numbers, and some of these are not (NaN or infinity). Look at the "
        "node that SIGMAS come from.",
    ),
    (
        errors.LevelOrderError,
        {"first": 14.6146, "last": 0.0},
        "Noise levels must fall from at most 1 to at least 0; these go from 14.61 to 0. Connect "
        "the scheduler that SIGMAS come from to a Flux model.",
    ),
    (
        errors.NoStepsError,
        {"start": 3, "end": 2, "steps": 4},
        "There is no step from 3 to 2 in a schedule of 4 steps. Lower start_at_step or raise "
        "end_at_step.",
    ),
    (
        errors.TooManyCharactersError,
        {"characters": 70000, "most": 65536},
        "The prompt has 70000 characters, more than the 65536 that can be read. Shorten it.",
    ),
    (
        errors.TooManyTokensError,
        {"tokens": 4096, "most": 4095},
        "The prompt has 4096 T5 tokens, more than the 4095 that can be read. Shorten it.",
    ),
    (
        errors.PromptWeightError,
        {"weight": 1e39},
        "A weight in the prompt is too large: 1e+39. Brackets multiply the weights around them; "
        "usual ones are 0.5 to 1.5.",
    ),
    (
        errors.UnknownChannelsError,
        {"channels": 256},
        "This transformer takes 256 channels, and those of Flux.1 take 64, with a picture 128 "
        "(depth, canny) or 384 (fill). Choose another model.",
    ),
    (
        errors.NoPictureError,
        {"channels": 384},
        "This transformer takes 384 channels, as a fill, depth or canny model does, or one with a "
        "control LoRA: it needs a picture too. Connect image and mask (fill) or reference (depth, "
        "canny) to sample, or to denoise what InpaintModelConditioning or "
        "InstructPixToPixConditioning give; or choose a text-to-image model.",
    ),
    (
        errors.EncoderWidthError,
        {"wanted": 768, "encoder": "CLIP-L", "width": 1280},
        "This transformer takes 768 values from CLIP-L, and the CLIP-L here gives 1280. Choose "
        "another CLIP-L in the bf16 text encoders node.",
    ),
    (
        errors.ControlNetWidthError,
        {"width": 3072, "wanted": 2048},
        "This ControlNet has a width of 3072 where the transformer has 2048, so it is for another "
        "model. Choose another ControlNet.",
    ),
    (
        errors.NoTextEncodersError,
        {},
        "The pipeline has no text encoders. Connect bf16 text encoders to it, or an encoded "
        "prompt to positive and, if cfg is not 1, to negative.",
    ),
    (
        errors.NoVaeError,
        {},
        "The pipeline has no VAE. Connect a Flux VAE to it, or use denoise with ComfyUI's own VAE "
        "nodes.",
    ),
    (
        errors.NoEightBitWeightsError,
        {},
        "Computing in 8 bits takes weights in 8 bits, and this transformer has none. Choose "
        "float8_e4m3fn or int8 rotated as weight_precision, or a compute_precision other than "
        "8-bit.",
    ),
    (
        errors.NotFiniteError,
        {"phase": "denoising"},
        "The phase 'denoising' gave values that are no numbers (NaN), so there is no picture. Set "
        "compute_precision to float32; if that does not help, the model file is damaged: download "
        "it again.",
    ),
    (
        errors.BudgetTooSmallError,
        MEMORY,
        "2.00 GB of VRAM are too little for 1 x 64x64: the phase 'denoising' needs 3.04 GB. Set "
        "vram_budget_gb to 3.1 or more, or choose a smaller picture or batch.",
    ),
    (
        errors.TooLittleVramError,
        MEMORY,
        "Only 2.00 GB of VRAM can be had, too little for 1 x 64x64: the phase 'denoising' needs "
        "3.1 GB. Close other programs that use the card, or choose a smaller picture or batch.",
    ),
    (
        errors.OutOfVramError,
        {"phase": "denoising", "smallest": 3},
        "The card ran out of memory in the phase 'denoising', which needs 3.00 GB at least. Close "
        "other programs that use the card, or choose a smaller picture or batch.",
    ),
]  # fmt: skip


def kinds(base: type[EngineError] = EngineError) -> Iterator[type[EngineError]]:
    for kind in base.__subclasses__():
        yield kind
        yield from kinds(kind)


def shown(error: EngineError) -> EngineError:
    """The error as a node raises it."""

    class Refusing(host.io.ComfyNode):
        @classmethod
        def define_schema(cls) -> Any:
            return host.io.Schema(node_id="Refusing", display_name="refusing", category="tests")

        @classmethod
        @checked
        def execute(cls) -> Any:
            raise error

    with pytest.raises(EngineError) as raised:
        Refusing.execute()
    return raised.value


@pytest.mark.parametrize(("kind", "values", "sentence"), SENTENCES, ids=lambda of: str(of)[:30])
def test_a_node_says_what_is_wrong_and_what_to_do(
    kind: type[EngineError], values: dict[str, Any], sentence: str
) -> None:
    fact = kind.fact.format(**values)
    error = kind("first\nsecond", "third", **values)
    assert str(error) == f"{fact}\nfirst\nsecond\nthird"
    found = shown(error)
    assert str(found) == f"{sentence}\nfirst\nsecond\nthird"
    assert str(shown(kind(**values))) == sentence
    assert type(found) is kind
    assert found.values == values
    assert isinstance(found, MajicFluxError)
    assert isinstance(found, ValueError)
    assert kind.__module__ == "majicflux"
    advised = any(base in ADVICE for base in kind.__mro__)
    assert advised == (sentence != fact)


def test_every_kind_is_among_them() -> None:
    assert [kind for kind, *_ in SENTENCES] == [kind for kind in kinds() if kind.fact]
    assert {*ADVICE} <= {*kinds()}


def test_no_fact_has_a_word_of_the_canvas() -> None:
    facts = [kind.fact for kind in kinds()]
    facts += [problem for side in (9, 10000) if (problem := size_problem("Width", side))]
    assert len(facts) > 20
    for fact in facts:
        assert not OF_THE_CANVAS.search("".join(part for part, *_ in Formatter().parse(fact))), fact


def test_what_is_raised_has_the_values_of_its_sentences() -> None:
    by_name = {kind.__name__: kind for kind in kinds() if kind.fact}
    found = set()
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in ENGINE.rglob("*.py")]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if not isinstance(node, ast.Raise) or node.exc is None:
            continue
        call = node.exc if isinstance(node.exc, ast.Call) else ast.Call(node.exc, [], [])
        kind = by_name.get(ast.unparse(call.func).rpartition(".")[2])
        if kind is not None:
            texts = [kind.fact, *(ADVICE[base] for base in kind.__mro__ if base in ADVICE)]
            wanted = {field for text in texts for _, field, *_ in Formatter().parse(text) if field}
            assert {word.arg for word in call.keywords} == wanted, kind
            found.add(kind)
    assert len(found) > 10


@pytest.mark.parametrize(
    ("language", "sentence"),
    [
        ("zh_CN", "一共 4 步，其中没有从 3 到 2 的步。请调低开始步数（start_at_step）或调高结束步数"
         "（end_at_step）。"),
        ("zh_TW", "一共 4 步，其中沒有從 3 到 2 的步。請調低起始步數（start_at_step）或調高結束步數"
         "（end_at_step）。"),
        ("ja_JP", "全部で 4 ステップで、3 から 2 までのステップはありません。"
         "開始ステップ（start_at_step）を下げるか、終了ステップ（end_at_step）を上げてください。"),
    ],
)  # fmt: skip
def test_no_blank_stands_between_sentences_where_none_is_written(
    monkeypatch: pytest.MonkeyPatch, language: str, sentence: str
) -> None:
    monkeypatch.setenv("LC_ALL", f"{language}.UTF-8")
    assert str(shown(errors.NoStepsError(start=3, end=2, steps=4))) == sentence
