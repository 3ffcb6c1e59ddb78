"""Errors and reports in a real ComfyUI, in the language of the canvas."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from comfyui_server import Refused, Server

API = Path(__file__).parents[2] / "workflows" / "api" / "text_to_image.json"


@pytest.fixture
def chinese(server: Server) -> Iterator[Server]:
    """A server whose canvas is set to Chinese."""
    settings = server.base / "user" / "default" / "comfy.settings.json"
    before = settings.read_bytes()
    server.post("/settings/Comfy.Locale", "zh")
    yield server
    settings.write_bytes(before)


@pytest.fixture
def graph() -> dict:
    graph = json.loads(API.read_text(encoding="utf-8"))
    graph["5"]["inputs"].update(width=64, height=64, steps=1)
    return graph


def test_texts_change_with_the_setting_and_without_a_restart(chinese: Server, graph: dict) -> None:
    wrong = chinese.base / "models" / "diffusion_models" / "language.safetensors"
    wrong.hardlink_to(chinese.base / "models" / "text_encoders" / "clip_l.safetensors")
    sample = {**graph["5"], "inputs": {**graph["5"]["inputs"], "strength": 0.5}}
    loader = {**graph["1"], "inputs": {**graph["1"]["inputs"], "file": wrong.name}}

    def said(budget: float) -> tuple[str, str, str]:
        """A refusal, the error of a run, and what the pipeline shows, in one language."""
        with pytest.raises(Refused) as refused:
            chinese.run({**graph, "1": loader})
        graph["4"]["inputs"]["vram_budget_gb"] = budget  # or the node would not run again
        run = chinese.run({**graph, "5": sample})
        (error,) = run.of("execution_error")
        return refused.value.errors["1"][0], error["exception_message"].strip(), run.texts["4"]

    refusal, error, plan = said(7.0)
    assert "language.safetensors 是 CLIP 文本编码器，不是 Flux.1 的 Transformer。" in refusal
    assert error == ("重绘强度为 0.5 时需要一张起始图。请接上图像或 Latent，或把重绘强度设为 1。")
    assert plan.startswith("Transformer 部分：用 float32 计算，设备 CPU")
    assert plan.endswith("\n在 CPU 上计算，不用显存")

    chinese.post("/settings/Comfy.Locale", "en")
    refusal, error, plan = said(8.0)
    assert "language.safetensors is a CLIP text encoder, not a Flux.1 transformer." in refusal
    assert error.startswith("A strength of 0.5 needs a picture to begin from. Connect an image")
    assert plan.endswith("\non the CPU: no VRAM is used")
    wrong.unlink()


def test_a_picture_painted_in_chinese_shows_it_and_keeps_english(
    chinese: Server, graph: dict
) -> None:
    graph["5"]["inputs"].update(prompt="a prompt in another language", seed=4100)
    run = chinese.run(graph, workflow={"nodes": []})
    assert not run.of("execution_error")
    assert re.search(r", VAE 解码 \d+\.\d 秒", run.texts["5"])
    assert any(text.startswith("第 1/1 步，每步 ") for _, text in run.live_texts)
    (path,) = chinese.outputs(run)
    with Image.open(path) as picture:
        report = json.loads(picture.text["majicflux"])
    assert [phase["name"] for phase in report["phases"]] == [
        "text encoders", "denoising", "VAE decode",
    ]  # fmt: skip
