"""Previews by ComfyUI's TAESD: what they take of the device, and what is seen of them."""

from typing import Any

import pytest
import torch
from live_bytes import LiveBytes


@pytest.mark.parametrize(("width", "height"), [(1024, 1024), (1536, 640), (256, 128)])
def test_a_preview_takes_what_is_planned_for_it(
    comfy, monkeypatch, width: int, height: int
) -> None:
    import latent_preview
    from comfy.taesd.taesd import TAESD

    host = comfy.pack("host.comfyui")
    most = latent_preview.MAX_PREVIEW_RESOLUTION
    previewer = latent_preview.TAESDPreviewerImpl(TAESD(latent_channels=16))
    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: previewer)
    monkeypatch.setattr(
        latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.TAESD
    )
    shown = []
    bar = host.comfy.utils.ProgressBar

    def watched(self, value: int, total: int, preview: object) -> None:
        shown.append(preview)
        self.current = value

    monkeypatch.setattr(bar, "update_absolute", watched)
    on_pass = host.progress(2, 2, torch.device("cpu"), None)
    latents = torch.randn(2, 16, height // 8, width // 8)
    with torch.inference_mode(), LiveBytes("cpu") as live:
        on_pass(latents)
    planned = host.preview_bytes(width, height)
    assert 0.5 * planned < live.peak <= planned
    assert max(shown[0][1].size) == min(most, max(width, height)), "as large as it is shown"
    shape = shown[0][1].size
    assert shape[0] * height == pytest.approx(shape[1] * width, rel=0.05)


def test_other_previews_take_nothing(comfy) -> None:
    assert comfy.pack("host.comfyui").preview_bytes(1024, 1024) == 0


def test_a_preview_that_finds_no_memory_is_left_out(
    comfy, small_graph: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    import latent_preview

    asked: list[Any] = []

    class Short:
        def decode_latent_to_preview_image(self, *given: Any) -> None:
            asked.append(given)
            raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: Short())
    small_graph["5"]["inputs"]["steps"] = 8
    kind, data = comfy.run(comfy.executor(), small_graph)[-1]
    assert kind == "execution_success", data
    assert len(asked) == 8
