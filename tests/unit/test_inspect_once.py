"""A header is inspected once for as long as its file stays the same."""

import os
from pathlib import Path

import pytest
import torch

from majicflux.host import standalone
from majicflux.loaders import demo_models, safetensors_file
from majicflux.loaders.inspect_once import inspect_once
from majicflux.loaders.safetensors_file import ModelFileError, SafetensorsFile
from majicflux.nodes import DiTLoader


def test_the_validation_inspects_for_the_load(models: Path, monkeypatch) -> None:
    monkeypatch.setattr(standalone, "models_folder", models)
    name, read = Path(demo_models.DIT_FILE).name, []
    read_header = safetensors_file._read_header

    def counted(*arguments: object) -> object:
        read.append(arguments)
        return read_header(*arguments)

    monkeypatch.setattr(safetensors_file, "_read_header", counted)
    os.utime(models / demo_models.DIT_FILE)  # other tests have inspected it
    for _ in range(2):
        assert DiTLoader.validate_inputs(name) is True
    DiTLoader.execute(name, "bfloat16", keep_prepared=False)
    assert len(read) == 1


def test_another_header_of_the_same_size_and_time_is_another_file(saved) -> None:
    inspect = inspect_once(SafetensorsFile)
    path = saved({"one": torch.zeros(2)})
    first, state = inspect(path), path.stat()
    assert inspect(path) is first
    saved({"two": torch.zeros(2)})
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_size == state.st_size
    assert inspect(path).tensors.keys() == {"two"}


def test_errors_are_not_remembered(saved) -> None:
    inspect = inspect_once(SafetensorsFile)
    path = saved({"one": torch.zeros(2)})
    whole, state = path.read_bytes(), path.stat()
    path.write_bytes(whole[:-1])
    with pytest.raises(ModelFileError, match="is cut off"):
        inspect(path)
    path.write_bytes(whole)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert inspect(path).tensors.keys() == {"one"}


def test_what_changes_while_it_is_inspected_is_refused_and_forgotten(saved) -> None:
    path = saved({"one": torch.zeros(2)})
    others = [{"two": torch.zeros(2)}]

    @inspect_once
    def inspect(path: Path) -> SafetensorsFile:
        file = SafetensorsFile(path)
        while others:
            saved(others.pop())
        return file

    with pytest.raises(ModelFileError, match="was changed while it was being read"):
        inspect(path)
    assert inspect(path).tensors.keys() == {"two"}
