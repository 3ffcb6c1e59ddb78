"""ComfyUI, in whose process these tests run: its node registry, executor and memory manager.

Nothing of it is imported here with settings of our own: the server was started by its main.py.
"""

import asyncio
import gc
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import pytest
import torch

ROOT = Path(__file__).parents[3]
API = ROOT / "workflows" / "api" / "text_to_image.json"
ACCELERATOR = torch.device("cpu", 0)  # another device than `cpu` to PyTorch's comparisons
CPU = torch.device("cpu")
MB = 2**20


@dataclass
class Comfy:
    """The host's modules, and the pack as the host has loaded it."""

    execution: ModuleType
    manager: ModuleType
    base: Path

    def pack(self, name: str) -> ModuleType:
        """A module of the pack under the name that ComfyUI gave it."""
        loaded = sys.modules["nodes"].NODE_CLASS_MAPPINGS["MajicFluxSample"].__module__
        return importlib.import_module(f"{loaded.removesuffix('.nodes.sample')}.{name}")

    def executor(self, cache_type: str = "CLASSIC"):
        return self.execution.PromptExecutor(
            sys.modules["server"].PromptServer.instance,
            cache_type=self.execution.CacheType[cache_type],
            cache_args={"lru": 0, "ram": 0, "ram_inactive": 0},
        )

    def run(
        self, executor, graph: dict[str, Any], extra: dict[str, Any] | None = None
    ) -> list[tuple[str, dict]]:
        """Validate and execute; returns the status messages."""
        valid = asyncio.run(self.execution.validate_prompt("id", graph, None))
        assert valid[0], valid
        executor.execute(graph, "id", {"client_id": "test", **(extra or {})}, valid[2])
        return executor.status_messages

    def outputs(self, executor, graph: dict[str, Any]) -> dict[str, Any]:
        """What each node's first output holds after a run of `graph`, by the node's id."""
        cache = executor.caches.outputs
        entries = {node: cache.get_local(node) for node in graph}
        return {n: e.outputs[0][0] for n, e in entries.items() if e is not None and e.outputs}


@pytest.fixture(scope="session")
def comfy() -> Iterator[Comfy]:
    # At these sizes threads cost more than they bring, and far more on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base = Path(sys.modules["folder_paths"].base_path)
    yield Comfy(sys.modules["execution"], sys.modules["comfy.model_management"], base)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def models(comfy: Comfy) -> Path:
    """The server's own folder of the random models."""
    return comfy.base / "models"


@pytest.fixture
def small_graph() -> dict:
    """The shipped graph with a picture that is painted in a second."""
    graph = json.loads(API.read_text(encoding="utf-8"))
    graph["5"]["inputs"].update(width=64, height=64, steps=2)
    return graph


@dataclass
class Card:
    """A simulated card, which holds what models say they hold."""

    total: int
    models: WeakSet[Any] = field(default_factory=WeakSet)

    @property
    def free(self) -> int:
        return self.total - sum(model.loaded_size() for model in self.models)


@pytest.fixture
def card() -> Card:
    return Card(3000 * MB)


@pytest.fixture
def manager(comfy, card: Card, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The real manager on the simulated card."""
    mm = comfy.manager
    mm.unload_all_models()
    monkeypatch.setattr(mm, "current_loaded_models", [])
    make = mm.LoadedModel.__init__

    def noticed(self: Any, model: Any) -> None:
        card.models.add(model)
        make(self, model)

    def free(device=None, torch_free_too=False):
        return (card.free, 0) if torch_free_too else card.free

    monkeypatch.setattr(mm.LoadedModel, "__init__", noticed)
    monkeypatch.setattr(mm, "get_free_memory", free)
    monkeypatch.setattr(mm, "is_device_cpu", lambda device: device == CPU)
    monkeypatch.setattr(mm, "get_all_torch_devices", lambda *_: [ACCELERATOR])
    monkeypatch.setattr(mm, "vram_state", mm.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(mm, "minimum_inference_memory", mm.extra_reserved_memory)
    monkeypatch.setattr(mm, "EXTRA_RESERVED_VRAM", 100 * MB)
    return mm


@pytest.fixture
def on_the_card(comfy, manager, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """The nodes compute on the simulated card; a function that gives the components loaded."""
    host = comfy.pack("host.comfyui")
    for place in ("compute_device", "text_encoder_device", "vae_device"):
        monkeypatch.setattr(host, place, lambda: ACCELERATOR)
    monkeypatch.setattr(comfy.pack("nodes.model_files"), "_in_use", WeakValueDictionary())
    gc.collect()
    return lambda: [entry.model for entry in manager.current_loaded_models]
