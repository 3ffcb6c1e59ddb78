"""The training of the little world's models, at toy size."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from majicflux.engine.quant.formats import FLOAT32, uniform
from majicflux.loaders.demo_models import DIT_FILE, unpacked, write_demo_models
from majicflux.loaders.flux_dit import load_flux_dit
from majicflux.tools.little_world import learner as learning
from majicflux.tools.little_world import supply as drawing
from majicflux.tools.little_world.learner import Course, Learner
from majicflux.tools.little_world.lora import RANK, adapt, kohya_tensors
from majicflux.tools.little_world.models import TOY, TRAINED, LittleFlux
from majicflux.tools.little_world.muon import DECAY, AdamW, Muon
from majicflux.tools.little_world.packing import GROUP, packed
from majicflux.tools.little_world.sepia import old_photograph
from majicflux.tools.little_world.settings import Settings
from majicflux.tools.little_world.supply import Gallery, Supply
from majicflux.tools.little_world.train import STAGES, main, stages_to_run, train
from majicflux.tools.little_world.vocabulary import write_tokenizers

pytestmark = pytest.mark.usefixtures("one_thread")
TOY_TRAINING = replace(Settings.quick(seconds=5), workers=1, pictures=15, first=5, sheet_steps=1)


@pytest.fixture(scope="module", autouse=True)
def as_important_as_others() -> Iterator[None]:
    """What draws does not wait until a busy machine has nothing else to do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "NICENESS", 0)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(folder, TOY_TRAINING)
    torch.set_num_threads(threads)
    return folder


def test_each_stage_leaves_a_result_and_most_a_picture(trained: Path) -> None:
    for stage in STAGES:
        assert (trained / stage.result).exists()
        if stage.name != "pack":
            assert (trained / stage.result).with_suffix(".png").exists()
    assert not list(trained.glob("*.part"))


def test_all_results_are_numbers(trained: Path) -> None:
    for stage in STAGES:
        for name, tensor in load_file(trained / stage.result).items():
            assert tensor.isfinite().all(), name


