"""ComfyUI's own Flux nodes and ours paint the same picture from the files of the demo models."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from comfyui_server import Server
from majicflux.benchmarks.flux_graphs import CLIP, DIT, T5, VAE
from majicflux.loaders.demo_models import write_demo_models
from majicflux.tools.little_world.read_back import read_back

API = Path(__file__).parents[2] / "workflows" / "api" / "text_to_image.json"
IN_FLOAT32 = ("--cpu", "--fp32-unet", "--fp32-vae", "--fp32-text-enc")
T5_TOKENS = 512  # that ours fills a prompt up to
SIDE, STEPS, SEED, GUIDANCE = 256, 6, 1, 3.5
PROMPT = "a red house on the left, a white car, by day, summer, no trees, green hills, clear sky"


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("painter")
    write_demo_models(folder / "models")
    comfyui = Path(os.environ["COMFYUI_PATH"])
    server = Server(comfyui, folder / "base", folder / "models", IN_FLOAT32)
    yield server
    server.stop()


def both(prompt: str) -> dict[str, Any]:
    """Node `theirs` saves what ComfyUI's own nodes paint, `ours` what ours do."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    ours = json.loads(API.read_text(encoding="utf-8"))
    ours["1"]["inputs"].update(file=DIT, weight_precision="bfloat16")
    ours["2"]["inputs"].update(precision="float32")
    ours["4"]["inputs"].update(compute_precision="float32")
    ours["5"]["inputs"].update(
        prompt=prompt, seed=SEED, steps=STEPS, guidance=GUIDANCE, width=SIDE, height=SIDE,
        sigmas=["sigmas", 0],
    )  # fmt: skip
    ours["ours"] = ours.pop("6")
    return ours | {
        "unet": node("UNETLoader", unet_name=DIT, weight_dtype="default"),
        "clip": node("DualCLIPLoader", clip_name1=T5, clip_name2=CLIP, type="flux"),
        "filled": node("T5TokenizerOptions", clip=["clip", 0], min_padding=0, min_length=T5_TOKENS),
        "text": node("CLIPTextEncode", clip=["filled", 0], text=prompt),
        "guidance": node("FluxGuidance", conditioning=["text", 0], guidance=GUIDANCE),
        "guider": node("BasicGuider", model=["unet", 0], conditioning=["guidance", 0]),
        "noise": node("RandomNoise", noise_seed=SEED),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node(
            "BasicScheduler", model=["unet", 0], scheduler="simple", steps=STEPS, denoise=1.0
        ),
        "empty": node("EmptySD3LatentImage", width=SIDE, height=SIDE, batch_size=1),
        "sampled": node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0],
            sampler=["euler", 0], sigmas=["sigmas", 0], latent_image=["empty", 0],
        ),
        "vae": node("VAELoader", vae_name=VAE),
        "decoded": node("VAEDecode", samples=["sampled", 0], vae=["vae", 0]),
        "theirs": node("SaveImage", images=["decoded", 0], filename_prefix="theirs"),
    }  # fmt: skip


def test_comfyuis_own_nodes_paint_the_same_picture(painter: Server) -> None:
    run = painter.run(both(PROMPT))
    assert not run.of("execution_error"), run.of("execution_error")
    saved = painter.images(run, "output")
    ours, theirs = (
        np.asarray(Image.open(saved[name][0]).convert("RGB")) for name in ("ours", "theirs")
    )
    for picture in (ours, theirs):
        found = read_back(picture, "meadow")
        assert (found["house"], found["place"], found["time"]) == ("red", "left", "day")
    assert np.abs(ours.astype(int) - theirs).max() <= 2
    print(
        np.abs(ours.astype(int) - theirs).max(),
        10 * np.log10(65025 / max(1e-9, np.square(ours.astype(float) - theirs).mean())),
    )
    error = np.square(ours.astype(float) - theirs).mean()
    assert 10 * np.log10(255**2 / max(error, 1e-9)) > 70
