"""The node that compares pictures, in a real server."""

import pytest

from comfyui_server import Server

pytest.importorskip("flip_evaluator")  # which has no build for Python 3.14


def test_it_shows_numbers_and_map_and_gives_both_on(server: Server) -> None:
    def blank(color: int) -> dict:
        size = {"width": 64, "height": 48, "batch_size": 1}
        return {"class_type": "EmptyImage", "inputs": {**size, "color": color}}

    graph = {
        "1": blank(0x00FF00),
        "2": blank(0x0000FF),
        "3": {
            "class_type": "MajicFluxCompare",
            "inputs": {"reference": ["1", 0], "image": ["2", 0]},
        },
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "d"}},
    }
    run = server.run(graph)
    assert not run.of("execution_error")
    text = run.texts["3"]
    assert text.startswith("FLIP 1.0000, SSIM ")
    done = {data["node"]: data["output"] for data in run.of("executed")}
    assert done["4"]["text"] == [text]
    (picture,) = done["3"]["images"]
    assert picture["type"] == "temp"
    (saved,) = server.outputs(run)
    assert saved.is_file()


def test_pictures_of_two_sizes_are_refused_on_the_node(server: Server) -> None:
    sizes = ({"width": width, "height": 64, "batch_size": 1, "color": 0} for width in (64, 32))
    first, second = ({"class_type": "EmptyImage", "inputs": size} for size in sizes)
    inputs = {"reference": ["1", 0], "image": ["2", 0]}
    node = {"class_type": "MajicFluxCompare", "inputs": inputs}
    (error,) = server.run({"1": first, "2": second, "3": node}).of("execution_error")
    assert (
        "Pictures of one size are compared, not of 64x64 and 32x64." in error["exception_message"]
    )
