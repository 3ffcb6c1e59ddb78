"""What `majicflux inspect` says about a file, against float64 over every row of it."""

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from PIL import Image, ImageColor

from file_layouts import FLOAT8, Tensors, scaled, sparse_file, to_diffusers
from majicflux import cli
from majicflux.benchmarks import random_models
from majicflux.engine.flux.geometry import FluxGeometry, kind_of_layer
from majicflux.engine.flux.transformer import build_flux_dit
from majicflux.engine.quant.formats import FLOAT32, PRECISIONS, STORAGES, uniform
from majicflux.engine.quant.linear import StoredLinear
from majicflux.lab.precision import KINDS, Cost, PrecisionReport, measure
from majicflux.lab.precision_chart import COLOURS, SIZE, ChartError, write_chart
from majicflux.lab.precision_table import table
from majicflux.loaders import demo_models
from majicflux.loaders.flux_dit import inspect_flux_dit, load_flux_dit
from majicflux.loaders.layouts import flux_dit_layout
from majicflux.loaders.safetensors_file import ModelFileError

ALL = 10**6  # more rows than any matrix of the demo has
PREFIX = "model.diffusion_model."
SCALED, ROTATED, PLAIN, UNSCALED = STORAGES


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Of PyTorch's, which spin on a busy machine: what is compared here is small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inspected(path: Path, rows: int = ALL) -> PrecisionReport:
    return measure(*inspect_flux_dit(path), rows)


def hadamard(size: int) -> torch.Tensor:
    """ComfyUI's rotation in float64, by its definition: powers of one 4 x 4 matrix."""
    four = torch.ones(4, 4, dtype=torch.float64) - 2 * torch.eye(4, dtype=torch.float64).flip(0)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four / 2)
    return matrix


def rotated(values: torch.Tensor, group: int) -> torch.Tensor:
    return (values.reshape(-1, group) @ hadamard(group)).reshape(values.shape)


def to_int8(tensors: Tensors, group: int) -> Tensors:
    """ComfyUI's int8 of the matrices, whose columns are rotated by `group` (0: not)."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            found[name] = tensor
            continue
        values = rotated(tensor.double(), group) if group else tensor.double()
        scale = values.abs().amax(dim=1, keepdim=True) / 127
        marker = {"format": "int8_tensorwise", "convrot": bool(group), "convrot_groupsize": group}
        found[name] = (values / scale).round().to(torch.int8)
        found[name + "_scale"] = scale.float()
        found[name.removesuffix("weight") + "comfy_quant"] = torch.tensor(
            list(json.dumps(marker).encode()), dtype=torch.uint8
        )
    return found


def stored_and_back(weight: torch.Tensor, storage: str) -> torch.Tensor:
    """Each format in full precision, written down from its definition."""
    values = weight.double()
    if storage in (PLAIN, UNSCALED):
        return weight.to(torch.bfloat16 if storage == PLAIN else FLOAT8).double()
    group = next(g for g in (256, 64, 16, 4) if values.shape[1] % g == 0)
    if storage == ROTATED:
        values = rotated(values, group)
        scale = values.abs().amax(dim=1, keepdim=True) / 127
        return rotated((values / scale).round() * scale, group)
    scale = values.abs().amax(dim=1, keepdim=True) / 448
    return (values / scale).to(FLOAT8).double() * scale


def kind_of(name: str) -> str:
    if not re.match(r"(double|single)_blocks\.", name):
        return "rest"
    if re.search(r"(_mod|\.modulation)\.lin\.", name):
        return "modulation"
    return "attention" if "_attn." in name else "mlp"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_errors_are_those_of_float64_over_all_rows(plain, saved, dtype: torch.dtype) -> None:
    noise = {n: torch.rand_like(t.float()) * 1e-4 for n, t in plain.items()}
    tensors = {name: (tensor.float() + noise[name]).to(dtype) for name, tensor in plain.items()}
    found = inspected(saved(tensors))
    for kind in KINDS:
        weights = [t for n, t in tensors.items() if t.ndim == 2 and kind_of(n) == kind]
        values = sum(w.double().square().sum().item() for w in weights)
        for storage in STORAGES:
            error = sum(
                (stored_and_back(w, storage) - w.double()).square().sum().item() for w in weights
            )
            expected = math.sqrt(error / values)
            assert found.kinds[kind][storage].error == pytest.approx(expected, rel=1e-5), kind
            assert (expected == 0) == (storage == PLAIN and dtype == torch.bfloat16)


def with_scales(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Scales beside values that have no need of them, as a file is free to have."""
    scales = {f"{n}_scale": torch.tensor(0.3) for n, t in tensors.items() if t.ndim == 2}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | scales


