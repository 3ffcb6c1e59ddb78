"""The rules of the house: which folder may import which, and what an import may cost."""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from rooms import FILES, LINE, ROOT, imported_packages, room_of

COMFYUI = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "execution"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_files(path: Path) -> Iterator[Path]:
    """The pack's files that a file imports, anywhere in it and for its types too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        place = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        names = [place / alias.name for alias in node.names]
        for module in [place] if place.with_suffix(".py").is_file() else names:
            ways = module.with_suffix(".py"), module / "__init__.py", module.parent / "__init__.py"
            yield next(way for way in ways if way.is_file())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    own = room_of(path)
    for file in imported_files(path):
        room = room_of(file)
        assert room == own or LINE[room] < LINE[own], f"{own} may not import {name_of(file)}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    imports = {name_of(path): {*map(name_of, imported_files(path))} for path in FILES}
    TopologicalSorter(imports).prepare()  # its CycleError names the files


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_one_file_knows_comfyui(path: Path) -> None:
    packages = imported_packages(path)
    assert "majicflux" not in packages, "the pack's name in ComfyUI is another one"
    if path != ROOT / "host" / "comfyui.py":
        assert not packages & COMFYUI


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_says_what_it_is(path: Path) -> None:
    assert re.match(r'"""[\w`]', path.read_text(encoding="utf-8")), "in its first line"


def test_every_folder_is_a_room_and_a_package() -> None:
    found = {name_of(path.parent) for path in FILES if path.name == "__init__.py"} - {"."}
    there = {name_of(path.parent) for n in ("*", "*/*") for path in ROOT.glob(f"{n}/__init__.py")}
    assert found == there - {"benchmarks"}
    assert {name_of(path.parent) for path in FILES} == {*found, "."}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^packages = (\[.*?\])", project, re.DOTALL | re.MULTILINE)
    names = ["majicflux", *(f"majicflux.{name.replace('/', '.')}" for name in found)]
    assert sorted(ast.literal_eval(listed)) == sorted(names)


def test_both_doors_offer_the_same_names() -> None:
    def offered(name: str) -> list[str]:
        tree = ast.parse((ROOT / "host" / name).read_text(encoding="utf-8"))
        lists = [
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        return ast.literal_eval(lists[0])

    names = offered("standalone.py")
    assert offered("comfyui.py") == names
    used = {
        match
        for path in (ROOT / "nodes").glob("*.py")
        for match in re.findall(r"\bhost\.(\w+)", path.read_text(encoding="utf-8"))
    }
    assert used <= set(names)


def test_importing_the_pack_imports_nothing_heavy() -> None:
    code = (
        "import sys, majicflux; "
        "print(*{m.split('.')[0] for m in sys.modules} & "
        "{'torch', 'diffsynth', 'transformers', 'modelscope', 'numpy', 'PIL'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_torch_is_no_requirement() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.startswith("torch")]


def test_the_package_has_what_it_is_shipped_with() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"package-data\]\nmajicflux = (\[.*?\])", project, re.DOTALL)
    packaged = {path for pattern in ast.literal_eval(listed) for path in ROOT.glob(pattern)}
    there = {
        path
        for folder in ("workflows", "locales", "web", "lab", "loaders/little_world")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert packaged == there


def test_a_picture_waits_for_no_import_of_diffsynth(models: Path) -> None:
    """Of its files for Flux alone; its package brings ModelScope and PyTorch's compiler."""
    code = f"""
import sys
from pathlib import Path
from majicflux.host import standalone
from majicflux.nodes import DiTLoader, PipelineNode, Sample, TextEncodersNode, VAELoader
standalone.models_folder = Path({str(models)!r})
dit = DiTLoader.execute("majicflus_v134.safetensors", "float8_e4m3fn").args[0]
text = TextEncodersNode.execute("clip_l.safetensors", "t5xxl_fp16.safetensors", "bfloat16").args[0]
vae = VAELoader.execute("ae.safetensors").args[0]
pipeline = PipelineNode.execute(dit, text, vae, 0.0, "auto").args[0]
Sample.execute(pipeline, "a cat", 0, 1, 3.5, 32, 32, 1)
from majicflux.engine.flux.blocks import DoubleBlock
print(*DoubleBlock.__mro__[1].forward.__code__.co_filename.rpartition("diffsynth")[1:])
print(*{{"diffsynth", "modelscope", "torch._dynamo", "torch._inductor"}} & {{*sys.modules}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    file, loaded = done.stdout.splitlines()[-2:]
    assert file == "diffsynth /models/flux_dit.py"
    assert loaded == ""


def test_nothing_touches_the_network_without_being_told_to(models: Path) -> None:
    """The whole chain of nodes with connections and name look-ups cut, and no offline switch."""
    code = f"""
import os, socket, sys
def refuse(*_, **__):
    os._exit(99)
socket.socket.connect = socket.getaddrinfo = refuse
from pathlib import Path
from majicflux.host import standalone
from majicflux.nodes import DiTLoader, PipelineNode, Sample, TextEncodersNode, VAELoader
standalone.models_folder = Path({str(models)!r})
dit = DiTLoader.execute("majicflus_v134.safetensors", "float8_e4m3fn").args[0]
text = TextEncodersNode.execute("clip_l.safetensors", "t5xxl_fp16.safetensors", "bfloat16").args[0]
vae = VAELoader.execute("ae.safetensors").args[0]
pipeline = PipelineNode.execute(dit, text, vae, 0.0, "auto").args[0]
Sample.execute(pipeline, "a cat", 0, 1, 3.5, 32, 32, 1)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_what_a_benchmark_imports_from_the_pack_is_there(path: Path) -> None:
    """They run on a card only, where nobody looks for weeks."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("majicflux"):
            module = importlib.import_module(node.module)
            assert [a.name for a in node.names if not hasattr(module, a.name)] == []
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("majicflux"):
                    importlib.import_module(alias.name)
