"""Little models that see pictures: what they are shown, and their training at toy size."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from majicflux.engine.quant.formats import FLOAT32, uniform
from majicflux.loaders.demo_models import LITTLE_WORLD, WEIGHTS
from majicflux.loaders.diffusers_names import flux_from_diffusers
from majicflux.loaders.flux_dit import load_flux_dit
from majicflux.loaders.safetensors_file import SafetensorsFile
from majicflux.loaders.tensor_sources import sources_of
from majicflux.loaders.tokenizers import CLIP_TOKENIZER, T5_TOKENIZER
from majicflux.tools.little_world import supply as drawing
from majicflux.tools.little_world import train_conditions as training
from majicflux.tools.little_world.depth import depth_map
from majicflux.tools.little_world.edges import edges
from majicflux.tools.little_world.edits import PairShelf, draw_change, instruction
from majicflux.tools.little_world.lessons import LESSONS, Lesson
from majicflux.tools.little_world.lora import CONTROL_RANK
from majicflux.tools.little_world.masks import draw_masks
from majicflux.tools.little_world.models import TOY, LittleFlux
from majicflux.tools.little_world.packing import packed
from majicflux.tools.little_world.painting import paint
from majicflux.tools.little_world.read_back import read_back
from majicflux.tools.little_world.scenes import Scene, draw_scene
from majicflux.tools.little_world.settings import Settings
from majicflux.tools.little_world.supply import Supply
from majicflux.tools.little_world.thin_vae import ThinVAE
from majicflux.tools.little_world.train_conditions import main, train_conditions, unfold
from majicflux.tools.little_world.vocabulary import Words
from majicflux.tools.little_world.workshop import Workshop

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TOY_TRAINING = replace(Settings.quick(seconds=2), workers=1, sheet_steps=1)
HOUSE = Scene("meadow", "day", "summer", "clear", house="white", place="middle", car="red")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """What draws does not wait until a busy machine has nothing else to do; sheets are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "NICENESS", 0)
        patch.setattr(training, "SHOWN", 2)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the folder that ships, of toy size and with random values where new models have zeros."""
    folder = tmp_path_factory.mktemp("source")
    for tokenizer in (CLIP_TOKENIZER, T5_TOKENIZER):
        (folder / tokenizer.folder).symlink_to(LITTLE_WORLD / tokenizer.folder)
    torch.manual_seed(0)
    tensors = {f"vae.{name}": tensor for name, tensor in ThinVAE().tensors().items()}
    for name, tensor in LittleFlux(TOY).state_dict().items():
        tensors[name] = tensor if tensor.any() else torch.randn(tensor.shape) / 20
    save_file(packed(tensors), folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def trained(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_conditions(folder, TOY_TRAINING, [*LESSONS], source)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def lesson(source: Path, tmp_path: Path) -> Callable[[str], Lesson]:
    unfold(source, tmp_path)
    supply = Supply([(64, 64)], [1.0], 1, 1, tmp_path)
    supply.stop()
    return lambda kind: LESSONS[kind](Workshop(tmp_path, TOY_TRAINING, supply))


def drawn(*scenes: Scene) -> Tensor:
    """uint8 [n, 256, 256, 3]"""
    return torch.from_numpy(np.stack([np.asarray(paint(scene, Random(1))) for scene in scenes]))


def test_each_kind_leaves_numbers_and_a_picture(trained: Path) -> None:
    for kind in LESSONS:
        assert (trained / f"{kind}.png").exists()
        for name, tensor in load_file(trained / f"{kind}.safetensors").items():
            assert tensor.dtype == torch.bfloat16
            assert tensor.isfinite().all(), name
    assert not list(trained.glob("*.part"))


@pytest.mark.parametrize(("kind", "channels"), [("fill", 384), ("kontext", 64)])
def test_the_pack_loads_the_transformers(trained: Path, kind: str, channels: int) -> None:
    _, geometry = load_flux_dit(trained / f"{kind}.safetensors", uniform(FLOAT32))
    assert geometry == replace(TOY.dit, in_channels=channels)
    assert geometry.takes_mask == (kind == "fill")


def test_the_lora_is_of_all_layers_and_of_a_further_picture(trained: Path) -> None:
    file, dit = load_file(trained / "depth.safetensors"), LittleFlux(TOY).dit.state_dict()
    for name, tensor in dit.items():
        if name.endswith("_norm.scale"):
            assert file.pop(name).shape == tensor.shape
        elif name.endswith("weight"):
            path, (rows, columns) = name.removesuffix(".weight"), tensor.shape
            wide = 128 if path == "img_in" else columns
            assert file.pop(f"{path}.lora_A.weight").shape == (CONTROL_RANK, wide)
            assert file.pop(f"{path}.lora_B.weight").shape == (rows, CONTROL_RANK)
            assert file.pop(f"{path}.lora_B.bias").shape == (rows,)
    assert not file


def test_the_control_net_is_in_the_names_of_diffusers(trained: Path) -> None:
    path = trained / "controlnet.safetensors"
    sources = sources_of([SafetensorsFile(path)], "")
    beside = {name for name in sources if name.startswith("controlnet_")}
    layers = ("controlnet_x_embedder", "controlnet_blocks.0")
    assert beside == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    theirs = {name: s for name, s in sources.items() if name not in beside}
    ours = {
        name
        for name in LittleFlux(TOY).dit.state_dict()
        if not name.startswith(("single_blocks", "final_layer"))
    }
    assert flux_from_diffusers(theirs).keys() == ours
    assert len(load_file(path)["transformer_blocks.0.attn.to_k.weight"]) == TOY.hidden


@pytest.mark.parametrize("kind", ["fill", "depth", "controlnet"])
def test_a_lesson_begins_with_what_the_model_knows(lesson, kind: str) -> None:
    given = lesson(kind)
    scenes = drawn(HOUSE, replace(HOUSE, time="night"))
    latents, *seen = given.derive(scenes[:, : 64 * given.shelf.at_once, :64])
    ids = torch.randint(400, (2, 64)), torch.randint(400, (2, 77))
    x, one = torch.randn(latents.shape), torch.ones(2)
    found = given.model(x, one, *ids, one, **given.conditions(*seen))
    expected = lesson("kontext").flux(x, one, *ids, one)
    assert expected.std() > 1e-3
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", LESSONS)
def test_a_lesson_teaches_what_a_picture_means(lesson, kind: str) -> None:
    """And neither text encoder, which the file would not have."""
    given = lesson(kind)
    learnt = {name for name, p in given.model.named_parameters() if p.requires_grad}
    optimizers = given.optimizers()
    learnt |= {name for name, p in given.model.named_parameters() if p.requires_grad}
    assert learnt
    assert not [name for name in learnt if "t5" in name or "clip" in name]
    pair = given.shelf.at_once
    latents, *seen = given.derive(drawn(HOUSE, HOUSE)[:, : 64 * pair, :64])
    ids = torch.randint(400, (2, 64)), torch.randint(400, (2, 77))
    x, one = torch.randn(latents.shape), torch.ones(2)
    for _ in range(2):
        found = given.model(x, one, *ids, one, **given.conditions(*seen))
        found.square().mean().backward()
        for optimizer in optimizers:
            optimizer.step(1.0)
    found = given.model(x, one, *ids, one, **given.conditions(*seen))
    other = given.model(x, one, *ids, one, **given.conditions(seen[0] + 1, *seen[1:]))
    assert not torch.allclose(found, other, atol=1e-4)


def test_the_command_trains_the_kinds_that_it_is_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(training, "train_conditions", lambda *given: asked.append(given))
    monkeypatch.setattr(
        "sys.argv", ["train", str(tmp_path), "--kinds", "depth", "fill", "--seconds", "9"]
    )
    main()
    ((folder, settings, kinds),) = asked
    assert (folder, settings.seconds, kinds) == (tmp_path, 9, ["depth", "fill"])


def test_edges_are_those_of_comfyuis_node() -> None:
    kornia = pytest.importorskip("kornia")
    scenes = [draw_scene(Random(seed)) for seed in range(4)]
    pictures = drawn(*scenes)
    _, expected = kornia.filters.canny(pictures.permute(0, 3, 1, 2) / 255, 0.4, 0.8)
    found = edges(pictures)
    assert found.shape == pictures.shape
    assert ((found[..., 0] > 0) != (expected[:, 0] > 0)).float().mean() < 1e-4
    assert 0.005 < expected.mean() < 0.3


def test_a_depth_map_tells_how_near_the_things_of_a_picture_are() -> None:
    picture = np.asarray(paint(HOUSE, Random(3)))
    near = np.asarray(depth_map(HOUSE, Random(3)))
    assert near.shape == picture.shape
    assert (near == near[..., :1]).all(), "grey"
    assert (near[:80] == 0).all(), "the sky"
    white = np.abs(picture.astype(int) - (250, 248, 242)).sum(-1) < 20
    wall = near[120:195, 64:192][white[120:195, 64:192]]
    assert len(wall) > 300
    assert np.ptp(wall) <= 2, "all of a house is as near as its feet"
    assert near[170:190, 128].mean() < near[225:232, 128].mean(), "the road is nearer"


def test_masks_are_of_three_kinds() -> None:
    torch.manual_seed(0)
    masks = draw_masks(200, 48, 80, CPU)
    assert masks.shape == (200, 48, 80)
    share = masks.float().mean((1, 2))
    assert 0.15 < share.mean() < 0.5
    rows, columns = masks.any(2), masks.any(1)
    filled = share * 48 * 80 == rows.sum(1) * columns.sum(1)
    assert 0.2 < filled.float().mean() < 0.7, "rectangles, some of them at an edge"
    around = (
        masks[:, 0].all(1) | masks[:, -1].all(1) | masks[:, :, 0].all(1) | masks[:, :, -1].all(1)
    )
    assert 0.2 < around.float().mean() < 0.45


def test_a_change_is_what_is_asked_for_and_nothing_else() -> None:
    for seed in range(120):
        r = Random(seed)
        scene = draw_scene(r)
        other, phrases = draw_change(scene, r)
        changed = {n for n, value in vars(scene).items() if vars(other)[n] != value}
        assert changed <= {"season", "weather"} or len(changed) <= 1, seed
        assert all(english.isascii() and chinese for english, chinese in phrases)
        assert "{" not in instruction(phrases, r, chinese=seed % 2 == 1)


@pytest.mark.parametrize(
    "change",
    [{"time": "night"}, {"season": "winter"}, {"house": "blue"}, {"car": "green"},
     {"weather": "snow", "season": "winter"}, {"weather": "cloudy"}],
    ids=str,
)  # fmt: skip
def test_the_same_land_lies_under_every_sky(change: dict[str, str]) -> None:
    before, after = (read_back(p.numpy(), "meadow") for p in drawn(HOUSE, replace(HOUSE, **change)))
    assert after == before | change
    pictures = drawn(HOUSE, replace(HOUSE, **change)).float().mean(3)
    roof = [slice(140, 200), slice(90, 166)]
    outlines = [edges(p[None, :, :, None].expand(1, 256, 256, 3).byte()) for p in pictures]
    both = [outline[0, roof[0], roof[1], 0].float() for outline in outlines]
    assert torch.nn.functional.cosine_similarity(*(b.flatten() for b in both), dim=0) > 0.3


def test_a_pair_shelf_has_both_pictures_and_the_words(source: Path) -> None:
    shelf = PairShelf((64, 64), range(3, 6))
    words = Words(source)
    for slot in range(3):
        shelf.draw(slot, words)
    before, after = shelf.pictures[:, :64], shelf.pictures[:, 64:]
    assert shelf.pictures.shape == (3, 128, 64, 3)
    assert all((a != b).any() for a, b in zip(before, after, strict=True))
    assert shelf.t5_ids.any(2).all()
