"""The few words of ComfyUI's V3 node API that this pack speaks, for running without ComfyUI."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Socket:
    """An input or output as a node declares it; `options` are the keywords of ComfyUI's API."""

    io_type: str
    id: str
    options: dict[str, Any]

    @property
    def optional(self) -> bool:
        return self.options.get("optional", False)

    def as_dict(self) -> dict[str, Any]:
        return self.options


def _io_type(name: str) -> SimpleNamespace:
    def make(id: str | None = None, **options: Any) -> Socket:
        return Socket(name, id or name, options)

    return SimpleNamespace(io_type=name, Input=make, Output=make)


@dataclass
class Schema:
    node_id: str
    display_name: str
    category: str
    inputs: list[Socket] = field(default_factory=list)
    outputs: list[Socket] = field(default_factory=list)
    description: str = ""
    search_aliases: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    is_output_node: bool = False


class ComfyNode:
    """Base class of nodes: `define_schema` and `execute`, both class methods."""

    # There is no canvas to have a node on; `extra_pnginfo` is what a saved picture will carry.
    hidden = SimpleNamespace(unique_id=None, extra_pnginfo=None, prompt=None)

    @classmethod
    def define_schema(cls) -> Schema:
        raise TypeError(f"{cls.__name__} defines no schema")

    @classmethod
    def execute(cls, *args: Any, **inputs: Any) -> "NodeOutput":
        raise TypeError(f"{cls.__name__} defines no execute")


class NodeOutput:
    def __init__(self, *values: Any, ui: Any = None):
        self.args = values
        self.ui = ui


class ComfyExtension:
    async def get_node_list(self) -> list[type[ComfyNode]]:
        return []


io = SimpleNamespace(
    ComfyNode=ComfyNode,
    NodeOutput=NodeOutput,
    Schema=Schema,
    Custom=_io_type,
    Boolean=_io_type("BOOLEAN"),
    Combo=_io_type("COMBO"),
    Conditioning=_io_type("CONDITIONING"),
    Float=_io_type("FLOAT"),
    Hidden=SimpleNamespace(unique_id="UNIQUE_ID", extra_pnginfo="EXTRA_PNGINFO", prompt="PROMPT"),
    Image=_io_type("IMAGE"),
    Int=_io_type("INT"),
    Latent=_io_type("LATENT"),
    Mask=_io_type("MASK"),
    Sigmas=_io_type("SIGMAS"),
    String=_io_type("STRING"),
)
