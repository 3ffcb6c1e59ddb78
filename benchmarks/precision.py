"""Relative L2 error of a Flux.1 transformer's output in each weight format, against float32.

Random weights and inputs that bfloat16 holds exactly, the same ones for every scheme. All schemes
advance together, part by part, so that 12 billion weights need a few GB of memory. A quarter of the
tokens are text. The same seed gives other numbers on a card than on a CPU. --quick takes a small
transformer.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean
from typing import Any

import torch
from diffsynth.core.vram.layers import AutoWrappedLinear, AutoWrappedModule, enable_vram_management
from diffsynth.models.flux_dit import FluxSingleTransformerBlock, RoPEEmbedding
from diffsynth.models.general_modules import RMSNorm
from torch import Tensor, nn
from torch.nn import functional as F

from majicflux.dev import find_comfyui
from majicflux.engine.flux.blocks import DoubleBlock, SingleBlock, TokenSequence
from majicflux.engine.flux.geometry import ROPE_AXES, FluxGeometry, kind_of_layer
from majicflux.engine.flux.transformer import ROPE_THETA
from majicflux.engine.kernels.row_format import FLOAT8_DTYPE, LIMITS
from majicflux.engine.offload.chunking import Chunking
from majicflux.engine.quant.attention import Attention
from majicflux.engine.quant.compute import ComputePrecision
from majicflux.engine.quant.formats import PRECISIONS, Precision
from majicflux.engine.quant.linear import StoredLinear, StoredNorm, store
from majicflux.engine.run.attention import int8_obstacle

from .measuring import relative_error
from .random_flux import Draw, Part, heavy_tailed, mixed, normal, parts
from .table import Row, report

SMALL = FluxGeometry(hidden=512, double_blocks=2, single_blocks=4, text_width=512)
TEXT_STD = 0.2  # about that of T5's output
COLUMNS = 16  # of the picture, in tokens

JUDGED = "heavy-tailed"  # the distribution that the bars are about
DISTRIBUTIONS: dict[str, Draw] = {"normal": normal, JUDGED: heavy_tailed, "mixed": mixed}
EXACT = "float32"
CAST, FAST = "DiffSynth's cast to float8_e4m3fn", "ComfyUI fp8_e4m3fn_fast"
FLOAT8_BOTH, INT8_BOTH = "float8_e4m3fn, 8x8 bit", "int8 rotated, 8x8 bit"
ATTENDING = "attention in int8"  # behind the name of a scheme
BARS = (  # ours, peer, share of the peer's error that is allowed
    ("float8_e4m3fn", CAST, 0.45),
    ("int8 rotated", CAST, 0.2),
    (FLOAT8_BOTH, FAST, 0.6),
    (INT8_BOTH, FAST, 0.3),
    (f"{INT8_BOTH}, {ATTENDING}", INT8_BOTH, 1.15),
)

BFLOAT16 = ComputePrecision(torch.bfloat16)
State = tuple[Tensor, ...]  # image, text, conditioning
Errors = dict[str, float]  # by scheme


@dataclass(frozen=True)
class Scheme:
    """A way to store weights and to compute. make: the module of a part, with its weights; dtype:
    of what is passed from part to part."""

    name: str
    make: Callable[[Part], nn.Module]
    computing: ComputePrecision = BFLOAT16
    dtype: torch.dtype = torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small version, for any CPU")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--tokens", type=int, help="4608 on a card, 64 on a CPU, if not given")
    parser.add_argument("--seeds", type=int, default=4, help="errors are their mean over so many")
    parser.add_argument("--weights", choices=DISTRIBUTIONS, nargs="+", help="all by default")
    parser.add_argument("--bars", action="store_true", help="only what the bars compare")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    chosen = parser.parse_args()
    g = SMALL if chosen.quick else FluxGeometry()
    tokens = chosen.tokens or (64 if chosen.device.type == "cpu" else 4608)
    schemes = [exact(), *peers(chosen.device), *ours(chosen.device)]
    if chosen.bars:
        compared = {EXACT, *(name for ours_name, peer, _ in BARS for name in (ours_name, peer))}
        schemes = [s for s in schemes if s.name in compared]
    found = {}
    for name in chosen.weights or ([JUDGED] if chosen.bars else DISTRIBUTIONS):
        draw = DISTRIBUTIONS[name]
        print(f"{name} weights", file=sys.stderr)
        drawn = []
        for seed in range(1, chosen.seeds + 1):
            drawn.append(errors(draw, g, schemes, tokens, chosen.device, seed))
            said = (f"{scheme}: {error:.4f}" for scheme, error in drawn[-1][1].items())
            print(f"seed {seed}:", *said, sep="\n  ", file=sys.stderr)
        blocks, output = (
            {s.name: mean(d[place][s.name] for d in drawn) for s in schemes} for place in (0, 1)
        )
        found[name] = blocks, output
        if name == JUDGED and chosen.seeds > 1:
            for ours_name, peer, _ in BARS:
                both = [e for _, e in drawn if {ours_name, peer} <= {*e}]
                ratios = [e[ours_name] / e[peer] for e in both]
                print(f"{ours_name} / {peer}:", *(f"{ratio:.3f}" for ratio in ratios))
    print(
        f"\n{g.double_blocks} + {g.single_blocks} blocks of width {g.hidden}, {tokens} "
        f"tokens, {chosen.seeds} seeds, {chosen.device.type}; in brackets: of the image after the "
        "last block\n\n"
        f"| scheme | {' | '.join(found)} |\n|{'---|' * (1 + len(found))}"
    )
    for scheme in schemes[1:]:
        pairs = [(output[scheme.name], blocks[scheme.name]) for blocks, output in found.values()]
        cells = [f"{output:.4f} ({blocks:.4f})" for output, blocks in pairs]
        print(f"| {scheme.name} | {' | '.join(cells)} |")
    if JUDGED not in found:
        return
    print(f"\n{JUDGED} weights\n")
    _, judged = found[JUDGED]
    rows = [
        Row(f"{name}, bar {share:g} × the peer's", judged[name], "", judged[peer], peer,
            bar=share * judged[peer])
        for name, peer, share in BARS
        if {name, peer} <= {*judged}
    ]  # fmt: skip
    report(rows, chosen.check)


def plain(dtype: torch.dtype, part: Part, change: Callable[[nn.Module], None] | None = None):
    """DiffSynth's module, after `change`, with every parameter in `dtype`."""
    module = part.module()
    if change is not None:
        change(module)
    weights = {name: weight.to(dtype) for name, weight in part.weights.items()}
    module.load_state_dict(weights, assign=True)
    return module


