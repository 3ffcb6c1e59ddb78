"""What can be said of the fused kernels without a card: in Triton's interpreter and compiler."""

import itertools
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from threading import Event, Timer
from threading import enumerate as enumerate_threads

import pytest
import torch

from majicflux.engine.kernels import dispatch, libraries, matmul, probe

INTERPRETED = """
import torch
from majicflux.engine.kernels import reference
from majicflux.engine.kernels import fused_triton as fused
from majicflux.engine.kernels.row_format import ActivationFormat
from majicflux.engine.kernels.ops import norm_modulate_quantize
from majicflux.engine.kernels.row_format import LIMITS
generator = torch.Generator().manual_seed(0)
wide = torch.randn(2, 5, 1536, generator=generator).bfloat16().float()
x, gelu = wide[..., :512], wide[..., 512:]
norm = tuple(torch.randn(2, 1, 512, generator=generator) for _ in range(2))
for case in ((x, None, None), (x, norm, None), (None, None, gelu), (x, None, gelu)):
    def plainly(wanted=None):  # which uses the input of GELU up
        gelu = None if case[2] is None else case[2].clone()
        return norm_modulate_quantize(case[0], case[1], gelu, wanted)

    found = fused.norm_modulate_quantize(*case, 1e-6, torch.float32)[0]
    assert (found - plainly()).abs().max() < 1e-4
    for group in (0, 256):
        rows = plainly(ActivationFormat(torch.int8, 127.0, group))
        values, scale = fused.norm_modulate_quantize(*case, 1e-6, torch.int8, 127.0, group)
        assert torch.allclose(scale, rows.scale, rtol=1e-5)
        # A value halfway between two steps may go either way.
        assert (values.int() - rows.values.int()).abs().max() <= 1
        assert (values != rows.values).float().mean() < 0.01
rows, _ = fused.norm_modulate_quantize(x, norm, None, 1e-6, torch.bfloat16)
assert torch.allclose(rows.float(), norm_modulate_quantize(x, norm), rtol=0.01)
gate, y = torch.randn(2, 1, 512, generator=generator), torch.randn(2, 5, 512, generator=generator)
sums = x.clone()
fused.add_gated_(sums, gate, y)
assert torch.allclose(sums, x + gate * y)
y, of_row, of_column = x[0].contiguous(), rows[0, :5, :1].float().abs(), y[0, 0]
for bias in (None, gate[0, 0]):
    found, right = y.clone(), y * of_row * of_column + (0 if bias is None else bias)
    fused.rescale_(found, of_row, of_column, bias)
    assert torch.allclose(found, right, atol=1e-6)
    reference.rescale_(y_plain := y.clone(), of_row, of_column, bias)
    assert torch.allclose(y_plain, right, atol=1e-6)
every = torch.arange(256, dtype=torch.uint8).view(2, 128)
scale, found = torch.tensor([0.3, 7.0]), torch.empty(2, 128)
for weight in (every.view(torch.int8), every.view(torch.float8_e4m3fn)):
    fused.dequantize(weight, scale, found)
    right = weight.float() * scale[:, None]
    assert torch.equal(found.nan_to_num(1e6), right.nan_to_num(1e6))
print("equal")
"""


# The interpreter makes an int of an array of one number for `range`, which NumPy 2.4 refuses.
RANGES = """
from triton.runtime import interpreter
plainly_patched = interpreter._patch_lang_tensor
def patched(tensor, *given):
    plainly_patched(tensor, *given)
    tensor.__index__ = lambda self: self.handle.data.item()
interpreter._patch_lang_tensor = patched
"""


def interpreted(code: str) -> str:
    """What it prints in Triton's interpreter, which needs no card."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", RANGES + code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_fused_kernels_say_what_the_plain_operations_say() -> None:
    assert interpreted(INTERPRETED) == "equal\n"


LOW_RANK = """
import torch
import itertools
from majicflux.engine.kernels import triton_products as fused
generator = torch.Generator().manual_seed(0)
def drawn(*shape):
    return torch.randn(shape, generator=generator)
