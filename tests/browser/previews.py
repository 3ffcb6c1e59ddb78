"""The previews of the templates: `python tests/browser/previews.py [name ...]`. Set COMFYUI_PATH.

Each template is opened, run with the demo models at the size that they know, and photographed. The
name `help` stands for the pictures of the help pages, which ComfyUI paints too. Needs what the
browser tests need, and for templates with models that see pictures CONDITION_MODELS, the folder
of `tools/little_world/train_conditions.py`; without it they are left out.
"""

import os
import re
import shutil
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from random import Random

import torch
from PIL import Image, ImageChops, ImageDraw
from playwright.sync_api import Browser, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))
from browser.conftest import FLAGS, READY
from browser.test_canvas import (
    ALL_SHOWN,
    BOXES,
    NAMES,
    WORKFLOWS,
    made_small,
    read,
)
from browser.test_screens import DONE, outputs
from picture_models import redux_layout, vision_layout, write_files
from translators import write_marian

from comfyui_server import Server
from majicflux.benchmarks.flux_graphs import Graph, ours
from majicflux.benchmarks.random_models import random_tensors
from majicflux.downloads.catalogue import REDUX, SIGCLIP, TRANSLATION, TRANSLATOR
from majicflux.loaders.demo_models import T5_FILE, write_demo_models
from majicflux.loaders.text_encoders import inspect_t5
from majicflux.messages import speak
from majicflux.tools.little_world.depth import depth_map
from majicflux.tools.little_world.painting import paint
from majicflux.tools.little_world.scenes import Scene
from majicflux.workflows.build import CITY, CITY_IN_CHINESE

PAINTED = {  # as the demo models can
    "steps": 20, "width": 256, "height": 256, "cell_width": 256, "cell_height": 256,
    "guidance": 3.5,
}  # fmt: skip
PAINTED_HERE = {  # prompts of the little world, where the template's own is of another
    "image_to_image": {
        "prompt": "a white house in the middle, a red car, two pine trees, night, winter",
        "strength": 0.9,
    },
    "inpainting": {
        "prompt": "a purple house in the middle, a red car, two pine trees, a sunny day, summer",
        "strength": 1.0,
    },
    "fill_inpainting": {
        "prompt": "a purple house in the middle, a red car, two pine trees, a sunny day, summer",
    },
    "fill_outpainting": {
        "prompt": "a white house in the middle, a red car, two pine trees, a sunny day, summer",
        "left": 64, "top": 0, "right": 64, "bottom": 0,
    },
    "kontext_edit": {"prompt": "make it winter, falling snow"},
    "redux_variation": {
        "prompt": "a white house in the middle, a red car, two pine trees, a sunny day, summer",
    },
    "depth_control_lora": {
        "prompt": "a blue house in the middle, a yellow car, two pine trees, night, winter",
    },
    "controlnet_union_canny": {
        "prompt": "an orange house in the middle, a green car, two pine trees, sunset, autumn",
    },
}  # fmt: skip
SEEING = {  # templates with a model that sees pictures: its kind, and the node that loads it
    "fill_inpainting": ("fill", "MajicFluxDiTLoader"),
    "fill_outpainting": ("fill", "MajicFluxDiTLoader"),
    "kontext_edit": ("kontext", "MajicFluxDiTLoader"),
    "depth_control_lora": ("depth", "MajicFluxLoRA"),
    "controlnet_union_canny": ("controlnet", "MajicFluxControlNet"),
}
FOLDERS = {
    "MajicFluxDiTLoader": "diffusion_models",
    "MajicFluxLoRA": "loras",
    "MajicFluxControlNet": "controlnet",
}
MIDDLE = (64, 0, 192, 256)  # of a picture that is painted further to its sides
GIVEN = Scene(
    "meadow", "day", "summer", "clear", house="white", place="middle", car="red", trees=2,
    tree="pine",
)  # fmt: skip
HOUSE = (70, 110, 186, 215)  # and around it
EDGE, MARGIN, TOP, SCALE = 40, 100, 150, 0.8
DOCS = Path(__file__).parents[2] / "web" / "docs"
PLANNED_GB = 8.0  # as in a_real_plan
SIDE, SEED, STEPS = 256, 7, 20  # of the pictures of the help pages
SCENE = "a yellow house on the left, a blue car, three pine trees, mountains, a sunny day, summer"
OTHER = (
    "a yellow house on the left, a blue car, three pine trees, mountains, night, winter, snowing"
)
TIMES_BRIGHTER = 8  # what differences between precisions are shown
SIZE = (1200, 1000)  # of the pictures, at most
SHOW = """([left, top, scale, x, y]) => {
    app.canvas.deselectAll();
    Object.assign(app.canvas.ds, { scale, offset: [x / scale - left, y / scale - top] });
    app.canvas.setDirty(true, true); }"""


