"""The doctor's node in a real ComfyUI."""

import re

from comfyui_server import Server

GRAPH = {"1": {"class_type": "MajicFluxDoctor", "inputs": {}}}


def test_it_shows_its_text_on_the_node_every_time(server: Server) -> None:
    version = server.get("/system_stats")["system"]["comfyui_version"]
    for _ in range(2):
        run = server.run(GRAPH)
        assert not run.of("execution_error")
        text = run.texts["1"]
        assert f"packages: ComfyUI {version}, " in text
        assert re.search(r"a Flux.1 transformer: .*majicflus_v134.safetensors", text)
        assert "a T5 text encoder: t5xxl_fp16.safetensors" in text
        assert "not known" not in text
        assert str(server.base) not in text


def test_its_text_goes_on_to_other_nodes(server: Server) -> None:
    shown = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    run = server.run({**GRAPH, "2": shown})
    (done,) = (data for data in run.of("executed") if data["node"] == "2")
    assert done["output"]["text"] == [run.texts["1"]]