def relative(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()
depth = 272  # which fills no tile, as the rows and columns
x = drawn(200, depth).mul(30).clamp(-127, 127).to(torch.int8)
weight = drawn(176, depth).mul(30).clamp(-127, 127).to(torch.int8)
x_scale, scale, bias = drawn(200, 1).abs(), drawn(176).abs() / depth, drawn(176)
def exactly(x, x_scale, weight, scale):
    return (x.double() * x_scale) @ (weight.double() * scale[:, None]).T
for dtype in (torch.int8, torch.float8_e4m3fn):
    for ranks in (16, 48, 96):
        some = [t.to(dtype) if t.dtype == torch.int8 else t for t in (x, weight)]
        given = some[0], x_scale, some[1][:ranks], scale[:ranks]
        for parts in (1, 2):
            low = torch.empty(parts, 200, ranks)
            fused.low_rank_rows(*given, low)
            assert relative(low.sum(0), exactly(*given)) < 1e-6, (dtype, ranks, parts)
first_rank = torch.tensor([32, 16], dtype=torch.int32)  # of the two tiles of columns
for ranks, dtype in itertools.product((16, 48, 64, 256), (torch.int8, torch.float8_e4m3fn)):
    parts = drawn(1 + (ranks > 48), 200, ranks + 32)
    low, up = parts.sum(0), drawn(176, ranks)
    found, plain = torch.empty(200, 176), torch.empty(200, 176)
    given = x.to(dtype), x_scale, weight.to(dtype), scale, bias
    fused.product(*given, found, (parts, up, first_rank))
    exact = exactly(*given[:4]) + bias
    exact[:, :128] += low[:, 32 : 32 + ranks].double() @ up[:128].double().T
    exact[:, 128:] += low[:, 16 : 16 + ranks].double() @ up[128:].double().T
    assert relative(found, exact) < 1e-6, (ranks, dtype)
    some = slice(40, 77)
    part = torch.empty(37, 176)
    few = given[0][some], x_scale[some]
    fused.product(*few, *given[2:], part, (parts[:, some].contiguous(), up, first_rank))
    assert relative(part, exact[some]) < 1e-6
    last = torch.empty(200, 48)
    columns = given[2][128:], scale[128:], bias[128:]
    fused.product(*given[:2], *columns, last, (parts, up[128:], first_rank[1:]))
    assert relative(last, exact[:, 128:]) < 1e-6
    fused.add_low_rank_(found.copy_(bias.expand(200, 176)), (parts, up, first_rank))
    assert relative(found, exact - exactly(*given[:4])) < 1e-6
    fused.product(*given, plain)
    assert relative(plain, exactly(*given[:4]) + bias) < 1e-6
print("equal")
"""


def test_the_kernels_of_low_rank_terms_say_what_float64_says() -> None:
    """In float32: Triton's interpreter multiplies no bfloat16."""
    pytest.importorskip("triton.tools.tensor_descriptor")
    assert interpreted(LOW_RANK) == "equal\n"


TRIALS = """
from itertools import islice
import torch
from majicflux.engine.kernels import probe
trials = list(probe.fused(torch.device("cpu"), False))
for dtype in (torch.int8, torch.float8_e4m3fn):
    trials += islice(probe.low_rank(torch.device("cpu"), dtype, True), 2)
print(len(trials), all(probe.same(*trial) for trial in trials))
"""


def test_the_trials_find_the_kernels_right() -> None:
    assert interpreted(TRIALS) == "13 True\n"


def test_a_kernel_that_fails_its_trial_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    right = torch.ones(3)
    rounds = []

    def wrong_when_started_again():
        rounds.append(1)
        yield right, right
        yield right * len(rounds), right

    def refused():
        yield right, right
        raise KeyError("no compiler")

    def short_of_memory():
        yield right, right
        raise torch.OutOfMemoryError

    assert dispatch._tried("It", lambda: iter([(right, right)]))
    with pytest.raises(torch.OutOfMemoryError):
        dispatch._tried("It", short_of_memory)
    assert not caplog.messages
    assert not dispatch._tried("It", wrong_when_started_again)
    assert not dispatch._tried("It", refused)
    assert not dispatch._tried("It", lambda: iter([(right * torch.nan, right)]))
    assert [message.split("; ")[0] for message in caplog.messages] == [
        "It does not work here (wrong results)",
        "It does not work here (KeyError: 'no compiler')",
        "It does not work here (wrong results)",
    ]


def test_kernels_are_tried_while_something_else_is_done(monkeypatch) -> None:
    """Once, and whoever asks meanwhile waits for the verdict."""
    begun, go_on, trials = Event(), Event(), []

    def trial(*_: object):
        trials.append(1)
        begun.set()
        go_on.wait(30)
        yield torch.ones(3), torch.ones(3)

    device = torch.device("cuda", 7)  # which nothing else asks for
    monkeypatch.setattr(dispatch, "capability", lambda _: (8, 9))
    monkeypatch.setattr(probe, "fused", trial)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    dispatch.try_ahead(torch.device("cpu"))
    assert not trials
    dispatch.try_ahead(device)
    assert begun.wait(30)
    Timer(0.1, go_on.set).start()
    assert dispatch.triton_works(device)
    dispatch.try_ahead(device)
    assert len(trials) == 2, "of which the second takes a kernel's shorter way"


@pytest.mark.parametrize(
    ("card", "kitchen", "tried"),
    [((9, 0), False, {torch.int8, torch.float8_e4m3fn}), ((8, 6), False, {torch.int8}),
     ((8, 9), True, {torch.float8_e4m3fn})],
)  # fmt: skip
def test_kernels_of_low_rank_terms_are_tried_ahead_where_rows_reach_them(
    monkeypatch, card: tuple[int, int], kitchen: bool, tried: set[torch.dtype]
) -> None:
    found = set()
    monkeypatch.setattr(dispatch, "_tried_ahead", set())
    monkeypatch.setattr(dispatch, "capability", lambda _: card)
    monkeypatch.setattr(dispatch, "triton_works", lambda _: True)
    monkeypatch.setattr(dispatch, "kitchen_is_faster", lambda _: kitchen)
    monkeypatch.setattr(dispatch, "low_rank_works", lambda _, dtype: found.add(dtype))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    before = {*enumerate_threads()}
    dispatch.try_ahead(torch.device("cuda", 0), [torch.int8, torch.float8_e4m3fn])
    for thread in {*enumerate_threads()} - before:
        thread.join(30)
    assert found == tried


def test_row_scales_are_taken_only_where_the_product_is_right(monkeypatch) -> None:
    """On Windows PyTorch refuses them, and on a CPU up to some version."""

    def refuse(*_, **__) -> None:
        raise RuntimeError("scale_a must have 1 element")

    def multiply(x, weight, x_scale, scale, *, bias, out, **_) -> None:
        out.copy_((x.float() * x_scale) @ (weight.float() * scale) + bias)

    def with_one_scale(x, weight, x_scale, scale, **options) -> None:
        multiply(x, weight, x_scale[:1], scale[:, :1], **options)

    for product, right in ((refuse, False), (multiply, True), (with_one_scale, False)):
        monkeypatch.setattr(libraries, "_scaled_mm", product)
        found = dispatch.float8_takes_row_scales.__wrapped__(torch.device("cpu"))
        assert found == right, product


SHARED_MEMORY = 99 * 1024  # bytes that a program has on RTX 30, 40 and 50, the least of all cards
OF_HOPPER = 227 * 1024
FLOAT8_UNITS = 89  # compute capability times 10
REGISTERS = 2**16  # of a multiprocessor, where one program of a product waits while another works


@pytest.mark.parametrize("capability", [86, 89, 90, 120])
def test_every_kernel_compiles_for_cards_that_are_not_here(capability: int, monkeypatch) -> None:
    """At the widths of Flux.1, into machine code by Triton's own assembler."""
    fused = pytest.importorskip("majicflux.engine.kernels.fused_triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, compile

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv",
             torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32"}  # fmt: skip
    compiled = []

    def start(kernel, device, programs, given, num_warps=4, **constants) -> None:
        signature, fixed, divisible = {}, {}, {}
        for place, (name, value) in enumerate(zip(kernel.arg_names, given, strict=False)):
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + names[value.dtype]
            elif hasattr(value, "base"):  # a TensorDescriptor
                signature[name] = f"tensordesc<{names[value.base.dtype]}{value.block_shape}>"
            else:
                signature[name] = "i32" if isinstance(value, int) and value > 1 else "constexpr"
            if signature[name] == "constexpr":
                fixed[place,] = value
            elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                divisible[place,] = [["tt.divisibility", 16]]
        for name, value in constants.items():
            signature[name] = "constexpr"
            fixed[kernel.arg_names.index(name),] = value
        source = ASTSource(kernel, signature, fixed, divisible)
        target = GPUTarget("cuda", capability, 32)
        found = compile(source, target=target, options={"num_warps": num_warps})
        assert found.metadata.shared <= (OF_HOPPER if capability == 90 else SHARED_MEMORY)
        if kernel.__name__ == "_product" and capability == 90 and occurs(**constants):
            assert registers(found.asm["cubin"]) * 32 * num_warps <= REGISTERS // 2, fixed
        compiled.append(kernel.__name__)

    def occurs(RANKS: int, PARTS: int, **_: object) -> bool:
        return any(matmul.low_parts(RANKS, depth) == PARTS for depth in (3072, 12288))

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    products = pytest.importorskip("majicflux.engine.kernels.triton_products")
    for module in (fused, products):
        monkeypatch.setattr(module, "start", start)
    residual = empty(1, 64, 3072, dtype=torch.float32)
    modulation = empty(1, 1, 3072, dtype=torch.float32)
    beside = empty(1, 64, 3072), None, empty(1, 64, 12288)
    formats = [(torch.bfloat16, 0.0, 0), (torch.bfloat16, 0.0, 256), (torch.int8, 127.0, 256)]
    if capability >= FLOAT8_UNITS:
        formats.append((torch.float8_e4m3fn, 448.0, 0))
    for wanted in formats:
        fused.norm_modulate_quantize(residual, (modulation, modulation), None, 1e-6, *wanted)
        fused.norm_modulate_quantize(*beside, 1e-6, *wanted)
    head, rope = empty(128), empty(1, 1, 64, 64, 2, 2, dtype=torch.float32)
    fused.rms_rope_(empty(1, 64, 9216), head, head, rope, 24, 1e-6)
    fused.add_gated_(residual, modulation, empty(1, 64, 3072))
    scale = empty(3072, dtype=torch.float32)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        fused.dequantize(empty(3072, 64, dtype=dtype), scale, empty(3072, 64))
    rows, weight = empty(64, 3072, dtype=torch.int8), empty(3072, 3072, dtype=torch.int8)
    methods = find_spec("triton.tools.tensor_descriptor") is not None  # since Triton 3.4
    for bias in (None, empty(3072)):
        if methods:
            products.product(rows, scale[:64, None], weight, scale, bias, empty(64, 3072))
        fused.rescale_(empty(64, 3072), scale[:64, None], scale, bias)
    first_rank, of_rows = empty(24, dtype=torch.int32), scale[:64, None]
    ranks = [16, 48, 64, 96, 256]
    for some, parts in itertools.product(ranks, (1, 2)):
        added = empty(parts, 64, some + 16), empty(3072, some), first_rank
        if methods:
            products.product(rows, of_rows, weight, scale, None, empty(64, 3072), added)
            products.add_low_rank_(empty(64, 3072), added)
        for dtype in (torch.int8, torch.float8_e4m3fn)[: 1 + (capability >= FLOAT8_UNITS)]:
            narrow = empty(64, 64, dtype=dtype), of_rows, empty(some, 64, dtype=dtype), scale[:some]
            products.low_rank_rows(*narrow, empty(parts, 64, some))
    of_ranks = 2 * len(ranks) * (1 + 2 * methods + (capability >= FLOAT8_UNITS))
    assert len(compiled) == 2 * len(formats) + 6 + 2 * methods + of_ranks


def registers(cubin: bytes) -> int:
    """That each thread of its one kernel takes, by the attribute EIATTR_REGCOUNT."""
    (found,) = re.findall(rb"\x04\x2f\x08\x00.{4}(.{4})", cubin, re.DOTALL)
    return int.from_bytes(found, "little")


def test_a_compiled_kernel_is_found_by_all_that_is_compiled_in(monkeypatch) -> None:
    triton_start = pytest.importorskip("majicflux.engine.kernels.triton_start")
    monkeypatch.setattr(triton_start, "_compiled", {})
    started = []

    class Kernel:
        __name__ = "kernel"

        def __init__(self, version: int = 0):
            self.version = version

        def __getitem__(self, programs: tuple[int, int, int]):
            def start(*given: object, **constants: object) -> "Kernel":
                started.append((self.version, programs, len(given) + len(constants)))
                return Kernel(1)

            return start

    x = torch.zeros(64)
    cases = [(x, 16), (x[1:], 16), (x.half(), 16), (x, 1), (x, 5), (x, 2**31), (None, 16)]
    for given in cases:
        for constant in (1, 2):
            for _ in range(2):
                triton_start.start(Kernel(), x.device, (3, 1, 1), given, WIDTH=constant)
    # The first of two through Triton, which is told the warps too; the second as it was compiled.
    assert started == [(0, (3, 1, 1), 4), (1, (3, 1, 1), 3)] * 2 * len(cases)
    triton_start.start(Kernel(), x.device, (5, 1, 1), (x[4:], 32), WIDTH=1)
    assert started[-1] == (1, (5, 1, 1), 3), "another tensor and number of the same kind"


def test_a_cpu_has_no_fused_kernels() -> None:
    assert not dispatch.fused(torch.zeros(1))
    assert dispatch.capability(torch.device("cpu")) is None