FORMS: dict[str, Callable[[Tensors], Tensors]] = {
    "bfloat16": lambda tensors: tensors,
    "float16": lambda tensors: {n: t.half() for n, t in tensors.items()},
    "float8": lambda tensors: {n: t.to(FLOAT8) for n, t in tensors.items()},
    "float8_e5m2": lambda tensors: {n: t.to(torch.float8_e5m2) for n, t in tensors.items()},
    "scaled float8": lambda tensors: scaled(tensors, "new", per_row=False),
    "scaled float8 by row": lambda tensors: scaled(to_diffusers(tensors), "old", per_row=True),
    "float32 with scales": lambda tensors: with_scales(tensors, torch.float32),
    "float64 with scales": lambda tensors: with_scales(tensors, torch.float64),
    "int8": lambda tensors: to_int8(tensors, 0),
    "int8 rotated by 64": lambda tensors: to_int8(tensors, 64),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_file_is_what_loading_makes_of_it(plain, saved, form: str) -> None:
    path = saved(FORMS[form](plain))
    exact = dequantized(load_flux_dit(path, uniform(FLOAT32))[0].module)
    size = sum(w.square().sum().item() for w in exact.values())
    found = inspected(path)
    for choice, precision in PRECISIONS.items():
        module = load_flux_dit(path, precision)[0].module
        assert found.choices[choice].bytes == sum(p.nbytes for p in module.parameters())
        stored = dequantized(module)
        error = sum((stored[n] - w).square().sum().item() for n, w in exact.items())
        expected = math.sqrt(error / size)
        assert found.choices[choice].error == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found.suggested == (SCALED if "float8" in form else ROTATED)


def dequantized(module: torch.nn.Module) -> Tensors:
    """The matrices of a loaded transformer in float64."""
    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, StoredLinear):
            tensors = dict(layer.named_parameters())
            values = tensors["weight"].data.double()
            if "scale" in tensors:
                values *= tensors["scale"].data.double()[:, None]
            found[name] = rotated(values, layer.group) if layer.group else values
    return found


@pytest.mark.parametrize("storage", STORAGES)
def test_the_memory_of_each_kind_is_that_of_the_built_transformer(models, storage: str) -> None:
    found = inspected(models / demo_models.DIT_FILE, rows=1)
    module = build_flux_dit(random_models.DIT, uniform(STORAGES[storage])).module
    built = Counter()
    for name, parameter in module.named_parameters():
        built[kind_of_layer(name)] += parameter.nbytes
    assert {kind: costs[storage].bytes for kind, costs in found.kinds.items()} == built


@pytest.mark.parametrize("form", FORMS)
def test_what_the_file_holds_in_8_bits_loses_nothing_in_them(plain, saved, form: str) -> None:
    found = inspected(saved(FORMS[form](plain)), rows=3)
    for costs in found.kinds.values():
        errors = {storage: cost.error for storage, cost in costs.items()}
        if form.startswith("int8"):
            assert errors[ROTATED] == 0 < errors[PLAIN] < errors[SCALED] < errors[UNSCALED]
        elif form == "float8":
            assert errors[SCALED] == errors[UNSCALED] == errors[PLAIN] == 0 < errors[ROTATED]
        elif form.startswith("scaled"):
            assert errors[SCALED] == 0 < errors[PLAIN] < errors[ROTATED] < errors[UNSCALED]


def test_a_scale_saves_small_weights_and_int8_does_better(plain, saved) -> None:
    small = {name: tensor * 0.02 for name, tensor in plain.items()}
    for costs in inspected(saved(small)).kinds.values():
        errors = {storage: cost.error for storage, cost in costs.items()}
        assert errors[UNSCALED] > 10 * errors[SCALED]
        assert errors[SCALED] > 3 * errors[ROTATED] > 0
        assert errors[SCALED] < 0.03


def test_some_rows_tell_nearly_as_much_as_all(models: Path) -> None:
    path = models / demo_models.DIT_FILE
    some, everything = inspected(path, rows=16), inspected(path)
    assert some.rows == 16
    assert some.choices != everything.choices
    for kind, costs in everything.kinds.items():
        for storage, cost in costs.items():
            assert some.kinds[kind][storage].error == pytest.approx(cost.error, rel=0.05)
            assert some.kinds[kind][storage].bytes == cost.bytes


def test_each_row_stands_for_its_share_of_the_matrix(plain, saved) -> None:
    """A kind's matrices have 256 to 1792 rows; here the short ones are exact in every format."""
    halves = {n: t if "linear1" in n else torch.full_like(t, 0.5) for n, t in plain.items()}
    path = saved(halves)
    some, everything = (inspected(path, rows).kinds["mlp"][SCALED].error for rows in (16, ALL))
    assert some == pytest.approx(everything, rel=0.05)


