"""The demo models: from what ships to the four files that every program reads."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import torch as safetensors_torch
from safetensors.torch import load_file, save_file
from thin_weights import thin_tensors

from file_layouts import Tensors
from majicflux.benchmarks.random_models import CLIP, DIT, T5
from majicflux.loaders import demo_models
from majicflux.loaders.demo_models import edition, write_demo_models
from majicflux.loaders.flux_dit import inspect_flux_dit
from majicflux.loaders.text_encoders import inspect_clip, inspect_t5
from majicflux.loaders.tokenizers import CLIP_TOKENIZER, T5_TOKENIZER, load_tokenizer
from majicflux.loaders.vae import inspect_vae

PREFIX = "model.diffusion_model."
MOST_BYTES = 16e6  # of the repository, for all that ships
MOST_BYTES_OF_THE_LORA = 300e3
CITY = {
    "English": "A futuristic city street in cyberpunk style, a rainy night, flying cars overhead",
    "Chinese": "赛博朋克风格的未来城市街道，雨夜，头顶有飞行汽车",
}


def in_eight_bits(tensors: Tensors) -> Tensors:
    """Matrices as int8 with a float16 scale for each 128 values, vectors as float16."""
    packed: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            packed[name] = tensor.half()
            continue
        groups = tensor.float().flatten().split(128)
        scales = torch.stack([group.abs().max() / 127 for group in groups]).half()
        values = [group / scale.float() for group, scale in zip(groups, scales, strict=True)]
        packed[name] = torch.cat(values).round().clamp(-127, 127).to(torch.int8).view(tensor.shape)
        packed[f"{name}:scale"] = scales
    return packed


@pytest.fixture(scope="session")
def source(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the folder that ships, with random weights."""
    folder = tmp_path_factory.mktemp("source")
    dit = load_file(models / demo_models.DIT_FILE)
    parts = {
        "dit.": {name.removeprefix(PREFIX): tensor for name, tensor in dit.items()},
        "clip.": load_file(models / demo_models.CLIP_FILE),
        "t5.": load_file(models / demo_models.T5_FILE),
        "vae.": thin_tensors(),
    }
    whole = {prefix + name: t for prefix, part in parts.items() for name, t in part.items()}
    save_file(in_eight_bits(whole), folder / "weights.safetensors")
    save_file({"lora": torch.arange(8.0)}, folder / "sepia_lora.safetensors")
    for kind in (CLIP_TOKENIZER, T5_TOKENIZER):
        shutil.copytree(models / "text_encoders" / kind.folder, folder / kind.folder)
    return folder


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_demo_models(folder, source)
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_the_sizes_are_those_of_the_tensors(written: Path) -> None:
    clip, t5 = written / demo_models.CLIP_FILE, written / demo_models.T5_FILE
    assert inspect_flux_dit(written / demo_models.DIT_FILE)[0] == DIT
    assert (inspect_clip(clip)[0], inspect_t5(t5)[0]) == (CLIP, T5)
    assert inspect_vae(written / demo_models.VAE_FILE)
    assert load_tokenizer(CLIP_TOKENIZER, clip, CLIP.vocabulary, None)
    assert load_tokenizer(T5_TOKENIZER, t5, T5.vocabulary, None)


@pytest.mark.parametrize("file", [demo_models.DIT_FILE, demo_models.CLIP_FILE, demo_models.T5_FILE])
def test_values_are_near_those_that_were_packed(models: Path, written: Path, file: str) -> None:
    found, expected = (load_file(folder / file) for folder in (written, models))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        step = expected[name].abs().max() / 127
        assert (tensor.float() - expected[name].float()).abs().max() <= step


def test_the_lora_is_written_as_it_is(written: Path, source: Path) -> None:
    expected = (source / "sepia_lora.safetensors").read_bytes()
    assert (written / "loras" / "sepia_lora.safetensors").read_bytes() == expected


def test_two_calls_write_the_same_bytes(written: Path, source: Path, tmp_path: Path) -> None:
    paths = write_demo_models(tmp_path, source)
    found = files_in(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in paths} == {*found}
    assert found == files_in(written)
    assert not [name for name in found if name.endswith(".part")]


@pytest.mark.parametrize(
    "file",
    [
        demo_models.T5_FILE,
        demo_models.LORA_FILE,
        f"{demo_models.T5_TOKENIZER_FOLDER}/tokenizer.json",
    ],
)
def test_no_file_is_ever_replaced(source: Path, tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"real")
    with pytest.raises(FileExistsError, match="may be a real model"):
        write_demo_models(tmp_path, source)
    assert files_in(tmp_path) == {file: b"real"}


def test_what_is_cut_short_leaves_no_name_and_begins_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(tensors: Tensors, path: Path) -> None:
        if path.name.startswith("ae."):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_torch, "save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            write_demo_models(tmp_path, source)
    assert all(name.endswith(".part") for name in files_in(tmp_path))
    assert all(path.is_file() for path in write_demo_models(tmp_path, source))
    assert not [name for name in files_in(tmp_path) if name.endswith(".part")]


@pytest.mark.parametrize("file", ["weights.safetensors", "sepia_lora.safetensors"])
def test_an_edition_is_that_of_the_weights(source: Path, tmp_path: Path, file: str) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    assert edition(other) == edition(source)
    (other / file).write_bytes(b"others")
    assert edition(other) != edition(source)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_demo_models(tmp_path_factory.mktemp("shipped"))


def test_what_ships_is_small_and_whole(shipped: list[Path]) -> None:
    assert sum(map(len, files_in(demo_models.LITTLE_WORLD).values())) <= MOST_BYTES
    dit, clip, t5, vae, lora, *_ = shipped
    geometry = inspect_flux_dit(dit)[0]
    assert geometry.guidance
    assert geometry.pooled_width == inspect_clip(clip)[0].width
    assert geometry.text_width == inspect_t5(t5)[0].width
    assert inspect_vae(vae)
    assert lora.stat().st_size < MOST_BYTES_OF_THE_LORA


@pytest.mark.parametrize("prompt", CITY.values(), ids=CITY)
def test_what_ships_reads_english_and_chinese(shipped: list[Path], prompt: str) -> None:
    _, clip, t5, *_ = shipped
    tokenizer = load_tokenizer(T5_TOKENIZER, t5, inspect_t5(t5)[0].vocabulary, None)
    assert tokenizer.unk_token_id not in tokenizer(prompt).input_ids
    tokenizer = load_tokenizer(CLIP_TOKENIZER, clip, inspect_clip(clip)[0].vocabulary, None)
    assert len(tokenizer(prompt).input_ids) <= 77
