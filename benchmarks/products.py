"""One linear layer of Flux.1 at 1024x1024, the quantization of its input included, on a card.

Ours against every library that could have done it: PyTorch's own products behind a compiled
quantization, comfy-kitchen, torchao (each if it is installed), and bfloat16. --quick runs what a
CPU can, on a small layer, which only shows that the script works.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from majicflux.engine.kernels.hadamard import rotate
from majicflux.engine.kernels.ops import norm_modulate_quantize
from majicflux.engine.quant.formats import FLOAT8, INT8_ROTATED, Storage
from majicflux.engine.quant.linear import StoredLinear
from majicflux.engine.quant.methods import Dequantized, EightBit
from majicflux.engine.quant.quantize import quantize_rows

from .table import Row, options, report

SHAPES = ((4608, 3072, 21504), (4608, 15360, 3072), (4096, 3072, 12288))  # tokens, in, out
STORAGES = {"float8": FLOAT8, "int8 rotated": INT8_ROTATED}
REPEATS = 20
Product = Callable[[], Tensor]


def main() -> None:
    chosen = options(__doc__ or "")
    if not chosen.quick and not torch.cuda.is_available():
        sys.exit("not measured: no CUDA card here; --quick shows that the script works")
    device = torch.device("cpu") if chosen.quick else torch.device("cuda", 0)
    rows = []
    torch.manual_seed(0)
    with torch.inference_mode():
        for tokens, depth, width in ((64, 256, 512),) if chosen.quick else SHAPES:
            x = torch.randn(1, tokens, depth, device=device, dtype=torch.bfloat16)
            weight = torch.randn(width, depth, device=device, dtype=torch.bfloat16) * 0.02
            bias = torch.zeros(width, device=device, dtype=torch.bfloat16)
            shape = f"{tokens}x{depth}x{width}"
            # GELU has to pass over memory anyway: what does it cost to quantize on the way?
            activated = measure(lambda: norm_modulate_quantize(None, gelu=x), device)  # noqa: B023
            for name, storage in STORAGES.items():
                layer = ours(weight, bias, storage)
                layer.method = EightBit([layer.weight.dtype], device, plain_product(layer, x))
                seconds = measure(lambda: layer.rows(None, gelu=x), device)  # noqa: B023
                name = f"{shape} GELU and rows in {name}"
                print(f"{name}: {seconds * 1e6:.1f} us, GELU {activated * 1e6:.1f} us", flush=True)
                rows.append(Row(name, seconds * 1e6, "us", activated * 1e6, "GELU in bfloat16"))
            exact = F.linear(x.float(), weight.float())
            plain = measure(lambda: F.linear(x, weight, bias), device)  # noqa: B023
            for name, product in candidates(x, weight, bias, device):
                try:
                    error = ((product().float() - exact).norm() / exact.norm()).item()
                    seconds = measure(product, device)
                except Exception as problem:  # a library that does not run here
                    print(f"not measured: {name}: {str(problem).splitlines()[0]}")
                    continue
                name = f"{shape} {name}, off by {error:.4f}"
                print(f"{name}: {seconds * 1e6:.0f} us", flush=True)
                rows.append(Row(name, seconds * 1e6, "us", plain * 1e6, "bfloat16"))
    report(rows, chosen.check)


def candidates(
    x: Tensor, weight: Tensor, bias: Tensor, device: torch.device
) -> Iterator[tuple[str, Product]]:
    for name, storage in STORAGES.items():
        layer = ours(weight, bias, storage)
        plain = plain_product(layer, x)
        for kind, product in (
            ("dequantized", plain),
            ("in 8 bits", EightBit([layer.weight.dtype], device, plain)),
        ):
            layer.method = product
            yield f"ours {name}, {kind}", lambda layer=layer: layer(layer.rows(x))
    if device.type == "cuda":
        yield from of_libraries(x, weight, bias)


def of_libraries(x: Tensor, weight: Tensor, bias: Tensor) -> Iterator[tuple[str, Product]]:
    """Float8 and rotated int8 of others, on a card."""
    float8, int8 = ours(weight, bias, FLOAT8), ours(weight, bias, INT8_ROTATED)

    def quantized(rows: Tensor, limit: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scale = rows.float().abs().amax(-1, keepdim=True) / limit
        values = rows.float() / scale
        return (values.round() if dtype == torch.int8 else values).to(dtype), scale

    compiled = torch.compile(quantized)
    finish = torch.compile(lambda sums, s, t, b: (sums.float() * s * t + b).to(torch.bfloat16))

    def scaled_mm() -> Tensor:
        values, scale = compiled(x[0], 448.0, torch.float8_e4m3fn)
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            values, float8.weight.T, scale, float8.scale[None], bias=bias,
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip

    def int_mm() -> Tensor:
        values, scale = compiled(rotate(x[0], int8.group), 127.0, torch.int8)
        sums = torch._int_mm(values, int8.weight.T)  # pyright: ignore[reportPrivateImportUsage]
        return finish(sums, scale, int8.scale, bias)

    yield "torch._scaled_mm, compiled quantization", scaled_mm
    yield "torch._int_mm, compiled quantization", int_mm
    try:
        import comfy_kitchen
    except ImportError:
        print("not measured: comfy-kitchen is not installed")
    else:
        for backend in ("cuda", "triton"):

            def kitchen(backend: str = backend) -> Tensor:
                with comfy_kitchen.use_backend(backend):
                    return comfy_kitchen.int8_linear(
                        x, int8.weight, int8.scale, bias, x.dtype, convrot=True
                    )

            yield f"comfy-kitchen int8 rotated, {backend}", kitchen
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError:
        print("not measured: torchao is not installed")
        return
    for name, config in (
        ("float8", Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())),
        ("int8", Int8DynamicActivationInt8WeightConfig()),
    ):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], device=x.device, dtype=x.dtype)
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
        model = torch.nn.Sequential(linear)
        quantize_(model, config)
        model = torch.compile(model)
        yield f"torchao {name}", lambda m=model: m(x)


def ours(weight: Tensor, bias: Tensor, storage: Storage) -> StoredLinear:
    layer = StoredLinear(weight.shape[1], len(weight), bias=True, storage=storage)
    layer.to_empty(device=weight.device)
    assert layer.scale is not None
    assert layer.bias is not None
    quantize_rows(weight, layer.weight, layer.scale, layer.group)
    layer.bias.copy_(bias)
    return layer


def plain_product(layer: StoredLinear, x: Tensor) -> Dequantized:
    return Dequantized([layer], x.device, x.dtype)


def measure(product: Product, device: torch.device) -> float:
    """Median seconds."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(product, warmup=20, rep=100, return_mode="median")) / 1e3  # pyright: ignore
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