def main() -> None:
    base = Path(tempfile.mkdtemp())
    write_demo_models(base / "models")
    put_silent_redux(base / "models")
    seeing = put_models_that_see(base / "models")
    clauses = zip(CITY_IN_CHINESE.split(","), CITY.split(", "), strict=True)
    documented = {chinese.strip("。"): english for chinese, english in clauses}
    write_marian(base / "models" / TRANSLATION / TRANSLATOR, documented)
    server = Server(Path(os.environ["COMFYUI_PATH"]), base / "comfyui", base / "models")
    try:
        with sync_playwright() as playwright:
            chromium = shutil.which("chromium") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
            for name in sys.argv[1:] or [*NAMES, "help"]:
                if name in SEEING and name not in seeing:
                    continue
                if name == "help":
                    for language, locale in (("en", "en-US"), ("zh", "zh-CN")):
                        speak(lambda language=language: language)
                        server.post("/free", {"unload_models": True, "free_memory": True})
                        page = opened(browser, server, locale)
                        photograph_plan(page, DOCS / "MajicFluxPipeline" / f"{language}.png")
                        page.close()
                        server.forget_settings()
                    show_precisions(server, DOCS / "MajicFluxDiTLoader" / "precisions.jpg")
                    show_strengths(server, DOCS / "MajicFluxSample" / "strengths.jpg")
                    continue
                example(name).save(server.base / "input" / "example.png")
                server.post("/free", {"unload_models": True, "free_memory": True})
                page = opened(browser, server)
                photograph(page, name)
                page.close()
    finally:
        server.stop()
        shutil.rmtree(base)


def put_models_that_see(models: Path) -> list[str]:
    """Under the names that the templates have for the real ones; returns whose model is there."""
    trained, found = os.environ.get("CONDITION_MODELS"), []
    for name in SEEING.keys() & set(NAMES) if trained else ():
        kind, loader = SEEING[name]
        graph = read(WORKFLOWS / "api" / f"{name}.json").values()
        (file,) = (n["inputs"]["file"] for n in graph if n["class_type"] == loader)
        source = Path(trained, f"{kind}.safetensors")
        if source.exists():
            (models / FOLDERS[loader]).mkdir(exist_ok=True)
            shutil.copyfile(source, models / FOLDERS[loader] / file)
            found.append(name)
    return found


def put_silent_redux(models: Path) -> None:
    """Redux that sees with random weights and says nothing: the prompt alone paints. To see as the
    real one does is more than the demo models can learn in a few minutes."""
    width = inspect_t5(models / T5_FILE)[0].width
    silent = {name: torch.zeros(shape) for name, shape in redux_layout(width).items()}
    write_files(models, {SIGCLIP: random_tensors(vision_layout(), 0, torch.float32), REDUX: silent})


def example(name: str) -> Image.Image:
    """The picture that this template begins with."""
    draw = depth_map if name == "depth_control_lora" else paint
    picture = draw(GIVEN, Random(0)).convert("RGBA")
    if name == "fill_outpainting":
        return picture.crop(MIDDLE)
    if name in ("inpainting", "fill_inpainting"):
        hole = Image.new("L", picture.size, 255)
        ImageDraw.Draw(hole).rectangle(HOUSE, fill=0)
        picture.putalpha(hole)
    return picture


