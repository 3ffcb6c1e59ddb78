"""The little world: what is drawn can be read back, and captions say what is there."""

import random
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from majicflux.loaders.tokenizers import CLIP_TOKENIZER, T5_TOKENIZER, load_tokenizer
from majicflux.tools.little_world import captions, scenes, vocabulary
from majicflux.tools.little_world.captions import caption
from majicflux.tools.little_world.meadow import HALF_HOUSE, tree_places
from majicflux.tools.little_world.painting import paint
from majicflux.tools.little_world.read_back import read_back
from majicflux.tools.little_world.scenes import Scene, draw_scene

SIZES = ((256, 256), (320, 192), (192, 320))
PUBLISHED = (
    "赛博朋克风格的未来城市街道，雨夜，蓝色和粉色的霓虹灯光反射在湿漉漉的地面上，头顶有飞行汽车，高科技氛围，细节丰富，电影感宽幅画面。",
    "赛博朋克风格的未来城市街道,雨夜,蓝色和粉色的霓虹灯光反射在湿漉漉的地面上,头顶有飞行汽车,高科技氛围,细节丰富,电影感宽幅画面。",
    "A futuristic cyberpunk city street, rainy night, blue and pink neon lights reflected on the "
    "wet ground, flying cars overhead, high-tech atmosphere, rich details, cinematic wide shot.",
)


def drawn(seed: int, size: tuple[int, int] = (256, 256)) -> tuple[Scene, Image.Image]:
    r = random.Random(seed)
    scene = draw_scene(r)
    return scene, paint(scene, r, *size)