def exact() -> Scheme:
    """What the others are compared with."""
    return Scheme(
        EXACT, partial(plain, torch.float32), ComputePrecision(torch.float32), torch.float32
    )


def peers(device: torch.device) -> Iterator[Scheme]:
    yield Scheme("bfloat16 (DiffSynth's blocks)", partial(plain, torch.bfloat16))
    stages = ("offload", "onload", "preparing")
    config: dict[str, object] = {f"{stage}_dtype": FLOAT8_DTYPE for stage in stages}
    config |= {f"{stage}_device": device.type for stage in (*stages, "computation")}
    config["computation_dtype"] = torch.bfloat16
    wrappers = {nn.Linear: AutoWrappedLinear, RMSNorm: AutoWrappedModule}

    def cast(part: Part) -> nn.Module:
        return enable_vram_management(plain(FLOAT8_DTYPE, part), wrappers, config)

    yield Scheme(CAST, cast)
    comfyui = find_comfyui()
    if comfyui is None:
        print(f"not measured: no ComfyUI, so neither its fp8_e4m3fn nor {FAST}")
        return
    sys.path.append(str(comfyui))
    from comfy.cli_args import args

    if device.type == "cpu":
        args.cpu = True
        # It says at every product that the rounded operands are multiplied in bfloat16 here.
        logging.getLogger("comfy_kitchen").setLevel(logging.ERROR)
    from comfy import ops

    class FastLinear(ops.fp8_ops.Linear):
        def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
            y = ops.fp8_linear(self, input)  # its own forward hides when this fails
            if y is None:
                raise RuntimeError(f"ComfyUI refuses an input of {tuple(input.shape)} in float8")
            return y

    def replace(linear: type[nn.Module], module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                new = linear(child.in_features, child.out_features, device="meta")
            elif isinstance(child, RMSNorm):
                width = child.weight.numel()  # pyright: ignore[reportOptionalMemberAccess]
                new = ops.manual_cast.RMSNorm(width, eps=child.eps, device="meta")
            else:
                replace(linear, child)
                continue
            setattr(module, name, new)

    for name, linear in (("ComfyUI fp8_e4m3fn", ops.manual_cast.Linear), (FAST, FastLinear)):
        yield Scheme(name, partial(plain, FLOAT8_DTYPE, change=partial(replace, linear)))


def ours(device: torch.device) -> Iterator[Scheme]:
    float8, int8 = PRECISIONS["float8_e4m3fn"], PRECISIONS["int8 rotated"]
    unscaled = PRECISIONS["float8_e4m3fn unscaled"]
    precisions = {
        **PRECISIONS,
        "float8_e4m3fn unscaled, rest bfloat16": unscaled.with_kinds(rest=float8.rest),
        "float8_e4m3fn, modulation int8 rotated": float8.with_kinds(modulation=int8.mlp),
        "float8_e4m3fn, modulation float8_e4m3fn": float8.with_kinds(modulation=float8.mlp),
        "int8 rotated, modulation int8 rotated": int8.with_kinds(modulation=int8.mlp),
    }
    # As in a run, whose latents are float32.
    for name, precision in precisions.items():
        yield Scheme(name, partial(stored, precision), dtype=torch.float32)
    both = ComputePrecision(torch.bfloat16, frozenset(LIMITS))
    yield Scheme(FLOAT8_BOTH, partial(stored, float8), both, torch.float32)
    yield Scheme(INT8_BOTH, partial(stored, int8), both, torch.float32)
    if obstacle := int8_obstacle(device, torch.bfloat16):
        print(f"not measured: {ATTENDING}: {obstacle}")
        return
    plain = PRECISIONS["bfloat16"]
    for name, precision, computing in (
        ("bfloat16", plain, BFLOAT16), (FLOAT8_BOTH, float8, both), (INT8_BOTH, int8, both)
    ):  # fmt: skip
        computing = replace(computing, attention=Attention(0))
        yield Scheme(f"{name}, {ATTENDING}", partial(stored, precision), computing, torch.float32)


def stored(precision: Precision, part: Part) -> nn.Module:
    """Our module, its weights stored as a loader does."""
    module = part.module(ours=True)
    store(module, lambda name: getattr(precision, kind_of_layer(name)), part.prefix)
    for name, layer in module.named_modules():
        if isinstance(layer, StoredLinear | StoredNorm):
            _fill(layer, name, part)
    return module


@torch.inference_mode()
def errors(
    draw: Draw,
    g: FluxGeometry,
    schemes: list[Scheme],
    tokens: int,
    device: torch.device,
    seed: int,
) -> tuple[Errors, Errors]:
    """Relative L2 errors of the image after the last block, and of the transformer's output."""
    generator = torch.Generator(device).manual_seed(seed)
    words = tokens // 4
    randn = partial(torch.randn, generator=generator, device=device)
    latents, pooled = randn(1, tokens - words, g.in_channels), randn(1, g.pooled_width)
    start = (latents, randn(1, words, g.text_width) * TEXT_STD, pooled)
    states = {s.name: tuple(x.bfloat16().to(s.dtype) for x in start) for s in schemes}
    places = torch.arange(tokens - words, device=device)
    ids = torch.zeros(1, tokens, 3, device=device)
    ids[0, words:, 1:] = torch.stack([places // COLUMNS, places % COLUMNS], dim=-1).float()
    rope = RoPEEmbedding(g.hidden, ROPE_THETA, ROPE_AXES)(ids)
    found: list[Errors] = []
    for part in parts(g):
        part.draw(draw, generator)
        for scheme in schemes:
            module = scheme.make(part)
            with scheme.computing.applied_to(module, device):
                states[scheme.name] = advance(module, states[scheme.name], rope)
        images = {name: image for name, (image, _, _) in states.items()}
        found.append({name: relative_error(x, images[EXACT]) for name, x in images.items()})
        rms = ", ".join(f"{x.square().mean().sqrt():.3f}" for x in states[EXACT])
        print(f"{part.prefix or 'ends'} rms of image, text, conditioning: {rms}", file=sys.stderr)
    return found[-2], found[-1]


def advance(module: Any, state: State, rope: Tensor) -> State:
    image, text, conditioning = state
    if isinstance(module, DoubleBlock | SingleBlock):
        active = F.silu(conditioning)[:, None]
        modulation = [layer(active) for layer in module.modulation_layers()]
        both = torch.cat([text, image], dim=1)
        module(
            [TokenSequence(both, text.shape[1], both.shape[1] - text.shape[1], rope)],
            [modulation],
            Chunking(),
        )
        text, image = both.split([text.shape[1], image.shape[1]], dim=1)
        return image, text, conditioning
    if isinstance(module, FluxSingleTransformerBlock):
        both, _ = module(torch.cat([text, image], dim=1), text, conditioning, rope)
        text, image = both.split([text.shape[1], image.shape[1]], dim=1)
        return image, text, conditioning
    return (*module(image, text, conditioning, rope), conditioning)[:3]


def _fill(layer: StoredLinear | StoredNorm, name: str, part: Part) -> None:
    weight, dtype = part.weights[f"{name}.weight"], layer.weight.dtype
    if isinstance(layer, StoredLinear):
        if layer.scale is not None:
            weight, scale = part.in_eight_bits(f"{name}.weight", dtype, layer.group)
            layer.scale = _fixed(scale)
        if layer.bias is not None:
            layer.bias = _fixed(part.weights[f"{name}.bias"].to(layer.bias.dtype))
    layer.weight = _fixed(weight.to(dtype))


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


if __name__ == "__main__":
    main()
