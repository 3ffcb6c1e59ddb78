"""What `majicflux compare` plans, paints and keeps, and does after it was killed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from file_layouts import scaled
from majicflux.batch.comparison import ComparedBatch, as_settings
from majicflux.batch.manifest import NAME
from majicflux.batch.process import WorkerProcess
from majicflux.batch.worker import Painter
from majicflux.cli import main
from majicflux.commands.compare import PUBLISHED_PRECISIONS, PUBLISHED_SEEDS, seeds
from majicflux.engine.run import pipeline
from majicflux.host import standalone
from majicflux.lab import comparison as lab
from majicflux.lab.picture_metrics import CHANGED_BELOW, SMALLEST_SIDE_OF_SSIMULACRA2
from majicflux.lab.report_page import MOST_SHOWN
from majicflux.loaders import demo_models

pytest.importorskip("flip_evaluator")  # which has no build for Python 3.14
API = Path(__file__).parents[2] / "workflows" / "api"
SMALL = {"width": 64, "height": 64, "steps": 2}
SOUND, ROUNDED, WRONG = "sound", "rounded", "wrong"  # transformers, the last with a defect
DEFECT = "double_blocks.1.img_mlp.0.weight_scale"
TIMES = 2.0  # of what it should be


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return written_graph(tmp_path)


def written_graph(folder: Path, **inputs: object) -> Path:
    nodes = json.loads((API / "text_to_image.json").read_text(encoding="utf-8"))
    nodes["5"]["inputs"] |= {**SMALL, **inputs}
    path = folder / "graph.json"
    path.write_text(json.dumps(nodes), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy models, their transformer in float8: with scales, rounded once more, and with the
    scale of one block's matrix wrong."""
    folder = tmp_path_factory.mktemp("toys")
    demo_models.write_demo_models(folder)
    names = load_file(folder / demo_models.DIT_FILE)
    tensors = {name.removeprefix("model.diffusion_model."): t for name, t in names.items()}
    sound = scaled(tensors, "new", per_row=True)
    files = {
        SOUND: sound,
        ROUNDED: scaled(tensors, "new", per_row=False),
        WRONG: {**sound, DEFECT: sound[DEFECT] * TIMES},
    }
    for name, content in files.items():
        save_file(content, folder / f"diffusion_models/{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def killed_once(
    toys: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str], str]:
    """A folder with a report, the command that made it, and what it said: it was killed after the
    first picture, and called again."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "prompts.txt").write_text("a red house by day\na boat on the sea at night\n")
    files = ",".join(f"{name}.safetensors" for name in (SOUND, ROUNDED, WRONG))
    arguments = [
        "compare", "--graph", str(written_graph(folder)), "--vary", f"1.file={files}",
        "--prompts", str(folder / "prompts.txt"), "--seeds", "7", "--out", str(folder / "out"),
        "--models", str(toys), "--workers", "1",
    ]  # fmt: skip
    command = [sys.executable, "-m", "majicflux.cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    next(line for line in process.stdout if ".png: " in line)
    process.kill()
    process.communicate()
    assert not (folder / "out/report.html").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return folder / "out", arguments, done.stdout


def test_a_killed_command_goes_on_where_it_was(killed_once: tuple[Path, list[str], str]) -> None:
    folder, _, said = killed_once
    known = re.match(r"(\d) of 6 were done before\.", said)
    assert known, said
    lines = said.splitlines()
    assert len([line for line in lines if ".png: " in line]) == 6 - int(known[1])
    assert [Path(line).name for line in lines[-3:]] == ["report.json", "report.md", "report.html"]
    records = [json.loads(line) for line in (folder / "pictures" / NAME).read_text().splitlines()]
    assert len({record["id"] for record in records}) == len(records) == 6
    assert not [path for path in folder.rglob("*") if path.suffix == ".part"]


def test_the_same_command_again_paints_and_measures_nothing(
    killed_once: tuple[Path, list[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, arguments, _ = killed_once
    before = json.loads((folder / "report.json").read_text(encoding="utf-8"))

    def never(*given: object) -> None:
        raise AssertionError

    monkeypatch.setattr(WorkerProcess, "paint", never)
    monkeypatch.setattr(lab, "compare_pictures", never)
    assert main(arguments) == 0
    again = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert {**again, "machine": None} == {**before, "machine": None}  # its free memory has changed


def test_a_wrong_scale_in_one_block_heads_the_worst_cases(
    killed_once: tuple[Path, list[str], str],
) -> None:
    folder, _, _ = killed_once
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert [name.partition("_")[0] for name in report["worst"]] == [WRONG, WRONG, ROUNDED, ROUNDED]
    wrong, rounded = (report["settings"][f"{n}.safetensors"] for n in (WRONG, ROUNDED))
    assert wrong["latents"]["mean"] > 1.5 * rounded["latents"]["mean"] > 0
    assert wrong["flip"]["mean"] > 2 * rounded["flip"]["mean"] > 0
    assert report["worst"][0] == wrong["flip"]["worst_id"]
    assert len(wrong["latents_by_step"]) == SMALL["steps"]
    for pair in report["pairs"]:
        pixels = [
            np.asarray(Image.open(folder / "pictures" / pair[name]).convert("RGB"), np.float64)
            for name in ("reference", "picture")
        ]
        squared = ((pixels[0] - pixels[1]) ** 2).mean()
        assert pair["values"]["psnr"] == pytest.approx(10 * np.log10(255**2 / squared), abs=0.01)


def test_the_latents_that_are_kept_are_those_that_are_decoded(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    painted = []

    def paint(*given: object, **named: object):
        painted.append(original(*given, **named))
        return painted[-1]

    original = pipeline.paint
    monkeypatch.setattr(pipeline, "paint", paint)
    monkeypatch.setattr(standalone, "models_folder", models)
    monkeypatch.setattr(standalone, "on_latents", None)
    setup = {"models": models, "input": ".", "output": tmp_path, "parts": tmp_path, "shared": 1}
    painter = Painter({**setup, "latents": True})
    answer = painter.paint("a", json.loads(written_graph(tmp_path, steps=3).read_text()))
    assert [*answer["latents"]] == ["a.latents.safetensors"]
    steps = load_file(tmp_path / "a.latents.safetensors")
    assert [*steps] == ["000", "001", "002"]
    assert torch.equal(steps["002"], painted[0][1].half())
    assert not torch.equal(steps["000"], steps["002"])


# What is wrong with a command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Give the workflow by --graph, or --preset published."),
        (["--graph=G"], "At least two settings are compared: give each input that varies"),
        (["--graph=G", "--precision=bfloat16"], "At least two settings are compared"),
        (["--graph=G", "--vary=cfg=1,2", "--vary=5.steps=1,2,3"], "as many values, two or more"),
        (["--graph=G", "--vary=cfg=1,1"], "Two settings are the same: 1; 1"),
        (["--graph=G", "--vary=cfg"], "--vary cfg: give NODE.INPUT=A,B"),
        (["--graph=G", "--vary=5.cgf=1,2"], "5.cgf is no input of the graph that can be set"),
        (["--graph=G", "--vary=pipeline=1,2"], "pipeline is no input of the graph"),
        (["--graph=G", "--vary=cfg=1,x"], "cfg must be a number, not 'x'."),
        (["--graph=G", "--precision=bfloat16,float9"], "weight_precision must be one of: float8"),
        (["--graph=G", "--vary=1.file=majicflus_v134.safetensors,b"], "b is not in models/"),
        (["--graph=G", "--vary=cfg=1,2", "--set=nope=1"], "--set nope=1: give NODE.INPUT=VALUE"),
        (["--graph=G", "--vary=cfg=1,2", "--vary=cfg=3,4"], "cfg is given twice."),
        (["--graph=G", "--vary=cfg=1,2", "--vary=5.cfg=3,4"], "5.cfg is given twice."),
        (
            ["--graph=G", "--precision=bfloat16,int8", "--vary=1.weight_precision=bfloat16,int8"],
            "1.weight_precision is given twice.",
        ),
        (["--graph=G", "--vary=seed=1,2"], "5.seed is given twice. Seeds are given by --seeds"),
        (["--graph=G", "--vary=cfg=1,2", "--prompts=ROWS"], "5.seed is given twice."),
        (["--graph=TWO", "--precision=a,b"], "has 3 loaders of a transformer, not one: say which"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_painted(
    arguments: list[str],
    said: str,
    graph: Path,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    two = API / "compare_precisions.json"
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,seed\na cat,3\n")
    files = {"G": graph, "TWO": two, "ROWS": rows}
    given = [re.sub("=(G|TWO|ROWS)$", lambda m: f"={files[m[1]]}", a) for a in arguments]
    out = tmp_path / "out"
    assert main(["compare", *given, "--out", str(out), "--models", str(models)]) == 1
    assert said in capsys.readouterr().err
    assert not [*out.glob("*/*.png")]


def test_seeds_are_ranges_and_numbers() -> None:
    assert seeds("0..3") == [0, 1, 2, 3]
    assert seeds("5,2..3,5") == [5, 2, 3]
    for wrong in ("", "3..1", "a", "-1", "0..", "0..5000"):
        with pytest.raises(Exception, match=r"give seeds such as|at most 1000 seeds"):
            seeds(wrong)


def planned(models: Path, *given: object, **named: object) -> ComparedBatch:
    compared = ComparedBatch(*given, models=models, workers=1, **named)
    compared.batch._manifest.close()
    return compared


def test_every_setting_prompt_and_seed_is_painted_and_models_change_seldom(
    graph: Path, models: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_text("id,prompt,guidance\ncat,a cat,\ndog,a dog,4\n")
    settings = as_settings(["weight_precision=bfloat16,int8 rotated", "cfg=1,2"])
    jobs = planned(models, graph, tmp_path / "out", settings, [3, 5], tmp_path / "rows.csv").batch
    assert [job.id for job in jobs.jobs] == [
        f"{name}-p{row}-s{seed}"
        for name in ("bfloat16_1", "int8_rotated_2") for row in ("cat", "dog") for seed in (3, 5)
    ]  # fmt: skip
    last = jobs.jobs[-1].graph(graph.read_text(), jobs._classes)
    assert last["1"]["inputs"]["weight_precision"] == "int8 rotated"
    assert {n: last["5"]["inputs"][n] for n in ("prompt", "seed", "guidance", "cfg")} == {
        "prompt": "a dog", "seed": 5, "guidance": 4.0, "cfg": 2.0,
    }  # fmt: skip


def test_settings_whose_names_are_alike_have_files_of_their_own(
    graph: Path, models: Path, tmp_path: Path
) -> None:
    long = "a long description " * 5
    settings = as_settings([f"prompt=-1,1,{long}by day,{long}by night"])
    jobs = planned(models, graph, tmp_path / "out", settings, [0]).batch.jobs
    assert len({job.id.casefold() for job in jobs}) == 4
    assert all(re.fullmatch(r"\w{1,50}-p0-s0", job.id) for job in jobs)


def test_the_published_comparison_is_one_command(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []

    def paint(worker: WorkerProcess, id: str, graph: dict, coming: object) -> dict:
        asked.append(graph)
        return {"problem": "no card", "fatal": False}

    monkeypatch.setattr(WorkerProcess, "start", lambda _: True)
    monkeypatch.setattr(WorkerProcess, "paint", paint)
    given = ["--out", str(tmp_path), "--models", str(models), "--workers", "1"]
    assert main(["compare", "--preset", "published", *given]) == 1
    assert "No pictures could be compared. no card" in capsys.readouterr().err
    assert len(asked) == 4 * 11
    assert {graph["5"]["inputs"]["steps"] for graph in asked} == {20}
    assert len({graph["5"]["inputs"]["prompt"] for graph in asked}) == 1
    assert [graph["5"]["inputs"]["seed"] for graph in asked[:11]] == PUBLISHED_SEEDS
    assert PUBLISHED_SEEDS[0] == 0
    assert len(set(PUBLISHED_SEEDS)) == 11
    assert [*dict.fromkeys(graph["1"]["inputs"]["weight_precision"] for graph in asked)] == [
        "bfloat16", "float8_e4m3fn unscaled", "float8_e4m3fn", "int8 rotated",
    ]  # fmt: skip


def test_what_could_not_be_painted_is_a_failure_of_its_pairs(
    graph: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def paint(worker: WorkerProcess, id: str, graph: dict, coming: object) -> dict:
        if id in ("1-p0-s0", "2-p0-s1"):
            return {"problem": "no memory", "fatal": False}
        names = [f"{id}.png", f"{id}.2.png"]  # of a batch of two
        for name in names:
            Image.new("RGB", (32, 32)).save(tmp_path / "out/pictures" / name)
        return {"pictures": dict.fromkeys(names, ""), "latents": {}, "seconds": 1.0}

    monkeypatch.setattr(WorkerProcess, "start", lambda _: True)
    monkeypatch.setattr(WorkerProcess, "paint", paint)
    compared = ComparedBatch(
        graph, tmp_path / "out", {"cfg": ["1", "2"]}, [0, 1, 2], models=models, workers=1
    )
    assert len([*compared]) == 6
    found = compared.comparison()
    assert [pair.id for pair in found.pairs] == ["2-p0-s2", "2-p0-s2.2"]
    assert found.failures == {
        "1-p0-s0": "no memory",
        "2-p0-s0": "Its reference is not there.",
        "2-p0-s1": "no memory",
    }
    again = planned(models, graph, tmp_path / "out", {"cfg": ["1", "2"]}, [0, 1, 2])
    assert [job.id for job in again.batch.waiting] == ["1-p0-s0", "2-p0-s1"], "are tried again"


@pytest.mark.parametrize("page", ["compare.md", "compare.zh-CN.md"])
def test_the_page_has_the_figures_of_the_command(page: str) -> None:
    told = (API.parents[1] / "docs" / page).read_text(encoding="utf-8")
    pictures = len(PUBLISHED_SEEDS) * len(PUBLISHED_PRECISIONS.split(","))
    for figure in (CHANGED_BELOW, MOST_SHOWN, pictures, SMALLEST_SIDE_OF_SSIMULACRA2):
        assert re.search(rf"(?<![\d.]){re.escape(str(figure))}(?![\d])", told), figure
