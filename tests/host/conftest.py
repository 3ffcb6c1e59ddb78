"""ComfyUI inside the test process: its node registry, executor and memory manager."""

import asyncio
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


class _Client:
    """What the executor needs of a server that nobody is connected to."""

    client_id = None
    last_node_id = None

    def __init__(self) -> None:
        self.sockets_metadata: dict[str, Any] = {}

    def send_sync(self, event: str, *_: object) -> None:
        pass


@dataclass
class Comfy:
    """The host's modules, and the pack as the host has loaded it."""

    execution: ModuleType
    manager: ModuleType
    base: Path

    def pack(self, name: str) -> ModuleType:
        """A module of the pack under the name that ComfyUI gave it."""
        return importlib.import_module(f"{str(ROOT).replace('.', '_x_')}.{name}")

    def executor(self, cache_type: str = "CLASSIC"):
        return self.execution.PromptExecutor(
            _Client(),
            cache_type=self.execution.CacheType[cache_type],
            cache_args={"lru": 0, "ram": 0, "ram_inactive": 0},
        )

    def run(self, executor, graph: dict[str, Any]) -> list[tuple[str, dict]]:
        """Validate and execute; returns the status messages."""
        valid = asyncio.run(self.execution.validate_prompt("id", graph, None))
        assert valid[0], valid
        executor.execute(graph, "id", {"client_id": "test"}, valid[2])
        return executor.status_messages


@pytest.fixture(scope="session")
def comfy(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Comfy:
    host = os.environ["COMFYUI_PATH"]
    base = tmp_path_factory.mktemp("base")
    (base / "models").symlink_to(models, target_is_directory=True)
    sys.path.insert(0, host)
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = str(base)
    import comfy.model_management
    import comfy.utils
    import execution

    import nodes

    def progress_hook(*_: object, **__: object) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    comfy.utils.set_progress_bar_global_hook(progress_hook)
    assert asyncio.run(nodes.load_custom_node(str(ROOT), set(), "custom_nodes"))
    return Comfy(execution, comfy.model_management, base)
