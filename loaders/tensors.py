"""From the tensors of files into the weights of a module."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .layouts import Layout
from .safetensors_file import ModelFileError, SafetensorsFile, TensorEntry

if TYPE_CHECKING:
    from torch import Tensor, nn

FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Source:
    """Where a tensor is read from."""

    file: SafetensorsFile
    name: str

    @property
    def entry(self) -> TensorEntry:
        return self.file.tensors[self.name]

    def read(self) -> "Tensor":
        return self.file.read(self.name)


Sources = Mapping[str, Source]


def sources_of(files: Iterable[SafetensorsFile], prefix: str = "") -> dict[str, Source]:
    """Every tensor of `files` whose name starts with `prefix`, by its name without the prefix."""
    return {
        name.removeprefix(prefix): Source(file, name)
        for file in files
        for name in file.tensors
        if name.startswith(prefix)
    }


def require_layout(path: Path, sources: Sources, layout: Layout) -> None:
    """Raise ModelFileError unless every tensor of `layout` is there, of its shape, in a float type.

    Tensors that the layout does not name are left alone.
    """
    missing = [name for name in layout if name not in sources]
    if missing:
        raise ModelFileError(
            f"{path.name} is incomplete: {len(missing)} of {len(layout)} tensors are missing, "
            f"{missing[0]} among them. Download it again, or choose another file."
        )
    for name, shape in layout.items():
        entry = sources[name].entry
        if entry.shape != shape:
            raise ModelFileError(
                f"{path.name} does not fit: {name} has the shape {list(entry.shape)} where "
                f"{list(shape)} follows from the others. Choose another file."
            )
        if entry.dtype not in FLOATING:
            raise ModelFileError(
                f"{path.name} stores {name} as {entry.dtype}, a quantisation that MajicFlux cannot "
                "read. Use the bf16, fp16 or plain float8 file."
            )


def fill(module: "nn.Module", sources: Sources) -> None:
    """Convert each source tensor into the parameter of the same name, one tensor at a time.

    Raises ModelFileError when a float8 conversion meets an infinity or a NaN.
    """
    import torch

    from ..engine.stored_linear import StoredLinear, quantize_rows

    with torch.no_grad():
        for prefix, child in module.named_modules():
            for name, parameter in child.named_parameters(recurse=False):
                if name == "scale" and isinstance(child, StoredLinear):
                    continue  # comes with the weight
                source = sources[f"{prefix}.{name}" if prefix else name]
                if name == "weight" and isinstance(child, StoredLinear) and child.scale is not None:
                    try:
                        quantize_rows(source.read(), child.weight, child.scale)
                    except ValueError as error:
                        raise ModelFileError(
                            f"{source.file.path.name}, tensor {source.name}: {error}. "
                            "The file is damaged; download it again."
                        ) from error
                else:
                    parameter.copy_(source.read().view(parameter.shape))