def test_the_rows_are_spread_over_the_whole_matrix(plain, saved) -> None:
    name = "single_blocks.0.linear1.weight"
    for rows in (slice(0, 300), slice(-300, None)):
        tensors = {n: torch.zeros_like(t) for n, t in plain.items()}
        tensors[name][rows] = plain[name][rows]
        assert inspected(saved(tensors), rows=8).kinds["mlp"][SCALED].error > 0.02


@pytest.mark.parametrize("rows", [5, ALL])
def test_diffusers_names_and_shards_give_the_same_figures(plain, saved, rows: int) -> None:
    expected = inspected(saved(plain), rows)
    tensors = list(to_diffusers(plain).items())
    single = saved(dict(tensors), "diffusers.safetensors")
    shards = [
        saved(dict(part), f"transformer/model-{index:05d}-of-00002.safetensors")
        for index, part in enumerate((tensors[:70], tensors[70:]), start=1)
    ]
    for path in (single, shards[0].parent):
        found = inspected(path, rows)
        assert (found.parameters, found.contents) == (expected.parameters, expected.contents)
        for kind, costs in expected.kinds.items():
            for storage, cost in costs.items():
                same = found.kinds[kind][storage]
                assert same.bytes == cost.bytes
                assert same.error == pytest.approx(cost.error, rel=1e-12)


def test_only_the_rows_of_a_big_file_are_read(tmp_path: Path) -> None:
    layout = flux_dit_layout(FluxGeometry())
    path = sparse_file(tmp_path / "dit.safetensors", layout)
    inspected(path, rows=1)  # imports what there is to import
    counter = Path("/proc/self/io")
    before, start = (counter.read_text() if counter.exists() else ""), time.perf_counter()
    reported: list[tuple[int, int]] = []
    found = measure(*inspect_flux_dit(path), 4, lambda *done: reported.append(done))
    assert time.perf_counter() - start < 30
    assert reported[-1][0] == reported[-1][1] == sum(4 * 2 * s[1] for s in layout.values() if s[1:])
    if before:
        first, last = (int(text.split()[1]) for text in (before, counter.read_text()))  # rchar
        assert last - first < path.stat().st_size / 1000
    assert {cost.error for costs in found.kinds.values() for cost in costs.values()} == {0}
    assert found.parameters == 11_901_408_320
    assert 15.2e9 < found.choices[SCALED].bytes < 15.3e9


def test_measuring_leaves_pytorch_its_threads(models: Path) -> None:
    torch.set_num_threads(2)
    inspected(models / demo_models.DIT_FILE, rows=1)
    assert torch.get_num_threads() == 2


def test_a_nan_is_refused_by_name(plain, saved) -> None:
    plain["double_blocks.1.img_mlp.0.weight"][7, 3] = float("nan")
    with pytest.raises(ModelFileError, match=r"img_mlp\.0\.weight: .* NaN.*download it again"):
        inspected(saved(plain))


@pytest.mark.parametrize("value", [480.0, 1000.0])
def test_values_beyond_a_format_are_told_and_drawn(
    plain, saved, tmp_path: Path, value: float
) -> None:
    plain["double_blocks.1.img_mlp.0.weight"][7] = value
    found = inspected(saved(plain))
    assert found.kinds["mlp"][UNSCALED].error == math.inf
    assert "too large" in table("model.safetensors", found)
    write_chart(tmp_path / "chart.png", "model.safetensors", found)


def test_the_table_reads_as_one(plain, saved) -> None:
    plain["img_in.bias"] = plain["img_in.bias"].float()  # too little to be told
    found = inspected(saved(to_int8(plain, 64)))
    lines = table("model.safetensors", found).splitlines()
    assert lines[0] == (
        "model.safetensors: Flux.1 transformer, 2 + 4 blocks of width 256, 0.01 B parameters, "
        "int8 rotated 99.7%, bfloat16 0.3%"
    )
    start = next(n for n, line in enumerate(lines) if line.startswith("Error of the stored"))
    rows = [line[:24].strip() for line in lines[start + 2 : start + 6]]
    assert rows == list(STORAGES)
    heads = [m.end() for m in re.finditer(r"\S+", lines[start + 1])]
    for line in lines[start + 2 : start + 6]:
        ends = [m.end() + 24 for m in re.finditer(r"(?:< )?[\d.]+ %", line[24:])]
        assert ends == heads, "figures stand under the end of their head"
    assert "0 %" in lines[start + 3]
    assert "Matrices that the file holds in int8 stay int8 under float8_e4m3fn too." in lines
    best = found.choices[ROTATED]
    assert lines[-1].startswith(
        f"Suggested weight_precision: int8 rotated, the 8-bit choice with the smallest error: "
        f"{100 * best.error:.2f} % in {best.bytes / 1e9:.3f} GB, "
    )
    assert lines[-1].count(". ") == 0


