"""The rooms of the pack in the order of their imports, and the files in them."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A room is a folder or a file. It imports from itself and from the lines above its own.
ORDER = [
    ["messages.py"],
    ["engine/errors.py"],
    [
        "engine/__init__.py",
        "engine/allocator.py",
        "engine/diffsynth_files.py",
        "engine/latents.py",
        "engine/sizes.py",
        "engine/torch_state.py",
    ],
    ["engine/kernels"],
    ["engine/quant", "engine/offload", "engine/sampling"],
    ["engine/flux"],
    ["engine/plan"],
    ["engine/run"],
    ["loaders", "host"],
    ["downloads", "translation"],
    ["lab"],
    ["nodes"],
    ["batch"],
    ["commands"],
    ["cli.py", "__init__.py"],
    ["__main__.py"],
    ["tools"],
]
LINE = {room: line for line, rooms in enumerate(ORDER) for room in rooms}
FOLDERS = [ROOT / room for room in LINE if not room.endswith(".py")]
FILES = [
    *(ROOT / room for room in LINE if room.endswith(".py")),
    *(path for folder in FOLDERS for path in sorted(folder.rglob("*.py"))),
]


def room_of(path: Path) -> str:
    """The name in ORDER of the room that a file of FILES is in."""
    name = path.relative_to(ROOT).as_posix()
    return next(room for room in LINE if name == room or name.startswith(f"{room}/"))


def imported_packages(path: Path) -> set[str]:
    """What a file imports from outside of the pack."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            packages.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
    return packages
