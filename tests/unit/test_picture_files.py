"""Pictures as a graph saves and loads them without ComfyUI."""

import os
import re
import struct
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import nested, node_classes
from PIL import Image

from majicflux.host.graph import run_graph
from majicflux.host.image_nodes import image_nodes


def test_saved_pictures_are_numbered_and_load_again(tmp_path: Path) -> None:
    nodes = image_nodes(tmp_path, tmp_path, {"prompt": {"1": "猫"}})
    picture = torch.rand(2, 16, 24, 3)
    first = nodes["SaveImage"].execute(images=picture, filename_prefix="sub/cat").ui
    second = nodes["SaveImage"].execute(images=picture[:1], filename_prefix="sub/cat").ui
    assert [p.relative_to(tmp_path).as_posix() for p in first + second] == [
        f"sub/cat_{number:05d}_.png" for number in (1, 2, 3)
    ]
    image, mask = nodes["LoadImage"].execute(image="sub/cat_00001_.png").args
    assert (image[0] - picture[0]).abs().max() <= 1 / 255
    assert not mask.any()


def saved(folder: Path, prefix: str, count: int = 1) -> list[str]:
    save = image_nodes(folder, folder, {})["SaveImage"]
    assert save.validate_inputs(filename_prefix=prefix) is True
    paths = save.execute(images=torch.rand(count, 8, 8, 3), filename_prefix=prefix).ui
    return [path.relative_to(folder).as_posix() for path in paths]


@pytest.mark.parametrize("prefix", ["cat", "cat[1]", "c*t?", "猫 [a-z]", "%猫%", "a.b"])
def test_no_picture_is_ever_overwritten(tmp_path: Path, prefix: str) -> None:
    first = saved(tmp_path, prefix, 2)
    before = [(tmp_path / name).read_bytes() for name in first]
    assert first == [f"{prefix}_00001_.png", f"{prefix}_00002_.png"]
    assert saved(tmp_path, f"{prefix}/") == [f"{prefix}_00003_.png"]
    assert [(tmp_path / name).read_bytes() for name in first] == before


@pytest.mark.parametrize(
    ("there", "number"),
    [
        (["cat_final_.png"], 1),
        (["cat_00004_.png", "cat_final_.png"], 5),
        (["cat_00004_.jpg"], 5),  # ComfyUI counts every kind of file
        (["cat_00004.png", "cat_7"], 8),
        (["cat_00004_copy_.png"], 5),
        (["cats_00009_.png", "acat_00009_.png", "cat.png", "cat_"], 1),
        (["cat_123456_.png"], 123457),
    ],
)
def test_pictures_are_counted_as_in_comfyui(tmp_path: Path, there: list, number: int) -> None:
    for name in there:
        (tmp_path / name).touch()
    assert saved(tmp_path, "cat") == [f"cat_{number:05d}_.png"]