def test_the_chart_shows_every_storage(models: Path, tmp_path: Path) -> None:
    found = inspected(models / demo_models.DIT_FILE, rows=4)
    path = tmp_path / "chart.png"
    write_chart(path, "x" * 300 + ".safetensors", found)
    assert [p.name for p in tmp_path.iterdir()] == ["chart.png"]
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("PNG", SIZE)
        assert SIZE[0] == 1200
        counts = {colour: n for n, colour in picture.getcolors(2**20)}
        margin = picture.crop((SIZE[0] - 20, 0, *SIZE))
    assert margin.getcolors() == [(20 * SIZE[1], (255, 255, 255))], "nothing is cut off"
    area = {name: counts[ImageColor.getrgb(colour)] for name, colour in COLOURS.items()}
    assert area[UNSCALED] > area[SCALED] > 2 * area[ROTATED] > area[PLAIN] > 0


def test_a_chinese_name_leaves_the_chart_readable(models: Path, tmp_path: Path) -> None:
    found = inspected(models / demo_models.DIT_FILE, rows=1)
    write_chart(tmp_path / "a.png", "麦橘超然.safetensors", found)
    write_chart(tmp_path / "b.png", "Flux.1 transformer", found)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_chart_of_nothing_but_zeros(tmp_path: Path) -> None:
    costs = dict.fromkeys(STORAGES, Cost(0.0, 1))
    kinds = dict.fromkeys(KINDS, costs)
    nothing = PrecisionReport(FluxGeometry(), 1, {PLAIN: 1.0}, kinds, costs, 1)
    write_chart(tmp_path / "chart.png", "zeros", nothing)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()])
def test_a_chart_that_fails_leaves_nothing_behind(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    found = inspected(models / demo_models.DIT_FILE, rows=1)
    path = tmp_path / "chart.png"
    path.write_bytes(b"the last one")

    def half(_image: Image.Image, to: BinaryIO, *_: object) -> None:
        to.write(b"half")
        raise error

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(ChartError if isinstance(error, OSError) else MemoryError) as caught:
        write_chart(path, "dit", found)
    assert path.read_bytes() == b"the last one"
    assert [p.name for p in tmp_path.iterdir()] == ["chart.png"]
    if isinstance(error, OSError):
        assert str(caught.value) == f"The chart {path} cannot be written: No space left on device."


def test_a_chart_is_drawn_into_no_file_that_was_there(models: Path, tmp_path: Path) -> None:
    """As one that another process of the same number draws into, or a planted link."""
    found = inspected(models / demo_models.DIT_FILE, rows=1)
    mine = tmp_path / f"chart.png.{os.getpid()}.part"
    mine.write_text("mine")
    write_chart(tmp_path / "chart.png", "dit", found)
    assert mine.read_text() == "mine"


def test_the_command_prints_the_table_and_the_path_of_the_chart(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    path = models / demo_models.DIT_FILE
    assert cli.main(["inspect", str(path), "--rows", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed == table(path.name, inspected(path, 2)) + "\nmajicflus_v134-precision.png\n"
    assert [p.name for p in tmp_path.iterdir()] == ["majicflus_v134-precision.png"]
    assert cli.main(["inspect", str(path), "--rows", "2", "--chart", "here.PNG"]) == 0
    assert capsys.readouterr().out.endswith("\nhere.PNG\n")
    assert Path("here.PNG").read_bytes() == Path("majicflus_v134-precision.png").read_bytes()


def test_a_folder_is_told_by_its_own_name(
    plain, saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    path = saved(to_diffusers(plain), "FLUX.1-dev/model-00001-of-00001.safetensors")
    monkeypatch.chdir(path.parent)
    assert cli.main(["inspect", ".", "--rows", "1"]) == 0
    assert capsys.readouterr().out.startswith("FLUX.1-dev: Flux.1 transformer")
    assert Path("FLUX.1-dev-precision.png").is_file()


@pytest.mark.parametrize(
    ("file", "options", "said"),
    [
        (demo_models.T5_FILE, [], "is a T5 text encoder, not a Flux.1 transformer."),
        ("gone.safetensors", [], "cannot be opened: No such file"),
        (demo_models.DIT_FILE, ["--chart", "chart.safetensors"], "a name that ends in .png."),
        (demo_models.DIT_FILE, ["--chart", "gone/chart.png"], "There is no folder gone"),
    ],
)
def test_mistakes_end_in_one_line(
    models: Path, tmp_path: Path, monkeypatch, capsys, file: str, options: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", str(models / file), *options]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rows", ["0", "-3", "many"])
def test_rows_must_be_a_number_of_rows(models: Path, rows: str, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(models / demo_models.DIT_FILE), "--rows", rows])
    assert "--rows: give a whole number, 1 to 1000000" in capsys.readouterr().err
