"""Small models in the real layouts, components without a host, batches, a ComfyUI process."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import Save, small_graph
from picture_models import write_picture_models
from safetensors.torch import load_file, save_file
from thin_weights import narrow_vae
from torch import _int_mm  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import functional as F

from comfyui_server import Server
from file_layouts import Tensors
from majicflux.benchmarks import random_models
from majicflux.engine.flux.text_encoders import TextEncoders
from majicflux.engine.flux.transformer import DiT
from majicflux.engine.flux.vae import VAE
from majicflux.engine.kernels import matmul
from majicflux.engine.offload.offloaded_module import OffloadedModule
from majicflux.engine.quant.compute import ComputePrecision, choose_compute
from majicflux.engine.quant.formats import PRECISIONS, Precision
from majicflux.engine.quant.linear import StoredLinear
from majicflux.engine.run.pipeline import Pipeline
from majicflux.loaders import demo_models
from majicflux.loaders.flux_dit import load_flux_dit
from majicflux.loaders.text_encoders import inspect_clip, inspect_t5, load_text_encoders
from majicflux.loaders.tokenizers import CLIP_TOKENIZER, T5_TOKENIZER, load_tokenizer
from majicflux.loaders.vae import load_vae

CPU = torch.device("cpu")
PRODUCTS = {(m, n): getattr(m, n) for m, n in ((F, "conv2d"), (F, "linear"), (torch, "addmm"))}
os.environ["LC_ALL"] = "C.UTF-8"  # the messages are in English, whatever the machine's language


class RecordingPatcher:
    """A memory manager that grants everything it is asked for, and remembers what that was."""

    def __init__(self, weights: OffloadedModule, device: torch.device = CPU):
        self.weights = weights
        self.device = device
        self.loads: list[tuple[int, int | None]] = []

    def load(
        self,
        working_bytes: int,
        weight_cap: int | None,
        *beside: "tuple[RecordingPatcher, int | None]",
    ) -> None:
        self.loads.append((working_bytes, weight_cap))
        budget = float("inf") if weight_cap is None else weight_cap
        self.weights.keep_resident(self.device, budget)
        for other, cap in beside:
            other.load(working_bytes, cap)

    def available(self) -> int | None:
        return None

    def pin(self) -> None: ...


def build_pipeline(
    models: Path,
    precision: Precision = PRECISIONS["bfloat16"],
    dtype: torch.dtype = torch.bfloat16,
    mode: str = "",
    device: torch.device = CPU,
    budget_bytes: int | None = None,
) -> Pipeline:
    """The random models as a pipeline, every component on `device`."""
    clip_path, t5_path = models / demo_models.CLIP_FILE, models / demo_models.T5_FILE
    dit_weights, geometry = load_flux_dit(models / demo_models.DIT_FILE, precision)
    text_weights = load_text_encoders(clip_path, t5_path, dtype)
    vae_weights = load_vae(models / demo_models.VAE_FILE, dtype)
    clip, t5 = inspect_clip(clip_path)[0], inspect_t5(t5_path)[0]
    return Pipeline(
        DiT(dit_weights, RecordingPatcher(dit_weights, device), geometry, precision),
        TextEncoders(
            text_weights,
            RecordingPatcher(text_weights, device),
            load_tokenizer(CLIP_TOKENIZER, clip_path, clip.vocabulary, None),
            load_tokenizer(T5_TOKENIZER, t5_path, t5.vocabulary, None),
        ),
        VAE(vae_weights, RecordingPatcher(vae_weights, device), dtype),
        budget_bytes,
        choose_compute(dit_weights.module, device, mode, dtype)
        if mode
        else ComputePrecision(dtype),
    )


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small random models, in ComfyUI's subfolders."""
    folder = tmp_path_factory.mktemp("models")
    random_models.write_random_models(folder)
    return folder


@pytest.fixture
def plain(models: Path) -> Tensors:
    """Its transformer under the names of Black Forest Labs."""
    tensors = load_file(models / demo_models.DIT_FILE)
    return {name.removeprefix("model.diffusion_model."): tensor for name, tensor in tensors.items()}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes tensors to a file below `tmp_path`."""

    def save(tensors: Tensors, name: str = "model.safetensors") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        save_file({n: t.contiguous() for n, t in tensors.items()}, path)
        return path

    return save


@pytest.fixture
def graph(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the graph of a batch, whose models are found."""
    monkeypatch.setattr("majicflux.host.standalone.models_folder", models)
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(small_graph()), encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Save:
    """A function that writes a file of rows."""

    def save(text: str, name: str = "rows.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode("utf-8-sig" if name.endswith("csv") else "utf-8"))
        return path

    return save


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small products, whose threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def bfloat16_products() -> Iterator[None]:
    """Those on a processor without units for them are made in float32: they take up to six times
    as long otherwise, and convolutions minutes."""

    def in_float32(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*given: Any, out: torch.Tensor | None = None, **named: Any) -> torch.Tensor:
            tensors = [x for x in given if isinstance(x, torch.Tensor)]
            if any(x.dtype != torch.bfloat16 or x.device != CPU for x in tensors):
                return make(*given, **named) if out is None else make(*given, out=out, **named)
            wide = make(*(x.float() if isinstance(x, torch.Tensor) else x for x in given), **named)
            return wide.to(torch.bfloat16) if out is None else out.copy_(wide)

        return made

    with pytest.MonkeyPatch.context() as patch:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            for module, name in PRODUCTS:
                patch.setattr(module, name, in_float32(PRODUCTS[module, name]))
        yield


def int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """PyTorch's own takes ten times as long on a processor without units for it. Whole numbers of
    these sizes are exact in float64."""
    on_cpu = a.device == b.device == CPU
    return (a.double() @ b.double()).to(torch.int32) if on_cpu else _int_mm(a, b)


@pytest.fixture(scope="session", autouse=True)
def int8_products() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "_int_mm", int_mm)
        yield


@pytest.fixture
def products_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """For measurements of memory, which the copies in float32 take too."""
    for (module, name), product in PRODUCTS.items():
        monkeypatch.setattr(module, name, product)
    monkeypatch.setattr(matmul, "_int_mm", _int_mm)


@pytest.fixture
def make_pipeline(models: Path):
    def make(**options: object) -> Pipeline:
        return build_pipeline(models, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines are made with a VAE of few channels. Loading and computing a full one takes most of
    the time of tests where its width shows nothing."""
    monkeypatch.setitem(globals(), "load_vae", lambda _, dtype: narrow_vae(dtype))


@pytest.fixture(scope="session")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running ComfyUI with the pack and the random models."""
    comfyui = Path(os.environ["COMFYUI_PATH"])
    server = Server(comfyui, tmp_path_factory.mktemp("comfyui"), models)
    write_picture_models(server.base / "models")
    yield server
    server.stop()


@pytest.fixture
def one_step_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply the modulation of one step after the other, as DiffSynth does.

    On a CPU a product of one row is rounded otherwise than the same row among others, by
    PyTorch 2.15 at least.
    """
    forward = StoredLinear.forward

    def by_steps(layer: StoredLinear, x: torch.Tensor, *rest: object, **named: object):
        if not isinstance(x, torch.Tensor) or x.dim() < 3 or x.shape[1] > 1:
            return forward(layer, x, *rest, **named)
        return torch.cat([forward(layer, step, *rest, **named) for step in x.split(1)])

    monkeypatch.setattr(StoredLinear, "forward", by_steps)
