"""What `majicflux doctor` says, of machines that have everything and of ones that lack it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from majicflux import cli
from majicflux.benchmarks import random_models
from majicflux.downloads.catalogue import AE, CLIP_L, MAJICFLUS_BF16, T5_XXL
from majicflux.engine.allocator import Allocator
from majicflux.engine.kernels import dispatch
from majicflux.engine.plan import measure
from majicflux.engine.plan.estimate import estimate_plan
from majicflux.engine.plan.units import GB
from majicflux.engine.quant.formats import PRECISIONS
from majicflux.host import standalone
from majicflux.lab.doctor import diagnosis
from majicflux.loaders import demo_models
from majicflux.loaders.recognise import FLUX_DIT

ROOT = Path(__file__).parents[2]
BEGINNINGS = [
    "MajicFlux", "torch", "packages", "card", "RAM", "copies to the card",
    "compute_precision auto", "models", "prepared weights", "plan of a FLUX.1 transformer",
]  # fmt: skip
SCREEN = 50  # lines


def parts(text: str) -> dict[str, str]:
    """Each part by how it begins: the rest of its line and the list below."""
    found = re.findall(r"^(\w[^:]*):(.*(?:\n[ -].*)*)", text, re.MULTILINE)
    names = [name for name, _ in found]
    assert [n for n, b in zip(names, BEGINNINGS, strict=True) if not n.startswith(b)] == []
    return dict(zip(BEGINNINGS, (rest for _, rest in found), strict=True))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder."""
    monkeypatch.setattr(standalone, "models_folder", tmp_path / "models")
    return tmp_path / "models"


def tensors(name: str, tensor: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(1) if tensor is None else tensor}