def test_a_picture_of_another_run_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made between the count and the writing; a link that leads nowhere is one too."""
    (tmp_path / "cat_00001_.png").write_bytes(b"another's")
    os.symlink(tmp_path / "nowhere", tmp_path / "cat_00002_.png")
    monkeypatch.setattr("majicflux.host.image_nodes.os.listdir", lambda _: [])
    assert saved(tmp_path, "cat") == ["cat_00003_.png"]
    assert (tmp_path / "cat_00001_.png").read_bytes() == b"another's"
    assert not (tmp_path / "nowhere").exists()


def test_the_size_the_day_and_the_number_are_filled_in_as_in_comfyui(tmp_path: Path) -> None:
    year = datetime.now().year
    assert saved(tmp_path, "%year%/%width%x%height%_%batch_num%_%none%", 2) == [
        f"{year}/8x8_{index}_%none%_00001_.png" for index in (0, 1)
    ]


@pytest.mark.parametrize("prefix", ["", ".", "..", "../cat", "sub/..", "/cat", "link/cat"])
def test_pictures_stay_in_the_output_folder(tmp_path: Path, prefix: str) -> None:
    folder = tmp_path / "output"
    folder.mkdir()
    os.symlink(tmp_path, folder / "link")
    save = image_nodes(folder, folder, {})["SaveImage"]
    assert "leads out of the output folder" in save.validate_inputs(filename_prefix=prefix)
    with pytest.raises(ValueError, match="leads out of the output folder"):
        save.execute(images=torch.rand(1, 8, 8, 3), filename_prefix=prefix)
    assert sorted(tmp_path.rglob("*")) == [folder, folder / "link"]


def test_where_nothing_can_be_saved_is_said_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, prefix in (
        (tmp_path / "file", "cat"),
        (tmp_path, "file/cat"),
        (tmp_path, "c" * 300),
        (tmp_path, "\ud800"),
        (tmp_path, "a\0b"),
    ):
        nodes = image_nodes(folder, folder, {})
        said = nodes["SaveImage"].validate_inputs(filename_prefix=prefix)
        assert re.fullmatch(r"(?s).* cannot be written: .+\.|.* names no file\.", said), said
    assert (
        "cannot be written"
        in image_nodes(tmp_path / "file", tmp_path, {})["PreviewImage"].validate_inputs()
    )
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_no_half_of_a_picture_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data: bytes) -> None:
            self.file.write(data[:9])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda path, mode: Full(opened(path, mode)))
    save = image_nodes(tmp_path, tmp_path, {})["SaveImage"]
    with pytest.raises(ValueError, match=r"cat_00001_\.png cannot be written: No space left"):
        save.execute(images=torch.rand(1, 8, 8, 3), filename_prefix="cat")
    assert not [*tmp_path.iterdir()]


def test_what_a_picture_carries_never_stops_it(tmp_path: Path) -> None:
    metadata = {"prompt": {"1": 2}, "deep": nested(5000), "strange": {1, 2}}
    nodes = image_nodes(tmp_path, tmp_path, metadata)
    (path,) = nodes["SaveImage"].execute(images=torch.rand(1, 8, 8, 3), filename_prefix="a").ui
    with Image.open(path) as picture:
        assert picture.text["prompt"] == '{"1": 2}'
        assert "strange" not in picture.text


@pytest.mark.parametrize(
    ("values", "right"),
    [
        (np.array([[0, 257, 32896, 65535]], np.uint16), [0, 257 / 65535, 32896 / 65535, 1]),
        (np.array([[0, 257, 32896, 65535]], np.int32), [0, 257 / 65535, 32896 / 65535, 1]),
        (np.array([[0, 0.25, 1, 7]], np.float32), [0, 0.25, 1, 1]),
        (np.array([[0, 51, 255]], np.uint8), [0, 0.2, 1]),
    ],
    ids=["16 bits", "16 bits in 32", "float", "8 bits"],
)
def test_a_grey_picture_of_any_depth_loads_as_it_looks(tmp_path: Path, values, right) -> None:
    Image.fromarray(values).save(tmp_path / "grey.tif")
    image, mask = image_nodes(tmp_path, tmp_path, {})["LoadImage"].execute("grey.tif").args
    assert image.shape == (1, *values.shape, 3)
    assert torch.allclose(image[0, 0], torch.tensor(right)[:, None].expand(-1, 3))
    assert not mask.any()


def loading(folder: Path, name: str) -> str:
    load = image_nodes(folder / "output", folder / "input", {})["LoadImage"]
    return str(load.validate_inputs(name))


def test_pictures_are_found_where_comfyui_finds_them(tmp_path: Path) -> None:
    for place in ("input/in.png", "input/sub/in.png", "output/out.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place)
    for name in ("in.png", "in.png [input]", "sub/in.png", "out.png [output]"):
        assert loading(tmp_path, name) == "True", name
    for name in ("out.png", "in.png [output]", "in.png [temp]"):
        assert "There is no picture" in loading(tmp_path, name), name


def test_pictures_are_read_from_nowhere_else(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "out.png")
    (tmp_path / "input").mkdir()
    os.symlink(tmp_path / "out.png", tmp_path / "input" / "link.png")
    for name in ("../out.png", str(tmp_path / "out.png"), "link.png", "../out.png [output]", "\0"):
        assert "leads out of the folder" in loading(tmp_path, name), name


def test_the_upload_button_of_an_older_export_is_ignored(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    exported = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "a.png", "upload": "image"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    assert run_graph(exported, node_classes(tmp_path)) == [[tmp_path / "preview_00001_.png"]]


def test_what_is_no_picture_is_said_in_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "broken.png").write_bytes(whole[:40] + b"\0" * 16 + whole[56:])
    huge = struct.pack(">II", 10**5, 10**5)
    (folder / "bomb.png").write_bytes(whole[:16] + huge + whole[24:])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    for name in sorted(path.name for path in folder.iterdir() if path.name != "whole.png"):
        said = loading(tmp_path, name)
        assert re.match(r".*(cannot be read: .+\.|There is no picture .+\.)$", said), name
        assert "\n" not in said