def as_if_painted(picture: Image.Image, seed: int) -> np.ndarray:
    """A little blurred and noisy, as a model paints."""
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.7))).astype(float)
    noise = np.random.default_rng(seed).normal(0, 6, soft.shape)
    return (soft + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    vocabulary.write_tokenizers(folder)
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_every_scene_can_be_painted_at_every_size(size: tuple[int, int]) -> None:
    for seed in range(60):
        assert drawn(seed, size)[1].size == size


def test_the_same_seed_is_the_same_picture() -> None:
    for seed in range(6):
        assert drawn(seed)[1].tobytes() == drawn(seed)[1].tobytes()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("softly", [False, True], ids=["as drawn", "as painted"])
def test_attributes_are_read_back(size: tuple[int, int], softly: bool) -> None:
    right: dict[str, list[bool]] = defaultdict(list)
    for seed in range(1000, 1060):
        scene, picture = drawn(seed, size)
        pixels = as_if_painted(picture, seed) if softly else np.asarray(picture)
        for name, found in read_back(pixels, scene.kind).items():
            shown = getattr(scene, name)
            right[name].append(found == (frozenset(shown) if name == "neon" else shown))
    assert set(right) >= {"time", "season", "neon", "flying_cars", "house", "place", "car"}
    assert set(right) >= {"trees", "boats", "sails", "weather"}
    for name, results in right.items():
        assert len(results) > 10
        assert results.count(False) <= len(results) // 40, name


def test_a_picture_of_nothing_shows_no_things() -> None:
    nothing = np.full((256, 256, 3), (108, 110, 122), np.uint8)  # a road
    found = read_back(nothing, "meadow") | read_back(nothing, "sea") | read_back(nothing, "city")
    assert {found[name] for name in ("house", "car", "sails")} == {""}
    assert [found[name] for name in ("trees", "boats", "flying_cars")] == [0, 0, 0]


@pytest.mark.parametrize(("width", "unit"), [(256, 1), (192, 0.75), (320, 0.8625)])
def test_there_is_room_for_four_trees_beside_any_house(width: int, unit: float) -> None:
    half = HALF_HOUSE * unit
    for house in (half + 2 * unit, half + 6 * unit, width / 2 - 3 * unit, width / 2 + 3 * unit):
        slots = tree_places(house, width, unit)
        assert len(slots) >= scenes.MOST
        assert all(abs(slot - house) > half + 17 * unit for slot in slots)
        assert min(slots) > 18 * unit
        assert max(slots) < width - 18 * unit


def test_every_kind_of_scene_is_drawn() -> None:
    drawn_scenes = [draw_scene(random.Random(seed)) for seed in range(3000)]
    for name, values in {
        "kind": {"city", "meadow", "sea"},
        "time": set(scenes.TIMES),
        "season": set(scenes.SEASONS),
        "weather": set(scenes.WEATHERS),
        "house": {"", *scenes.COLOURS},
        "place": {"", *scenes.PLACES},
        "car": {"", *scenes.COLOURS},
        "sails": {"", *scenes.COLOURS},
        "trees": {0, 1, 2, 3, 4},
        "flying_cars": {0, 1, 2, 3, 4},
        "boats": {0, 1, 2, 3, 4},
    }.items():
        assert {getattr(scene, name) for scene in drawn_scenes} == values


@pytest.mark.parametrize("whole", [False, True])
def test_a_caption_says_only_what_is_there(whole: bool) -> None:
    numbers = {"no": 0, "a": 1, "one": 1, "1": 1, "two": 2, "2": 2, "three": 3, "3": 3}
    numbers |= {"four": 4, "4": 4}
    for seed in range(3000):
        r = random.Random(seed)
        scene = draw_scene(r)
        text = (
            caption(scene, r, chinese=False, whole=whole).lower().replace("an orange", "a orange")
        )
        words = set(re.findall(r"[a-z-]+", text))
        colours = {scene.house, scene.car, scene.sails, *scene.neon}
        if scene.light == "sun" and scene.time == "sunset":
            colours.add("orange")  # the sun itself
        if scene.season == "summer":
            colours.add("green")  # hills
        if scene.weather == "cloudy":
            colours.add("white")  # clouds
        if (scene.time, scene.weather) == ("day", "clear"):
            colours.add("blue")  # the sky
        assert words & set(captions.COLOURS) <= colours, text
        assert not (words & {"night", "moon", "stars"} and scene.time != "night"), text
        assert not (words & {"rain", "rainy", "raining", "wet"} and scene.weather != "rain"), text
        assert not (words & {"snow", "snowy", "winter"} and scene.season != "winter") or (
            scene.mountains and "snowy mountains" in text
        ), text
        assert "mountain" not in text or scene.mountains
        assert ("lighthouse" in words) <= (scene.lighthouse or "no lighthouse" in text)
        for count, noun, number in (
            (r"(\w+) (?:\w+ )?(?:flying (?:car|vehicle)|hover car)", "", scene.flying_cars),
            (r"(\w+) (?:\w+ )?(?:boat|sailboat|sailing boat)s?\b", "", scene.boats),
            (r"(\w+) (?:(?:pine|fir|round|leafy) )?trees?\b", "", scene.trees),
        ):
            for found in re.findall(count + noun, text):
                assert numbers.get(found, number) == number, text


def test_every_phrase_has_as_many_colours_in_both_languages() -> None:
    for seed in range(2000):
        r = random.Random(seed)
        for english, chinese in captions.phrases(draw_scene(r), r):
            for name in ("purple", "pink", "red"):
                word = captions.COLOURS[name][0]
                assert len(re.findall(rf"\b{name}\b", english)) == chinese.count(word), english


def test_the_published_prompts_are_of_known_words(folder: Path) -> None:
    words = vocabulary.Words(folder)
    for prompt in PUBLISHED:
        ids, _ = words(prompt)
        assert vocabulary.UNKNOWN not in ids
        assert ids.index(vocabulary.END) < 45


def test_captions_fit_and_are_of_known_words(folder: Path) -> None:
    words = vocabulary.Words(folder)
    for seed in range(1500):
        r = random.Random(seed)
        text = caption(draw_scene(r), r, chinese=seed % 2 == 1, whole=seed % 3 == 0)
        ids = words.t5(text, add_special_tokens=False).input_ids
        assert len(ids) <= 62
        assert (vocabulary.UNKNOWN in ids) <= any(sign in text for sign in captions.SIGNS)


def test_what_nobody_knows_is_spelled_or_unknown(folder: Path) -> None:
    words = vocabulary.Words(folder)
    spelled, _ = words("an elephant")
    assert vocabulary.UNKNOWN not in spelled
    assert words("大象")[0].count(vocabulary.UNKNOWN) == 1


def test_the_pack_reads_the_same_ids(folder: Path) -> None:
    words = vocabulary.Words(folder)
    model = folder / "model.safetensors"
    clip = load_tokenizer(CLIP_TOKENIZER, model, vocabulary.CLIP_ROWS, None)
    t5 = load_tokenizer(T5_TOKENIZER, model, vocabulary.T5_ROWS, None)
    for prompt in (*PUBLISHED, "a red house", ""):
        t5_ids, clip_ids = words(prompt)
        assert len(t5_ids) == vocabulary.T5_LENGTH
        assert len(clip_ids) == vocabulary.CLIP_LENGTH
        end = t5_ids.index(vocabulary.END) + 1
        assert t5(prompt).input_ids == t5_ids[:end]
        padded = clip(prompt, padding="max_length", truncation=True, max_length=77).input_ids
        assert padded == clip_ids


def test_tokenizers_are_the_same_at_every_call(folder: Path, tmp_path: Path) -> None:
    vocabulary.write_tokenizers(tmp_path)
    for path in folder.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes()
