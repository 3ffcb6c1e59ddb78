"""What the catalogue says of the published files, and which of them a command means."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from rooms import FILES, ROOT, imported_packages

from lora_dialects import control_lora_layout
from majicflux import cli
from majicflux.downloads import download
from majicflux.downloads.catalogue import (
    AE,
    CANNY,
    CANNY_LORA,
    CLIP_L,
    DEPTH,
    DEPTH_LORA,
    FILL,
    GROUPS,
    HUGGINGFACE,
    INPAINTING_NET,
    KNOWN_FILES,
    KONTEXT_BF16,
    KONTEXT_FLOAT8,
    MAJICFLUS_BF16,
    MAJICFLUS_FLOAT8,
    T5_XXL,
    UNION_PRO,
    UNION_PRO_2,
    KnownFile,
)
from majicflux.engine.flux.geometry import (
    ClipGeometry,
    ControlGeometry,
    FluxGeometry,
    T5Geometry,
)
from majicflux.loaders import demo_models
from majicflux.loaders.layouts import (
    Layout,
    clip_layout,
    control_net_layout,
    flux_dit_layout,
    t5_layout,
    vae_layout,
)

MOST_HEADER_BYTES = 200_000


def elements(layout: Layout) -> int:
    return sum(math.prod(shape) for shape in layout.values())


FLUX = elements(flux_dit_layout(FluxGeometry()))
FLUX_VECTORS = sum(s[0] for s in flux_dit_layout(FluxGeometry()).values() if len(s) == 1)
T5 = t5_layout(T5Geometry())
UNION = ControlGeometry(single_blocks=10, modes=10)
CONTROL_LORA = 2 * sum(map(math.prod, control_lora_layout(FluxGeometry(), 128).values()))
EMBEDDING_TWICE = {**T5, "encoder.embed_tokens.weight": T5["shared.weight"]}


@pytest.mark.parametrize(
    ("file", "tensor_bytes"),
    [
        (MAJICFLUS_FLOAT8, FLUX),
        (CLIP_L, 2 * elements(clip_layout(ClipGeometry()))),
        (T5_XXL, 2 * elements(EMBEDDING_TWICE)),
        (AE, 4 * elements(vae_layout())),
        (KONTEXT_BF16, 2 * FLUX),
        (KONTEXT_FLOAT8, FLUX + FLUX_VECTORS),
        (FILL, 2 * elements(flux_dit_layout(FluxGeometry(in_channels=384)))),
        (CANNY, 2 * elements(flux_dit_layout(FluxGeometry(in_channels=128)))),
        (DEPTH_LORA, CONTROL_LORA),
        (CANNY_LORA, CONTROL_LORA),
        (UNION_PRO_2, 2 * elements(control_net_layout(ControlGeometry(double_blocks=6)))),
        (UNION_PRO, 2 * elements(control_net_layout(UNION))),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_size_is_that_of_the_tensors_and_a_header(file: KnownFile, tensor_bytes: int) -> None:
    assert 0 < file.size - tensor_bytes < MOST_HEADER_BYTES


def test_the_least_size_of_a_bf16_file_is_that_of_its_tensors() -> None:
    assert MAJICFLUS_BF16.least_size == 2 * FLUX
    of_depth = flux_dit_layout(FluxGeometry(in_channels=128))
    assert DEPTH.least_size == 2 * elements(of_depth)
    inpainting = control_net_layout(ControlGeometry(double_blocks=6, hint_channels=68))
    assert INPAINTING_NET.least_size == 2 * elements(inpainting)


def test_every_file_has_the_name_that_workflows_and_readmes_use() -> None:
    names = {f"{file.folder}/{file.name}" for file in (*GROUPS["all"], *GROUPS["turbo"])}
    demo = {name for key, name in vars(demo_models).items() if key.endswith("_FILE")}
    demo -= {demo_models.LORA_FILE}  # which the demo models alone have
    assert names == demo | {"diffusion_models/majicflus_v1.safetensors"}
    workflow = (ROOT / "workflows" / "text_to_image.json").read_text(encoding="utf-8")
    nodes = json.loads(workflow)["nodes"]
    links = {m["url"] for n in nodes for m in n.get("properties", {}).get("models", [])}
    places = [place for file in GROUPS["all"] if (place := file.place(HUGGINGFACE))]
    assert links == {
        f"https://huggingface.co/{p.repository}/resolve/{p.revision}/{p.path}" for p in places
    }
    for readme in ("README.md", "README.zh-CN.md"):
        text = (ROOT / readme).read_text(encoding="utf-8")
        for file in KNOWN_FILES:
            assert all(f"`{file.name}`" in text and p.repository in text for p in file.places)


@pytest.mark.parametrize(
    ("arguments", "names", "free"),
    [
        ([], ["majicflus_v134", "clip_l", "t5xxl_fp16", "ae"], 24e9),
        (["majicflus", "--from", "huggingface"], ["majicflus_v1"], 11e9),
        (["flux-dev-parts"], ["clip_l", "t5xxl_fp16", "ae"], 10e9),
        (["turbo"], ["FLUX.1-Turbo-Alpha"], 0.5e9),
        (["kontext"], ["flux1-kontext-dev"], 20e9),
        (["kontext", "--from", "huggingface"], ["flux1-dev-kontext_fp8_scaled"], 11e9),
        (["redux"], ["flux1-redux-dev", "sigclip_vision_patch14_384"], 0.9e9),
    ],
)
def test_a_command_lists_its_files_and_begins_only_if_all_fit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    names: list[str],
    free: float,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(download, "fetch", lambda *_: pytest.fail("it began"))
    assert cli.main(["download", *arguments, "--models", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    paths = [line.split()[0] for line in out.splitlines()[1:]]
    assert [Path(path).stem for path in paths] == names
    assert "are still to come" in err
    assert not list(tmp_path.iterdir())


def test_no_other_file_of_the_pack_opens_connections() -> None:
    network = {"modelscope", "huggingface_hub", "requests", "urllib", "http", "socket", "httpx"}
    found = {path.name for path in FILES if imported_packages(path) & network}
    assert found == {"hubs.py", "cluster.py"}  # whose addresses the user gives
