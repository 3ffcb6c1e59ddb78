"""The VRAM plan by itself, and the command that shows it."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from flux_plans import (
    CARDS,
    COMPUTED,
    FULL,
    ONE_OF_EACH,
    SIZES,
    autoencoder,
    computing_of,
    encoders,
    plan_of,
    transformer,
)

from majicflux.benchmarks import random_models
from majicflux.cli import main
from majicflux.engine.errors import BudgetError
from majicflux.engine.flux.geometry import FluxGeometry, T5Geometry
from majicflux.engine.flux.prompts import T5_TOKENS
from majicflux.engine.plan import estimate, split
from majicflux.engine.plan.denoising import step_seconds
from majicflux.engine.plan.device import DeviceProfile
from majicflux.engine.plan.plan import Plan, StagePlan, Workload
from majicflux.engine.plan.text import plan_text
from majicflux.engine.plan.units import GB
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.nodes.advice import advise


def test_fewer_references_are_advised_where_there_are_any() -> None:
    phase = StagePlan("denoise", None, 0, 0, 0, 0, 0, 0, 0, smallest=3 * GB)
    plan = Plan(Workload(64, 48, reference_tokens=12), 2 * GB, (phase,), None)
    with pytest.raises(BudgetError) as refused:
        plan.require_budget()
    advise(refused.value)
    assert "fewer or smaller reference pictures" in str(refused.value)


def planned(name: str, size: tuple[int, int], batch: int, gb: float | None) -> Plan:
    precision, eight_bit = COMPUTED[name]
    job = (*size, batch, 20)
    return estimate.estimate_plan(FULL, PRECISIONS[precision], job, gb, eight_bit, None, None)


@pytest.mark.parametrize(("name", "batch"), [*zip(COMPUTED, (1, 2, 4, 1, 4), strict=True)])
@pytest.mark.parametrize("size", SIZES)
def test_a_budget_is_kept_or_refused(size: tuple[int, int], batch: int, name: str) -> None:
    for gb in (0.1, 0.3, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24):
        plan = planned(name, size, batch, gb)
        assert plan.budget_bytes == int(gb * GB)
        if plan.smallest_bytes > int(gb * GB):
            worst = max(plan.stages, key=lambda phase: phase.smallest)
            with pytest.raises(BudgetError) as refused:
                plan.require_budget()
            said = str(refused.value)
            assert f"{batch} x {size[0]}x{size[1]}" in said
            assert f"phase '{worst.label}' needs {worst.smallest / GB:.2f} GB" in said
            named = refused.value.values["enough"]
            enough = planned(name, size, batch, float(named))
            enough.require_budget()
            assert enough.peak_bytes <= float(named) * GB
            assert float(named) * GB < plan.smallest_bytes + 0.1 * GB + 1, "no more than it takes"
        else:
            plan.require_budget()
            assert plan.peak_bytes <= int(gb * GB)
            weights = (encoders(24), transformer(FULL, COMPUTED[name][0]), autoencoder())
            for phase, module in zip(plan.stages, weights, strict=True):
                somewhere = phase.resident + phase.visiting + phase.once
                everything = sum(block.nbytes for block in module.travelling)
                assert everything <= somewhere <= module.travelling_bytes
                assert not phase.ring or phase.ring >= module.largest_bytes


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("size", SIZES)
def test_the_smallest_budget_is_enough_and_less_is_not(size: tuple[int, int], name: str) -> None:
    smallest = planned(name, size, 1, None).smallest_bytes
    plan = planned(name, size, 1, smallest / GB)
    assert plan.budget_bytes == smallest
    plan.require_budget()
    assert plan.peak_bytes <= smallest
    assert plan.smallest_bytes == smallest, "whatever the budget"
    with pytest.raises(BudgetError):
        planned(name, size, 1, 0.95 * smallest / GB).require_budget()


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("size", SIZES)
def test_more_budget_never_means_more_visits(size: tuple[int, int], name: str) -> None:
    """But where more tokens are computed at once, as each chunk converts weights again, or where
    the visits are so few that they cost nothing, while each chunk is launched by itself."""
    weights = transformer(FULL, computing_of(name)[0])
    unnoticed = sum(block.nbytes for block in weights.blocks) / 2 + weights.largest_bytes
    found: list[tuple[float, int, float]] = []
    for gb in [n / 50 for n in range(15, 75)] + [n / 5 for n in range(8, 120)]:
        phase = plan_of(name, Workload(*size), int(gb * GB), CARDS["fused"])
        if phase.smallest <= gb * GB:
            found.append((gb, phase.visiting, phase.tokens or float("inf")))
    rises = [
        (gb, f"{(after - before) / 1e6:.0f} MB more")
        for (_, before, fewer), (gb, after, tokens) in pairwise(found)
        if after > before and (tokens <= fewer or ("dequantized" not in name and after > unnoticed))
    ]
    assert not rises


@pytest.mark.parametrize(
    ("name", "card", "tokens"),
    [
        ("float8", "fused", 2048),
        ("float8 dequantized", "fused", 0),
        ("float8", "plain", 0),
        ("float8 dequantized", "plain", 0),
        ("bfloat16", "plain", 0),
    ],
)
def test_what_chunks_repeat_is_done_for_all_tokens_at_once(name: str, card: str, tokens: int):
    """Conversions of weights, and many small operations; for less than a GB of more visits."""
    largest = transformer(FULL, computing_of(name)[0]).largest_bytes
    for gb in (2, 4, 8):
        phase = plan_of(name, Workload(1024, 1024), gb * GB, CARDS[card])
        least = plan_of(name, Workload(1024, 1024), gb * GB, CARDS["fused"])
        assert phase.tokens == (0 if gb == 8 else tokens), "most weights stay with 8 GB"
        assert phase.visiting <= least.visiting + GB
        assert phase.peak <= gb * GB
        assert phase.ring == split.RING_BLOCKS * largest


def test_without_a_budget_everything_stays() -> None:
    plan = planned("float8", (1024, 1024), 1, None)
    plan.require_budget()
    assert all(phase.ring == phase.visiting == phase.once == 0 for phase in plan.stages)
    assert all(phase.tokens == 0 for phase in plan.stages)
    roomy = planned("float8", (1024, 1024), 1, plan.peak_bytes / GB + 24)
    assert [phase.resident for phase in roomy.stages] == [p.resident for p in plan.stages]


def test_encoders_stay_only_where_the_others_fit_too() -> None:
    weights, geometry, card = encoders(24), T5Geometry(), CARDS["fused"]
    others = 12 * GB
    alone = plan_text(weights.sizes, geometry, 2, 24 * GB, card).peak
    plan = plan_text(weights.sizes, geometry, 2, alone + others, card, others)
    assert (plan.ring, plan.resident) == (0, weights.travelling_bytes)
    plan = plan_text(weights.sizes, geometry, 2, alone + others - 1, card, others)
    assert (plan.visiting, plan.resident) == (
        sum(block.nbytes for block in weights.blocks),
        weights.root.nbytes,
    )
    assert plan.peak <= plan.smallest + 2 * weights.largest_bytes


def test_seconds_of_a_step_are_the_longer_of_copies_and_arithmetic() -> None:
    geometry = FluxGeometry(hidden=128, double_blocks=2, single_blocks=3)
    job = Workload(32, 48, batch_size=2)  # 2 x 3 tokens and 512 words
    card = DeviceProfile(0, True, copy_rate=1e9, product_rate=4e12, attention_rate=2e12)
    products_of = 2 * 12 * 128 * 128 * 5 * 518 * 2
    attention = 4 * 128 * 518 * 518 * 5 * 2
    arithmetic = products_of / 4e12 + attention / 2e12
    phase = StagePlan("denoise", None, 0, 0, 10, 0, 3_000_000, 50_000_000, 0, 0)
    assert step_seconds(phase, geometry, job, card) == pytest.approx(3e6 / 1e9)
    resident = StagePlan("denoise", None, 0, 0, 0, 0, 0, 0, 0, 0)
    assert step_seconds(resident, geometry, job, card) == pytest.approx(arithmetic)
    assert arithmetic < 3e-3
    assert step_seconds(phase, geometry, job, DeviceProfile(0, True, 1e9, 4e12)) is None
    longer = replace(job, text_tokens=1024)
    assert step_seconds(resident, geometry, longer, card) > 1030 / 518 * arithmetic


def test_the_arithmetic_of_a_step_is_that_of_the_layers() -> None:
    """12 * width^2 multiplications a token in each kind of block."""
    module = transformer(ONE_OF_EACH, "bfloat16").module
    (double,), (single,) = module.blocks, module.single_blocks
    image = [double.attn.a_to_qkv, double.attn.a_to_out, double.ff_a[0], double.ff_a[2]]
    for layers in (image, [single.to_qkv_mlp, single.proj_out]):
        assert sum(layer.weight.numel() for layer in layers) == 12 * 3072**2


def said(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    code = main(["plan", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_plan_says_what_a_budget_allows(capsys) -> None:
    code, text, errors = said(capsys, "--vram", 8, "--size", "768x1344", "--batch", 2)
    assert (code, errors) == (0, "")
    lines = text.splitlines()
    assert lines[0] == "2 x 768x1344, 20 steps, budget 8.00 GB"
    assert [line.split(":")[0] for line in lines[1:4]] == [
        "text encoders", "denoising", "VAE decode",
    ]  # fmt: skip
    assert "visit at each pass" in lines[2]
    assert lines[4].startswith("smallest budget that works: ")
    assert len(lines) == 5, "no prediction without rates"
    rates = ["--copy-rate", 25, "--matrix-rate", 400]
    text = said(capsys, "--vram", 8, *rates)[1]
    (seconds,) = re.findall(r"^predicted: ([\d.]+) s a step$", text, re.MULTILINE)
    assert 0.05 < float(seconds) < 2


def test_plan_says_everything_to_programs(capsys) -> None:
    code, text, errors = said(capsys, "--json", "--vram", 6, "--compute", "bfloat16")
    assert (code, errors) == (0, "")
    found = json.loads(text)
    job = {
        "width": 1024,
        "height": 1024,
        "batch_size": 1,
        "steps": 20,
        "prompts": 1,
        "text_tokens": T5_TOKENS,
        "preview_bytes": 0,
        "reference_tokens": 0,
    }
    assert found["workload"] == job
    assert found["budget_bytes"] == 6 * GB
    assert found["peak_bytes"] == max(phase["peak"] for phase in found["phases"]) <= 6 * GB
    assert found["smallest_bytes"] == max(phase["smallest"] for phase in found["phases"])
    for phase in found["phases"]:
        parts = (phase[name] for name in ("values", "overhead", "ring", "resident"))
        assert phase["peak"] == sum(parts)
    without = json.loads(said(capsys, "--json")[1])
    assert without["budget_bytes"] is None
    assert {phase["ring"] for phase in without["phases"]} == {0}


def test_plan_refuses_a_budget_that_is_too_small(capsys) -> None:
    code, text, errors = said(capsys, "--vram", 0.2, "--size", "2048x2048")
    assert code == 1
    assert text.startswith("1 x 2048x2048"), "the plan is shown all the same"
    said_so = r"error: 0\.20 GB of VRAM are too little for 1 x 2048x2048: the phase '[\w ]+' needs "
    assert re.match(said_so, errors)
    (named,) = re.findall(r"Give --vram ([\d.]+) or more", errors)
    assert f"smallest budget that works: {named} GB" in text
    assert said(capsys, "--vram", named, "--size", "2048x2048")[0] == 0


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ("1000x1024", "Width 1000 is not a multiple of 16; the nearest that work are 992 and 1008"),
        ("1024x8", "Height 8 is not a multiple of 16"),
        ("16384x1024", "Width 16384 is more than"),
    ],
)
def test_plan_refuses_a_size_that_cannot_be_painted(capsys, size: str, reason: str) -> None:
    code, text, errors = said(capsys, "--size", size)
    assert (code, text) == (1, "")
    assert errors.startswith(f"error: {reason}")


@pytest.mark.parametrize(
    "arguments", [["--size", "1024"], ["--size", "axb"], ["--batch", "0"], ["--vram", "much"]]
)
def test_plan_refuses_what_is_no_number(capsys, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("channels", [64, 384])
def test_plan_takes_the_sizes_of_a_file(plain, saved, capsys, channels: int) -> None:
    wide = torch.zeros(random_models.DIT.hidden, channels, dtype=torch.bfloat16)
    file = saved(plain | {"img_in.weight": wide})
    code, text, _ = said(capsys, "--json", "--file", file, "--precision", "bfloat16")
    weights = transformer(replace(random_models.DIT, in_channels=channels), "bfloat16")
    assert code == 0
    phases = {phase["name"]: phase for phase in json.loads(text)["phases"]}
    assert phases["denoising"]["resident"] == weights.travelling_bytes


def test_a_fused_8_bit_plan_needs_less_than_a_plain_one() -> None:
    job = Workload(1024, 1024)

    def found(name: str, card: str) -> int:
        return plan_of(name, job, None, CARDS[card]).values

    assert found("int8 rotated", "fused") < 0.6 * found("int8 rotated", "plain")
    assert found("float8", "fused") < found("float8 dequantized", "fused")


def test_a_card_that_has_too_little_left_is_told_from_a_budget_that_is_too_small() -> None:
    phase = StagePlan("denoise", None, 0, 0, 0, 0, 0, 0, 0, smallest=3 * GB + 1)
    plan = Plan(Workload(64, 48, 2), 2 * GB, (phase,), None, chosen=False)
    with pytest.raises(BudgetError, match=r"Only 2\.00 GB of VRAM can be had") as refused:
        plan.require_budget()
    advise(refused.value)
    assert "2 x 64x48: the phase 'denoising' needs 3.1 GB. Close other programs" in str(
        refused.value
    )
    assert "vram_budget_gb" not in str(refused.value), "no budget would help"


@pytest.mark.parametrize("chosen", [True, False])
def test_a_shorter_prompt_is_advised_where_the_prompt_is_long(chosen: bool) -> None:
    phase = StagePlan("text", None, 0, 0, 0, 0, 0, 0, 0, smallest=3 * GB)
    for words, advised in ((T5_TOKENS, False), (T5_TOKENS + 256, True)):
        plan = Plan(Workload(64, 48, text_tokens=words), 2 * GB, (phase,), None, chosen)
        with pytest.raises(BudgetError) as refused:
            plan.require_budget()
        advise(refused.value)
        assert ("a shorter prompt" in str(refused.value)) == advised


@pytest.mark.parametrize("gb", [0.5, 3, 7, 100])
def test_the_parts_of_a_budget_fill_it_and_a_browser_can_read_them(gb: float) -> None:
    job = (1024, 1024, 1, 20)
    plan = estimate.estimate_plan(None, PRECISIONS["float8_e4m3fn"], job, gb, True, 25.0, 200.0)
    parts = [size for _, size in plan.bar()]
    assert sum(parts) == gb * GB
    assert sum(parts[:-1]) == plan.peak_bytes
    json.dumps({**plan.as_dict(), "bar": plan.bar()}, allow_nan=False)