def put(path: Path, content: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(content, path)


def test_a_whole_set_of_models_lacks_nothing(models: Path, monkeypatch) -> None:
    monkeypatch.setattr(standalone, "models_folder", models)
    text = diagnosis()
    found = parts(text)
    assert len(text.splitlines()) <= SCREEN
    version = re.findall(r'\nversion = "(.*)"', (ROOT / "pyproject.toml").read_text())[0]
    assert found["MajicFlux"].startswith(f" {version}, Python {sys.version.split()[0]}, ")
    assert torch.__version__ in found["torch"]
    assert "diffsynth 2." in found["packages"]
    assert "a Flux.1 transformer: majicflus_v134.safetensors" in found["models"]
    assert "a CLIP text encoder: clip_l.safetensors" in found["models"]
    assert "a T5 text encoder: t5xxl_fp16.safetensors" in found["models"]
    assert "a VAE: ae.safetensors" in found["models"]
    assert "MISSING" not in text
    assert "not known" not in text


def test_missing_models_are_named_with_their_places(folder: Path) -> None:
    found = parts(diagnosis())["models"]
    for file in (MAJICFLUS_BF16, CLIP_L, T5_XXL, AE):
        (line,) = (x for x in found.splitlines() if "MISSING" in x and f" {file.name} " in x)
        assert f"models/{file.folder}" in line
        for place in file.places:
            assert place.repository in line


def test_a_file_that_no_loader_takes_does_not_count(folder: Path) -> None:
    put(folder / "diffusion_models/style.safetensors", tensors("a.lora_A.weight"))
    put(folder / "diffusion_models/strange.safetensors", tensors("strange"))
    put(folder / "vae/sdxl.safetensors", {
        "decoder.mid.block_1.conv1.weight": torch.zeros(1),
        "decoder.conv_in.weight": torch.zeros(512, 4, 3, 3)})  # fmt: skip
    for name in ("a", "b"):
        (folder / f"vae/{name}.safetensors").write_bytes(b"PK\x03\x04")
    (folder / "vae/gone.safetensors").symlink_to(folder / "nothing")
    random_models.write_random_models(folder.parent / "demo")
    t5 = folder / "vae/t5.safetensors"
    (folder.parent / "demo" / demo_models.T5_FILE).rename(t5)
    found = parts(diagnosis())["models"]
    assert "a LoRA: style.safetensors" in found
    assert "nothing that MajicFlux knows: strange.safetensors" in found
    assert "unusable (is a VAE of another model: its latents have 4 channels" in found
    assert "use the .safetensors): a.safetensors, b.safetensors\n" in found
    assert "unusable (is not in models/vae" in found
    assert "a T5 text encoder, which belongs in models/text_encoders: t5.safetensors" in found
    assert found.count("MISSING") == 4


def test_left_over_tensors_and_linked_folders_are_looked_through(models, folder) -> None:
    left = load_file(models / demo_models.DIT_FILE) | tensors("lora_unet_a.lora_down.weight")
    put(folder / "diffusion_models/tuned.safetensors", left)
    (folder / "vae").symlink_to(models / "vae")
    (folder / "text_encoders").mkdir()
    (folder / "text_encoders/linked").symlink_to(models / "text_encoders")
    (folder / "text_encoders/._clip_l.safetensors").write_bytes(b"\x00\x05\x16\x07")
    found = parts(diagnosis())["models"]
    assert "a Flux.1 transformer: tuned.safetensors" in found
    assert "MISSING" not in found
    assert "._" not in found
    chroma = tensors(FLUX_DIT.markers[0]) | tensors("distilled_guidance_layer.in_proj.weight")
    put(folder / "diffusion_models/chroma.safetensors", chroma)
    put(folder / "diffusion_models/wan.safetensors", tensors("blocks.0.cross_attn.norm_k.weight"))
    found = parts(diagnosis())["models"]
    assert "unusable (is a transformer of Chroma, not a Flux.1 transformer" in found
    assert "a transformer of Wan: wan.safetensors" in found


def test_many_files_of_a_kind_take_one_line(folder: Path) -> None:
    for index in range(30):
        put(folder / f"checkpoints/lora_{index:02}.safetensors", tensors("a.lora_A.weight"))
    assert "a LoRA: lora_00.safetensors, lora_01.safetensors, lora_02.safetensors, " in (
        found := parts(diagnosis())["models"]
    )
    assert "lora_03.safetensors and 26 more" in found


def test_a_whole_checkpoint_is_everything(models: Path, folder: Path) -> None:
    whole = load_file(models / demo_models.DIT_FILE)
    prefixes = {
        "vae.": demo_models.VAE_FILE,
        "text_encoders.clip_l.transformer.": demo_models.CLIP_FILE,
        "text_encoders.t5xxl.transformer.": demo_models.T5_FILE,
    }
    for prefix, file in prefixes.items():
        whole |= {prefix + name: tensor for name, tensor in load_file(models / file).items()}
    put(folder / "checkpoints/all.safetensors", whole)
    assert "MISSING" not in diagnosis()
    (folder / "diffusion_models").mkdir()
    (folder / "checkpoints/all.safetensors").rename(folder / "diffusion_models/all.safetensors")
    assert diagnosis().count("MISSING") == 3, "only the transformer is chosen from there"


def test_the_shards_of_a_model_are_one(models: Path, folder: Path) -> None:
    content = list(load_file(models / demo_models.T5_FILE).items())
    for index, half in enumerate((content[:20], content[20:]), start=1):
        name = f"model-0000{index}-of-00002.safetensors"
        put(folder / "text_encoders/text_encoder_2" / name, dict(half))
    assert "a T5 text encoder: text_encoder_2\n" in parts(diagnosis())["models"]


@pytest.mark.parametrize(
    ("absent", "silent"),
    [
        (["psutil"], ["RAM"]),
        (["diffsynth"], []),
        (["torch"], ["torch", "card", "copies to the card", "plan of a FLUX.1 transformer"]),
    ],
)
def test_what_is_not_installed_is_said_in_its_line(
    models: Path, absent: list[str], silent: list[str]
) -> None:
    """In a process where these packages cannot be imported, nor any version be found."""
    code = f"""
import importlib.metadata, sys
from pathlib import Path
for name in {absent}:
    sys.modules[name] = None
def nowhere(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = nowhere
from majicflux.host import standalone
from majicflux.loaders.recognise import FLUX_DIT
from majicflux.lab.doctor import diagnosis
standalone.models_folder = Path({str(models)!r})
print(diagnosis())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = parts(done.stdout)
    for part in silent:
        assert found[part].startswith(" not known (ModuleNotFoundError: "), part
    computing = found["compute_precision auto"]
    assert computing.count("not known") == (0 if absent == ["psutil"] else len(PRECISIONS))
    assert ("DiffSynth-Studio is not installed. Run" in computing) == (absent == ["diffsynth"])
    for part in {*BEGINNINGS} - {*silent, "compute_precision auto"}:
        assert "not known" not in found[part], part
    assert "no diffsynth, no transformers, no triton" in found["packages"]


@pytest.mark.parametrize("package", ["torchaudio", "torchvision"])
@pytest.mark.parametrize(
    "broken", ["raise OSError('undefined symbol: x')", "raise RuntimeError('operator x::y')"]
)
def test_a_package_of_another_pytorch_is_told(
    models: Path, tmp_path: Path, package: str, broken: str
) -> None:
    """By the doctor, and by the loader when Transformers stumbles over it under another name."""
    (tmp_path / f"{package}.py").write_text(broken)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
from majicflux.lab.doctor import diagnosis
print(diagnosis().partition("packages:")[0])
import transformers
class Lazy:
    def __getattr__(self, name):
        try:
            import {package}
        except Exception as error:
            raise ModuleNotFoundError(f"Could not import module {{name!r}}.") from error
sys.modules["transformers"] = Lazy()
from majicflux.loaders.tokenizers import T5_TOKENIZER, load_tokenizer
try:
    load_tokenizer(T5_TOKENIZER, Path({str(models)!r}, "text_encoders/t5.safetensors"), 1, None)
except ValueError as error:
    print("LOADER", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reason = broken.split("'")[1]
    doctor, loader = done.stdout.split("LOADER")
    for said in (doctor, loader):
        assert f"{package} does not fit PyTorch {torch.__version__} ({reason})." in said
        assert f"pip uninstall {package}" in said
    assert loader.startswith(f" Transformers cannot import its T5 tokenizer: {reason}; ")


def test_no_path_of_the_machine_is_shown(folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    (folder / "vae").mkdir(parents=True)
    (folder / "vae/broken.safetensors").symlink_to(folder / "gone")
    (folder / "majicflux_prepared").symlink_to(folder / "gone")

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(folder / "secret"))

    monkeypatch.setattr("shutil.disk_usage", refused)
    text = diagnosis()
    assert "not known (PermissionError: Permission denied)" in parts(text)["prepared weights"]
    assert str(folder.parent) not in text
    assert folder.parent.name not in text


def test_a_card_is_measured_and_planned_for(folder: Path, monkeypatch) -> None:
    device, free = torch.device("cuda", 0), 6 * GB
    monkeypatch.setattr(standalone, "compute_device", lambda: device)
    monkeypatch.setattr(standalone, "compute_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(standalone, "free_memory", lambda _: free)
    monkeypatch.setattr(dispatch, "capability", lambda _: (8, 6))
    for name in ("triton_works", "int8_product_works"):
        monkeypatch.setattr(dispatch, name, lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Card")
    monkeypatch.setattr(measure, "copy_rate", lambda _: 12e9)
    rates = {torch.int8: 100e12, torch.bfloat16: 50e12}
    monkeypatch.setattr(measure, "_product_rate", lambda _, dtype: rates[dtype])
    monkeypatch.setattr(measure, "_attention_rate", lambda *_: 25e12)
    monkeypatch.setattr(measure, "allocator_of", lambda _: Allocator(torch.device("cpu")))
    total = type("Properties", (), {"total_memory": 8 * GB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: total)
    found = parts(diagnosis())
    assert found["card"] == (" Some Card, compute capability 8.6; 6.0 of 8.0 GB of VRAM are free")
    assert found["copies to the card"] == " 12.0 GB/s from pinned memory"
    auto = found["compute_precision auto"]
    assert "int8 rotated weights: computes in int8, 100 TFLOP/s" in auto
    assert (
        "float8_e4m3fn weights: computes in bfloat16 (float8_e4m3fn matrix units begin with "
        "compute capability 8.9, int8 rotated weights would be faster), 50 TFLOP/s"
    ) in auto
    plan = estimate_plan(None, PRECISIONS["float8_e4m3fn"], (1024, 1024, 1, 20), 6.0, False, 12, 50)
    shown = found["plan of a FLUX.1 transformer"]
    assert [x.removeprefix("- ") for x in shown.splitlines()[1:]] == str(plan).splitlines()
    assert "predicted: " in shown

    def full(*_: object) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(measure, "_product_rate", full)
    found = parts(diagnosis())
    assert "int8 rotated weights: computes in int8" in found["compute_precision auto"]
    assert "TFLOP/s" not in found["compute_precision auto"]
    assert "denoising: " in found["plan of a FLUX.1 transformer"]
    assert "predicted: " not in found["plan of a FLUX.1 transformer"]


def test_the_command_prints_it_on_any_console(models: Path, tmp_path: Path) -> None:
    (tmp_path / "diffusion_models").mkdir()
    os.link(models / demo_models.DIT_FILE, tmp_path / "diffusion_models/麦橘超然.safetensors")
    command = [sys.executable, "-m", "majicflux.cli", "doctor", "--models", tmp_path]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "a Flux.1 transformer: ????.safetensors" in parts(done.stdout)["models"]


def test_a_folder_that_is_not_there_is_told_beside_the_diagnosis(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(standalone, "models_folder", None)
    monkeypatch.setattr("majicflux.lab.doctor.diagnosis", lambda: "of this machine")
    for folder, told in ((tmp_path, ""), (tmp_path / "model", f"no folder {tmp_path / 'model'}. ")):
        assert cli.main(["doctor", "--models", str(folder)]) == 0
        out, err = capsys.readouterr()
        assert out == "of this machine\n"
        assert told in err
        assert bool(told) == bool(err)


def test_the_version_of_the_comfyui_of_the_models_is_known(folder: Path) -> None:
    assert parts(diagnosis())["packages"].startswith(" no ComfyUI, ")
    folder.parent.joinpath("comfyui_version.py").write_text('# it\n__version__ = "0.33.0"\n')
    assert parts(diagnosis())["packages"].startswith(" ComfyUI 0.33.0, ")
