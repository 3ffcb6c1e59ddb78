"""Several prompts in one visit of the text encoders."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from majicflux.batch.coming import prompts_to_come
from majicflux.engine.errors import PromptWeightError
from majicflux.engine.flux.text_encoders import TextEncoders
from majicflux.engine.plan.plan import TEXT
from majicflux.engine.run.pipeline import encode_prompts, paint
from majicflux.engine.run.request import GenerationRequest
from majicflux.host import standalone
from majicflux.nodes import NODES

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")
PROMPTS = ["a cat", "", "a (big:1.3) dog", "a" * 600, "b" * 600 + "(c:0.7)", "赛博朋克 (cat:1.1)"]
API = Path(__file__).parents[2] / "workflows" / "api"
REQUEST = GenerationRequest("a cat", 1, 1, 3.5, 32, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_has_the_bits_that_it_has_alone(make_pipeline, dtype: torch.dtype) -> None:
    together, alone = (make_pipeline(dtype=dtype).text_encoders for _ in range(2))
    with torch.inference_mode():
        found, _ = together.encode_together(PROMPTS)
        for prompt, embedding in zip(PROMPTS, found, strict=True):
            alone.forget()
            expected, _ = alone.encode(prompt)
            assert torch.equal(embedding.tokens, expected.tokens)
            assert torch.equal(embedding.pooled, expected.pooled)
            assert together.recall(prompt) is embedding
    assert all(embedding.tokens.device.type == "cpu" for embedding in found)


def test_the_weights_come_once_for_all_of_a_length(make_pipeline) -> None:
    encoders = make_pipeline(device=torch.device("cpu", 0)).text_encoders
    with torch.inference_mode():
        _, once = encoders.encode("a cat")
        _, moved = encoders.encode_together([f"{number} dogs" for number in range(5)])
        assert moved == once > 0
        assert encoders.encode_together(["one (more:1.2)", "c" * 600])[1] == 2 * once


def encoded_in(encoders: TextEncoders) -> list[int]:
    """How many prompts each run of T5 has."""
    found: list[int] = []
    t5 = encoders.weights.module.t5
    t5.register_forward_pre_hook(lambda _, given: found.append(len(given[0])))
    return found


def test_prompts_of_later_requests_are_encoded_with_the_first(make_pipeline) -> None:
    pipeline = make_pipeline()
    runs = encoded_in(pipeline.text_encoders)
    coming = ["a dog", "a cat", "c" * 600, "d" * 9000, "(e:1e38)(f:-1e38)"]
    alone = [paint(make_pipeline(), replace(REQUEST, prompt=p), ignore, ignore) for p in coming[:3]]
    request = replace(REQUEST, coming=coming[:4])
    first, *_, report = paint(pipeline, request, ignore, ignore)
    assert runs == [2], "one is longer than was planned for, one too long"
    assert TEXT in [stage.name for stage in report.stages]
    second, *_, report = paint(pipeline, replace(request, prompt="a dog"), ignore, ignore)
    assert TEXT not in [stage.name for stage in report.stages]
    third, *_ = paint(pipeline, replace(request, prompt="c" * 600), ignore, ignore)
    for picture, expected in zip((second, first, third), alone, strict=True):
        assert torch.equal(picture, expected[0])
    encode_prompts(pipeline, ["a house"], ignore, coming=["a tree", "a wood"])
    assert runs == [2, 1, 3]


def ignore(*_: object) -> None: ...


def test_a_weight_that_spoils_a_later_prompt_is_told_when_that_is_painted(make_pipeline) -> None:
    pipeline = make_pipeline(dtype=torch.float32)
    spoilt = "(e:3e38)(f:-3e38)"
    paint(pipeline, replace(REQUEST, coming=[spoilt, "a dog"]), ignore, ignore)
    assert pipeline.text_encoders.recall("a dog") is not None
    with pytest.raises(PromptWeightError):
        paint(pipeline, replace(REQUEST, prompt=spoilt), ignore, ignore)


def test_as_many_as_the_budget_has_room_for(make_pipeline) -> None:
    """The states of each are held while the weights pass."""
    coming = [f"{number} dogs" for number in range(15)]
    at_once = []
    smallest = make_pipeline(device=torch.device("cpu", 0)).plan(REQUEST.workload)
    for budget in (None, smallest.of(TEXT).smallest + 2**22, smallest.of(TEXT).smallest):
        pipeline = make_pipeline(device=torch.device("cpu", 0), budget_bytes=budget)
        stage = pipeline.text_with(coming)
        plan = stage.plan(REQUEST.workload, budget)
        at_once.append(plan.prompts)
        assert budget is None or plan.peak <= budget
        assert plan.smallest == pipeline.text.plan(REQUEST.workload, budget).smallest
    assert at_once[0] == 16 > at_once[1] > at_once[2] == 1


def test_what_a_node_will_encode_is_known_where_it_gets_the_same_models(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standalone, "models_folder", models)
    text = (API / "text_to_image.json").read_text(encoding="utf-8")
    classes = {node.define_schema().node_id: node for node in NODES}

    def graph(**inputs: object) -> dict:
        made = json.loads(text)
        made["5"]["inputs"] |= inputs
        return made

    other = graph(prompt="with other models")
    other["4"]["inputs"]["vram_budget_gb"] = 3.5
    coming = [
        graph(prompt="a"), other, graph(prompt=["9", 0]), graph(prompt="b", cfg=2.0),
        graph(prompt="c", negative_prompt="unused"), {},
    ]  # fmt: skip
    negative = graph()["5"]["inputs"].get("negative_prompt", None)
    expected = ["a", "b", *([negative] if negative is not None else []), "c"]
    assert prompts_to_come(graph(), coming, classes) == {"5": expected}
    assert prompts_to_come(graph(), [], classes) == {}
