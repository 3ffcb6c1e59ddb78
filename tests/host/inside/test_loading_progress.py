"""What a node shows while it loads for the first time."""

import shutil
from types import SimpleNamespace
from weakref import WeakValueDictionary

import pytest


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("DiTLoader", {"file": "majicflus_v134.safetensors", "weight_precision": "float8_e4m3fn"}),
        ("TextEncodersNode", {"clip_l": "clip_l.safetensors", "t5": "t5xxl_fp16.safetensors",
                              "precision": "bfloat16"}),
    ],
)  # fmt: skip
def test_a_loader_says_from_the_beginning_what_it_does(
    comfy, models, monkeypatch: pytest.MonkeyPatch, node: str, inputs: dict
) -> None:
    from comfy.utils import ProgressBar

    host = comfy.pack("host.comfyui")
    shown: list[str] = []
    bar: list[tuple[int, int]] = []
    monkeypatch.setattr(host, "show_on_node", lambda _, text: shown.append(text))
    monkeypatch.setattr(host, "prepared_folder", lambda: models / "prepared_here")
    monkeypatch.setattr(
        ProgressBar, "update_absolute", lambda _, done, total: bar.append((done, total))
    )
    monkeypatch.setattr(comfy.pack("nodes.model_files"), "_in_use", WeakValueDictionary())
    loader = getattr(comfy.pack("nodes"), node)
    clone = loader.PREPARE_CLASS_CLONE({"hidden_inputs": {host.io.Hidden.unique_id: "1"}})
    try:
        done = clone.execute(**inputs)
    finally:
        shutil.rmtree(models / "prepared_here", ignore_errors=True)
    weights = done.args[0].weights
    assert shown[0] == "preparing to load"
    assert shown[1].startswith("reading and converting 0.0 of ")
    assert shown[-1].startswith("keeping ")
    assert done.ui == {"majicflux": [{"text": weights.report}]}
    assert "mapped from prepared weights" in weights.report
    read = [done for done, total in bar if total == bar[0][1]]
    assert read[0] == 0
    assert read[-1] == bar[0][1]


def test_a_node_is_not_told_more_often_than_it_can_show(comfy, monkeypatch) -> None:
    host = comfy.pack("host.comfyui")
    shown: list[str] = []
    now = [0.0]
    monkeypatch.setattr(host, "show_on_node", lambda _, text: shown.append(text))
    monkeypatch.setattr(host, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(host.comfy.utils.ProgressBar, "update_absolute", lambda *_: None)
    on_bytes = host.loading_progress("1")
    for step in range(101):
        now[0] = step / 100
        on_bytes(step * 10**9, 100 * 10**9, "keeping {total:.1f} GB on disk")
    assert len(shown) == 1 + 4 + 1
