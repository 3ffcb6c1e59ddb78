"""Whole pictures with adapters: their bits, their memory, and what serves the next run."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from adapter_terms import (
    CLIP_LAYER,
    LAYERS,
    REQUEST,
    adapter_of,
    delta,
    latents,
    relative,
    term,
    with_adapters,
)

from file_layouts import Tensors
from majicflux.benchmarks import random_models
from majicflux.engine.flux.transformer import DiT, build_flux_dit
from majicflux.engine.offload.weight_block import CPU
from majicflux.engine.quant import adapters as adapters_module
from majicflux.engine.quant.adapters import adapted, bound_bytes, touched
from majicflux.engine.quant.compute import ComputePrecision
from majicflux.engine.quant.formats import (
    PRECISIONS,
    Storage,
    uniform,
)
from majicflux.engine.quant.linear import stored_linears
from majicflux.engine.quant.low_rank import Adapter
from majicflux.loaders.flux_dit import load_flux_dit

FLOAT32 = uniform(Storage("float32"))


@pytest.mark.usefixtures("narrow")
def test_a_picture_is_that_of_the_merged_file(
    make_pipeline, plain: Tensors, saved: Callable[..., object]
) -> None:
    pipeline = make_pipeline(precision=FLOAT32, dtype=torch.float32)
    adapter = adapter_of(pipeline.dit.weights.module)
    merged = {name: tensor.float() for name, tensor in plain.items()}
    for name, theirs in LAYERS.items():
        weight = merged[f"{theirs}.weight"]
        weight += delta(adapter.terms[name][0], len(weight), 0.8).float()
    weights, geometry = load_flux_dit(saved(merged), FLOAT32)
    dit = DiT(weights, type(pipeline.dit.patcher)(weights, CPU), geometry, FLOAT32)
    expected = latents(replace(pipeline, dit=dit))
    before = latents(pipeline)
    found = latents(with_adapters(pipeline, (adapter, 0.8)))
    assert relative(found, expected.double()) < 1e-5
    assert relative(before, expected.double()) > 1e-3, "it says something"
    assert torch.equal(latents(pipeline), before), "handles do not touch each other"


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("precision", ["float8_e4m3fn", "int8 rotated"])
def test_streamed_pictures_and_chunks_are_the_same_bits(
    make_pipeline, monkeypatch, precision: str
) -> None:
    options = {"precision": PRECISIONS[precision], "mode": "8-bit"}
    pipeline = make_pipeline(**options)
    adapter = adapter_of(pipeline.dit.weights.module)
    expected = latents(with_adapters(pipeline, (adapter, 1.0)))
    device = torch.device("cpu", 0)
    streaming = with_adapters(make_pipeline(**options, device=device), (adapter, 1.0))
    smallest = streaming.plan(REQUEST.workload).smallest_bytes
    streaming = replace(streaming, budget_bytes=smallest)
    assert torch.equal(latents(streaming), expected)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", [*LAYERS, CLIP_LAYER])
def test_a_shortage_while_an_adapter_comes_is_survived(
    make_pipeline, monkeypatch, name: str
) -> None:
    """Where there is nothing to free, it is tried once more."""
    pipeline = make_pipeline()
    encoders = pipeline.text_encoders
    layer: Any = encoders.weights.module.get_submodule(CLIP_LAYER)
    of_clip = Adapter({}, text_encoder={CLIP_LAYER: (term(4, *layer.weight.shape),)})
    encoders = replace(encoders, adapters=((of_clip, 1.0),))
    lora = adapter_of(pipeline.dit.weights.module)
    pipeline = with_adapters(replace(pipeline, text_encoders=encoders), (lora, 1.0))
    expected = latents(pipeline)
    pipeline.dit.last_conditions.forget()
    pipeline.dit.last_terms.made_of()
    encoders.forget()
    where = "_on_device" if name == CLIP_LAYER else "_bound"
    real, failures = getattr(adapters_module, where), []

    def short(*given: Any) -> Any:
        if not failures and name in (CLIP_LAYER, given[1]):
            failures.append(name)
            raise torch.OutOfMemoryError("simulated")
        return real(*given)

    monkeypatch.setattr(adapters_module, where, short)
    assert torch.equal(latents(pipeline), expected)
    assert failures == [name]
    assert not any(layer.adapted for layer in stored_linears(pipeline.dit.weights.module))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("precision", ["bfloat16", "float8_e4m3fn", "int8 rotated"])
def test_what_is_bound_serves_the_next_run_too(make_pipeline, monkeypatch, precision: str) -> None:
    pipeline = make_pipeline(precision=PRECISIONS[precision])
    lora = adapter_of(pipeline.dit.weights.module)
    one, other = (with_adapters(pipeline, (lora, strength)) for strength in (1.0, 0.5))
    real, made = adapters_module._bound, []

    def counted(*given: Any) -> Any:
        made.append(given[1])
        return real(*given)

    monkeypatch.setattr(adapters_module, "_bound", counted)
    expected = latents(one)
    everything = set(made)
    made.clear()
    assert torch.equal(latents(one), expected)
    assert not made
    assert not torch.equal(latents(other), expected)
    assert set(made) == everything
    assert torch.equal(latents(one), expected)


@pytest.mark.usefixtures("narrow")
def test_a_new_strength_needs_no_conditions_where_none_depends_on_it(make_pipeline) -> None:
    pipeline = make_pipeline()
    module = pipeline.dit.weights.module
    adapter = adapter_of(module)
    of_steps = Adapter({n: t for n, t in adapter.terms.items() if n.startswith("single_blocks")})
    calls: list[int] = []
    module.time_embedder.register_forward_pre_hook(lambda *_: calls.append(1))
    for strength in (1.0, 0.5):
        latents(with_adapters(pipeline, (of_steps, strength)))
    assert len(calls) == REQUEST.steps
    for strength in (1.0, 0.5):
        latents(with_adapters(pipeline, (adapter, strength)))
    assert len(calls) == 3 * REQUEST.steps


@pytest.mark.parametrize(("precision", "eight_bit"), [("bfloat16", ()), ("float8_e4m3fn", (1,))])
def test_bytes_of_adapters_are_those_that_are_planned(precision: str, eight_bit: tuple) -> None:
    weights = build_flux_dit(random_models.DIT, PRECISIONS[precision]).allocate()
    compute = ComputePrecision(
        torch.bfloat16, frozenset({torch.float8_e4m3fn}) if eight_bit else frozenset()
    )
    adapters = [(adapter_of(weights.module, rank), 1.0) for rank in (4, 20)]
    of_picture = term(8, random_models.DIT.hidden, 128), term(4, random_models.DIT.hidden, 64)
    adapters.append((Adapter({"x_embedder": of_picture}), 1.0))
    names = touched(adapters)
    planned, ranks = bound_bytes(
        weights.module, adapters, names, compute.method(weights.module, CPU)
    )
    assert ranks == 48
    module = weights.module
    given = (module, adapters, names, torch.bfloat16, CPU)
    with compute.applied_to(module, CPU), adapted(*given):
        bound = [module.get_submodule(name).adapted for name in names]
        tensors = [x for each in bound for x in (each.up, each.first_ranks)]
        tensors += [weight for each in bound for weight in each.down.parameters()]
        assert sum(tensor.nbytes for tensor in tensors) == planned


@pytest.mark.usefixtures("narrow")
def test_the_smallest_budget_grows_with_adapters(make_pipeline) -> None:
    pipeline = make_pipeline(device=torch.device("cpu", 0))
    adapter = adapter_of(pipeline.dit.weights.module, rank=64)
    plain, more = (
        each.denoise.plan(REQUEST.workload, None)
        for each in (pipeline, with_adapters(pipeline, (adapter, 1.0)))
    )
    method = pipeline.compute.method(pipeline.dit.weights.module, CPU)
    names = replace(pipeline.dit, adapters=((adapter, 1.0),)).adapted_always
    nbytes, _ = bound_bytes(pipeline.dit.weights.module, [(adapter, 1.0)], names, method)
    assert more.smallest >= plain.smallest + nbytes