def test_a_second_call_does_nothing(trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    train(trained, TOY_TRAINING)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_the_command_finds_everything_there(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train", str(trained), "--quick", "--seconds", "1"])
    main()
    assert "everything is there" in capsys.readouterr().out


def test_a_deleted_result_is_made_again_and_nothing_before_it(trained: Path) -> None:
    (trained / "sepia_lora.safetensors").unlink()
    kept = trained / "guidance.safetensors"
    before = kept.stat().st_mtime_ns
    assert [stage.name for stage in stages_to_run(trained)] == ["style"]
    train(trained, replace(TOY_TRAINING, seconds=1))
    assert (trained / "sepia_lora.safetensors").exists()
    assert kept.stat().st_mtime_ns == before


def test_a_finished_vae_needs_no_unfinished_one(tmp_path: Path) -> None:
    assert stages_to_run(tmp_path) == STAGES
    (tmp_path / "vae.safetensors").touch()
    assert stages_to_run(tmp_path) == STAGES[2:]


def test_what_ships_is_the_models_within_the_rounding(trained: Path) -> None:
    vae = load_file(trained / "vae.safetensors")
    models = load_file(trained / "guidance.safetensors") | {f"vae.{n}": t for n, t in vae.items()}
    file = load_file(trained / "weights.safetensors")
    found = unpacked(file)
    assert found.keys() == models.keys()
    for name, tensor in models.items():
        step = file.get(f"{name}:scale", tensor.abs().amax() * 2**-11).float().max()
        # A scale in float16 is off by up to 2**-25, and the largest value is 127 times the scale.
        assert (found[name] - tensor).abs().max() <= 1.1 * step + 127 * 2**-25 + 1e-6, name
    # Between the transformer's checkpoint and the end it is there under another name.
    assert load_file(trained / "so_far.safetensors").keys() == file.keys()


def test_demo_models_can_be_written_from_the_folder(trained: Path, tmp_path: Path) -> None:
    write_demo_models(tmp_path, trained)
    _, geometry = load_flux_dit(tmp_path / DIT_FILE, uniform(FLOAT32))
    assert geometry == TOY.dit


def test_packed_matrices_lose_half_a_step() -> None:
    matrix = torch.randn(37, 55)
    file = packed({"matrix": matrix, "vector": matrix[0]})
    assert file["matrix"].dtype == torch.int8
    assert len(file["matrix:scale"]) == math.ceil(matrix.numel() / GROUP)
    assert file["vector"].dtype == torch.float16
    error = (unpacked(file)["matrix"] - matrix).abs()
    assert error.max() <= 0.57 * file["matrix:scale"].max()


def test_the_trained_geometry_ships_in_16_megabytes() -> None:
    with torch.device("meta"):
        model = LittleFlux(TRAINED)
    values = sum(parameter.numel() for parameter in model.parameters())
    assert 1.02 * values + 1.6e6 < 16e6  # the VAE has 1.5 million


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_muon_is_torchs(factor: float) -> None:
    torch.manual_seed(0)
    shapes = [(24, 8), (24, 8), (8, 24), (8, 8)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    muon = Muon(ours, 0.02)
    oracle = torch.optim.Muon(
        theirs, 0.02 * factor, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        muon.step(factor)
        oracle.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=2e-4)  # both are rounded to bfloat16


def test_steps_that_give_no_number_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "LOG_EVERY", 0.0)
    model = nn.Linear(3, 1)
    learner = Learner(model, [AdamW(model.parameters(), 0.1)], 0.9)
    losses = [1.0, math.nan, 1.0]

    def loss_of(progress: float) -> tuple[Tensor, int]:
        return model(torch.ones(1, 3)).sum() * losses[min(learner.steps, 2)], 1

    Course("toy", time.monotonic() + 0.1).run(learner, loss_of, lambda steps, progress: 1.0)
    assert learner.steps > 2
    assert learner.healthy()
    assert all(tensor.isfinite().all() for tensor in [*learner.average, *learner.parameters])


def test_a_training_goes_on_where_it_was(tmp_path: Path) -> None:
    learner = Learner(model := nn.Linear(3, 1), [AdamW(model.parameters(), 0.1)], 0.9)
    learner.step(model(torch.ones(1, 3)).sum(), 1.0)
    learner.save(tmp_path / "checkpoint", 0.25)
    later = Learner(other := nn.Linear(3, 1), [AdamW(other.parameters(), 0.1)], 0.9)
    assert later.resume(tmp_path / "absent") == 0
    assert later.resume(tmp_path / "checkpoint") == 0.25
    assert later.steps == 1
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(later.averaged()["bias"], learner.averaged()["bias"])


def test_a_scene_that_cannot_be_drawn_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint = drawing.paint

    def paint_some(scene, r, width, height):
        if r.random() < 0.5:
            raise ValueError("a scene too many")
        return paint(scene, r, width, height)

    monkeypatch.setattr(drawing, "paint", paint_some)
    write_tokenizers(tmp_path)
    supply = Supply([(64, 64)], [1.0], 12, 2, tmp_path)
    supply.wait(12, 60)
    gallery = Gallery(supply, torch.device("cpu"), lambda pictures: (pictures,))
    gallery.refill_all()
    supply.stop()
    assert 0 < gallery.have < 12
    (pictures,), t5_ids, clip_ids = gallery.batch(5)
    assert pictures.shape == (5, 64, 64, 3)
    assert (t5_ids.shape, clip_ids.shape) == ((5, 64), (5, 77))
    assert pictures.float().std() > 1


def test_the_adapter_is_in_kohyas_dialect_and_begins_as_nothing() -> None:
    model = LittleFlux(TOY)
    x, pooled, one = torch.randn(1, 16, 4, 4), torch.randn(1, TOY.clip.width), torch.ones(1)
    text = torch.randn(1, 3, TOY.t5.width)
    before = model.dit(x, one, text, pooled, one)
    tensors = kohya_tensors(adapt(model.dit))
    assert torch.equal(model.dit(x, one, text, pooled, one), before)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    assert tensors[f"{name}.lora_down.weight"].shape == (RANK, TOY.hidden)
    assert tensors[f"{name}.lora_up.weight"].shape == (3 * TOY.hidden, RANK)
    assert tensors[f"{name}.alpha"] == RANK
    trained = {name for name, p in model.dit.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_the_adapter_of_the_trained_geometry_is_small() -> None:
    tensors = kohya_tensors(adapt(LittleFlux(TRAINED).dit))
    assert sum(tensor.nbytes + 150 for tensor in tensors.values()) < 300_000


def test_an_old_photograph_is_brown_and_keeps_the_scene() -> None:
    picture = torch.zeros(1, 32, 48, 3, dtype=torch.uint8)
    picture[:, :, :24] = torch.tensor([30, 60, 200], dtype=torch.uint8)
    picture[:, :, 24:] = torch.tensor([200, 200, 220], dtype=torch.uint8)
    found = old_photograph(picture).float()
    red, green, blue = found.unbind(-1)
    assert (red > green).all()
    assert (green > blue).all()
    assert found.amax() < 255  # nothing is cut off
    assert (red[0, :, 23] + 30 < red[0, :, 24]).all()  # the edge is where it was
    assert red[0, 0, 0] < red[0, 16, 0] < red[0, 16, 23]  # and corners are dark