def opened(browser: Browser, server: Server, locale: str = "en-US") -> Page:
    page = browser.new_page(viewport={"width": 2400, "height": 2400}, locale=locale)
    page.goto(f"http://{server.address}")
    page.wait_for_function(READY, timeout=60_000)
    page.evaluate("app.registerNodes()")  # in its language, which a first visit may come before
    return page


def photograph_plan(page: Page, path: Path) -> None:
    """The pipeline node with the plan of a card that this machine need not have."""
    workflow = made_small()
    (node,) = (node for node in workflow["nodes"] if node["type"] == "MajicFluxPipeline")
    node["widgets_values"][0] = PLANNED_GB
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.get_by_role("button", name=re.compile("Run|运行")).first.click()
    page.wait_for_function(ALL_SHOWN, timeout=60_000)
    page.evaluate(DONE, {"MajicFluxPipeline": outputs(None, None)["MajicFluxPipeline"]})
    left, top, right, bottom = dict(page.evaluate(BOXES))["MajicFluxPipeline"]
    page.evaluate(SHOW, [left, top, 1, MARGIN, TOP])
    page.wait_for_timeout(1000)
    clip = {"x": MARGIN, "y": TOP, "width": right - left, "height": bottom - top}
    Image.open(BytesIO(page.screenshot(clip=clip))).convert("RGB").save(path, optimize=True)


def show_precisions(server: Server, path: Path) -> None:
    """One picture in full precision, float8, rotated int8 and plain float8; below, how far the last
    three are from the first."""
    graph = ours(SEED, STEPS, SIDE, prompt=SCENE)
    pictures = []
    for precision in ("bfloat16", "float8_e4m3fn", "int8 rotated", "float8_e4m3fn unscaled"):
        graph["1"]["inputs"]["weight_precision"] = precision
        pictures.append(painted(server, graph))
    away = [
        ImageChops.difference(pictures[0], other).point(lambda v: min(255, TIMES_BRIGHTER * v))
        for other in pictures
    ]
    side_by_side([pictures, away], path)


def show_strengths(server: Server, path: Path) -> None:
    """A picture, and what another prompt makes of it with more and more strength."""
    before = painted(server, ours(SEED, STEPS, SIDE, prompt=SCENE))
    before.save(server.base / "input" / "before.png")
    pictures = [before]
    for strength in (0.3, 0.6, 0.8, 0.95):
        graph = ours(SEED, STEPS, SIDE, prompt=OTHER, image=["7", 0], strength=strength)
        graph["7"] = {"class_type": "LoadImage", "inputs": {"image": "before.png"}}
        pictures.append(painted(server, graph))
    side_by_side([pictures], path)


def painted(server: Server, graph: Graph) -> Image.Image:
    (path,) = server.outputs(server.run(graph))
    return Image.open(path).convert("RGB")


def side_by_side(rows: list[list[Image.Image]], path: Path) -> None:
    sheet = Image.new("RGB", (SIDE * len(rows[0]), SIDE * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (SIDE * x, SIDE * y))
    sheet.thumbnail(SIZE, Image.Resampling.LANCZOS)
    sheet.save(path, quality=85, optimize=True)


def photograph(page: Page, name: str) -> None:
    workflow = made_small(name, PAINTED | PAINTED_HERE.get(name, {}))
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.get_by_role("button", name="Run").first.click()
    page.wait_for_function(ALL_SHOWN, timeout=300_000)
    boxes = [box for _, box in page.evaluate(BOXES)]
    left, top = (min(box[side] for box in boxes) - EDGE for side in (0, 1))
    right, bottom = (max(box[side] for box in boxes) + EDGE for side in (2, 3))
    page.evaluate(SHOW, [left, top, SCALE, MARGIN, TOP])
    page.wait_for_timeout(8000)  # until the messages about the run have gone
    clip = {
        "x": MARGIN,
        "y": TOP,
        "width": (right - left) * SCALE,
        "height": (bottom - top) * SCALE,
    }
    picture = Image.open(BytesIO(page.screenshot(clip=clip))).convert("RGB")
    picture.thumbnail(SIZE, Image.Resampling.LANCZOS)
    picture.save(WORKFLOWS / f"{name}.jpg", quality=85, optimize=True)


if __name__ == "__main__":
    main()
