"""The language of the canvas, read from its settings."""

from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("settings", "language"),
    [
        ('{"Comfy.Locale": "ja", "MajicFlux.Language": "zh"}', "ja"),
        ('{"MajicFlux.Language": "zh-TW"}', "zh-TW"),
        ('{"Comfy.Locale": null, "MajicFlux.Language": "zh"}', "zh"),
        ('{"Comfy.UseNewMenu": "Top"}', "en"),
        ('{"Comfy.Loc', "en"),
        ('["zh"]', "en"),
        (None, "en"),
    ],
)
def test_the_language_is_the_chosen_one_or_the_canvass(
    comfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str | None, language: str
) -> None:
    import folder_paths

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    if settings is not None:
        (tmp_path / "default").mkdir()
        (tmp_path / "default" / "comfy.settings.json").write_text(settings, encoding="utf-8")
    assert comfy.pack("host.comfyui").language() == language
