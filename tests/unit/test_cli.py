"""The command line as a user meets it, in a process of its own and with the network cut."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from file_layouts import sparse_file, to_diffusers
from majicflux import cli
from majicflux.commands import demo
from majicflux.engine.flux.geometry import ControlGeometry
from majicflux.loaders import demo_models
from majicflux.loaders.layouts import control_net_layout

LIBRARIES = {"torch", "numpy", "PIL", "transformers", "diffsynth", "modelscope"}
WORKFLOW = Path(__file__).parents[2] / "workflows" / "api" / "text_to_image.json"
# Any connection, even a name look-up, ends the process.
NO_NETWORK = """
import socket, sys, os
def refuse(*_, **__):
    print("NETWORK USED", file=sys.stderr); os._exit(99)
socket.socket.connect = socket.getaddrinfo = refuse
from majicflux.cli import main
sys.exit(main(sys.argv[1:]))
"""


def majicflux(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", NO_NETWORK, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")


def painted(demo: subprocess.CompletedProcess) -> Path:
    """The picture that it says it has painted."""
    assert demo.returncode == 0, demo.stderr
    lines = (line.partition("The picture: ") for line in demo.stdout.splitlines())
    return Path(next(path for _, said, path in lines if said))


def test_demo_paints_a_city_offline_and_says_that_it_is_a_toy(tmp_path: Path) -> None:
    half = f"models-{demo_models.edition()}.part/{demo_models.DIT_FILE}"
    left = tmp_path / "majicflux-demo" / half
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")  # as a run that was stopped leaves it
    done = majicflux(tmp_path, "demo")
    with Image.open(painted(done)) as picture:
        assert picture.size == (256, 256)
        prompt, workflow = (json.loads(picture.text[key]) for key in ("prompt", "workflow"))
        values = np.asarray(picture, dtype=np.float32)
    assert not left.parent.parent.exists()
    assert "A toy model painted it" in done.stdout
    assert values.mean() < 100 < values.max() - 100, "a night with lights in it"
    assert np.abs(np.diff(values, axis=0)).mean() < 10, "no noise"
    assert prompt["5"]["inputs"]["width"] == 256
    sample = next(node for node in workflow["nodes"] if node["type"] == "MajicFluxSample")
    assert 256 in sample["widgets_values"]
    words = ("--prompt", "一座红色的房子", "--seed", "5", "--size", "64x48")
    again = majicflux(tmp_path, "demo", "--workflow", WORKFLOW, *words)
    assert "Writing" not in again.stdout
    assert painted(again).name.endswith("_00002_.png")
    with Image.open(painted(again)) as other:
        inputs = json.loads(other.text["prompt"])["5"]["inputs"]
        assert other.size == (64, 48)
    assert (inputs["prompt"], inputs["seed"]) == ("一座红色的房子", 5)


def test_the_demo_names_a_command_that_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert demo._command("plan") == f'python "{WORKFLOW.parents[2]}" plan'
    (tmp_path / "majicflux").touch(0o755)
    assert demo._command("plan") == f"{tmp_path / 'majicflux'} plan"


def test_run_repeats_itself_and_takes_settings(models: Path, tmp_path: Path) -> None:
    small = ["width=64", "height=48", "steps=2"]

    def picture(*settings: str) -> bytes:
        arguments = [x for setting in (*small, *settings) for x in ("--set", setting)]
        done = majicflux(tmp_path, "run", WORKFLOW, "--models", models, *arguments)
        assert done.returncode == 0, done.stderr
        with Image.open(done.stdout.strip()) as file:
            assert file.size == (64, 48)
            seeds.append(json.loads(file.text["prompt"])["5"]["inputs"]["seed"])
            return file.tobytes()

    seeds: list[int] = []
    assert picture() == picture()
    assert picture("seed=5") != picture()
    drawn = picture("seed=-1")
    assert seeds == [0, 0, 5, 0, seeds[-1]]
    assert picture(f"seed={seeds[-1]}") == drawn, "the picture says which seed was drawn"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "gone.json"], "gone.json cannot be opened: No such file"),
        (["run", WORKFLOW], "is not in models/diffusion_models. Put it there"),
        (["run", WORKFLOW.with_name("batch_with_a_grid.json")], "which runs in ComfyUI only"),
        (["run", WORKFLOW, "--set", "sed=1"], "give NODE.INPUT=VALUE with one of 1.file"),
        (["run", WORKFLOW, "--set", f"1.file={'x' * 300}"], "is not in models/diffusion_models."),
        (["run", "/"], "/ cannot be opened: Is a directory"),
        (
            ["run", WORKFLOW.parents[1] / "text_to_image.jpg"],
            "text_to_image.jpg is a picture. Drop",
        ),
        (["run", "deep.json"], "deep.json is not JSON: "),
    ],
)
def test_mistakes_end_in_one_line(tmp_path: Path, arguments: list, said: str) -> None:
    if "deep.json" in arguments:
        (tmp_path / "deep.json").write_text("[" * 10**6)
    done = majicflux(tmp_path, *arguments)
    (tmp_path / "deep.json").unlink(missing_ok=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


SMALL = ["--set=width=64", "--set=height=48", "--set=steps=1"]


def test_a_graph_as_the_canvas_exports_it_takes_settings_too(models: Path, tmp_path: Path) -> None:
    """JavaScript writes 1.0 as 1, and PowerShell a byte order mark in front, or UTF-16."""
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    assert graph["5"]["inputs"]["cfg"] == 1
    graph["5"]["inputs"] |= {"cfg": 1, "guidance": 3, "prompt": 1024}
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "graph.json").write_text(json.dumps(graph), encoding=encoding)
        done = majicflux(
            tmp_path, "run", "graph.json", "--models", models, *SMALL,
            "--set=cfg=1.5", "--set=guidance=3.5",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    with Image.open(done.stdout.strip()) as picture:
        inputs = json.loads(picture.text["prompt"])["5"]["inputs"]
    assert (inputs["cfg"], inputs["guidance"], inputs["prompt"]) == (1.5, 3.5, "1024")


@pytest.mark.parametrize("stream", ["2>&-", "2>/dev/full", "2> >(:)"])
def test_a_picture_is_painted_though_nobody_hears_of_it(
    models: Path, tmp_path: Path, stream: str
) -> None:
    command = [sys.executable, "-m", "majicflux.cli", "run", WORKFLOW, "--models", models, *SMALL]
    line = " ".join([*map(str, command), stream])
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert [done.stdout.strip()] == [str(path) for path in (tmp_path / "output").iterdir()]
    with Image.open(done.stdout.strip()) as picture:
        picture.load()
    line = f"{sys.executable} -m majicflux.cli run gone.json {stream}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (1, "")


def test_what_cannot_be_printed_is_an_error(tmp_path: Path) -> None:
    line = f"{sys.executable} -m majicflux.cli plan >/dev/full"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_an_error_of_the_system_is_a_sentence_and_debug_shows_where(tmp_path: Path) -> None:
    (tmp_path / "majicflux-demo").touch()
    done = majicflux(tmp_path, "demo")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: majicflux-demo/models")
    for arguments in (["--debug", "demo"], ["demo", "--debug"]):
        assert "Traceback" in majicflux(tmp_path, *arguments).stderr


def test_where_pictures_go_and_come_from_is_tried_before_models_load(
    models: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    run = ["run", WORKFLOW, "--models", models, *SMALL]
    done = majicflux(tmp_path, *run, "--output", "file")
    assert done.returncode == 1
    assert "cannot be written: " in done.stderr
    done = majicflux(tmp_path, "run", WORKFLOW.with_name("image_to_image.json"), *run[2:4])
    assert done.returncode == 1
    assert "There is no picture input/" in done.stderr


@pytest.mark.parametrize(
    "option",
    ["--vram=0", "--vram=-4", "--vram=nan", "--vram=1e300", "--copy-rate=-5", "--matrix-rate=inf",
     "--copy-rate=fast", "--batch=0", "--batch=1000001", f"--steps={'9' * 5000}", "--size=-16x16"],
    ids=lambda option: option[:20],
)  # fmt: skip
def test_numbers_that_mean_nothing_are_refused(tmp_path: Path, option: str) -> None:
    done = majicflux(tmp_path, "plan", option)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("majicflux plan: error: argument --")
    assert ": give a " in line
    assert line.endswith(". See majicflux plan --help.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("plan --vram=ten", " plan：错误：参数 --vram：请给一个大于 0 的 GB 数，例如 7；"),
        ("plan --precision fp8", " plan：错误：参数 --precision：没有 fp8 这一项，可选的有：floa"),
        ("download flux", " download：错误：参数 group：没有 flux 这一项，可选的有：majicflus, "),
        ("bench --vram", " bench：错误：参数 --vram：后面要写一个值。"),
        ("run", " run：错误：缺少参数：workflow。"),
        ("paint", "：错误：参数 COMMAND：没有 paint 这一项，可选的有：demo, "),
        ("doctor here", "：错误：没有这样的参数：here。"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_told_in_a_line_of_the_users_language(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    with pytest.raises(SystemExit) as ended:
        cli._parser().parse_args(arguments.split())
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"majicflux{said}")
    assert line.endswith(f"。用法见 {line.partition('：')[0]} --help。")


@pytest.mark.parametrize("given", ["7", "7GB", "7 gb", "7g"])
def test_a_budget_may_have_its_unit(given: str) -> None:
    assert cli._parser().parse_args(["plan", "--vram", given]).vram == 7


def test_the_folder_runs_where_python_looks_for_packages_elsewhere(tmp_path: Path) -> None:
    """As ComfyUI's portable version does, here without any installed package."""
    comfyui = tmp_path / "Comfy UI 便携版"
    (comfyui / "custom_nodes").mkdir(parents=True)
    pack = comfyui / "custom_nodes" / "majicflux"
    pack.symlink_to(WORKFLOW.parents[2])
    environment = {name: value for name, value in os.environ.items() if name != "COMFYUI_PATH"}
    for folder, run in ((comfyui, "custom_nodes/majicflux"), (tmp_path, pack)):
        command = [sys.executable, "-I", "-S", run, "cache", "list"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        kept = comfyui / "models" / "majicflux_prepared"
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr == f"No prepared weights are in {kept}.\n"


def test_the_plan_counts_control_nets_in(tmp_path: Path) -> None:
    """A net of full width with one block, of which there is the header alone."""
    layout = control_net_layout(ControlGeometry(double_blocks=1))
    names = {name: torch.empty(shape, device="meta") for name, shape in layout.items()}
    extra = {name: x for name, x in names.items() if name.startswith("controlnet_")}
    theirs = to_diffusers({n: x for n, x in names.items() if n not in extra}) | extra
    path = sparse_file(tmp_path / "net.safetensors", {n: tuple(x.shape) for n, x in theirs.items()})

    def planned(*more: str) -> dict:
        done = majicflux(tmp_path, "plan", "--json", "--vram=4", *more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    alone, shown = planned(), planned("--control-nets", str(path))
    names = [phase["name"] for phase in shown["phases"]]
    assert names == ["text encoders", "VAE encode", "denoising", "VAE decode"]
    travelling = [plan["phases"][-2]["visiting"] for plan in (alone, shown)]
    block = 12 * 2 * 3072**2 + 3072**2  # its two streams in 8 bits, and its output
    assert travelling[1] - travelling[0] > block
    done = majicflux(tmp_path, "plan", "--control-nets", str(tmp_path / "none.safetensors"))
    assert done.returncode == 1
    assert "none.safetensors" in done.stderr


def test_the_plan_counts_reference_pictures_in(tmp_path: Path) -> None:
    def planned(*more: str) -> dict:
        done = majicflux(tmp_path, "plan", "--json", "--vram=8", *more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    alone, shown = planned(), planned("--references", "1024x1024", "512x768")
    tokens = shown["workload"]["reference_tokens"]
    assert tokens == 64 * 64 + 32 * 48
    names = [phase["name"] for phase in shown["phases"]]
    assert names == ["text encoders", "VAE encode", "denoising", "VAE decode"]
    values = {name: plan["phases"][-2]["values"] for name, plan in
              {"alone": alone, "shown": shown}.items()}  # fmt: skip
    assert values["shown"] > values["alone"] + tokens * 3072 * 4, "they are tokens of the residual"
    done = majicflux(tmp_path, "plan", "--references", "1000x1024")
    assert "Width 1000 is not a multiple of 16" in done.stderr


def test_the_plan_tells_a_time_from_both_rates_only(tmp_path: Path) -> None:
    done = majicflux(tmp_path, "plan", "--copy-rate=5")
    assert (done.returncode, done.stdout) == (1, "")
    assert "--copy-rate and --matrix-rate together" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["demo", "--help"],
        ["download", "--help"],
        [],
        ["paint"],
        ["run"],
        ["run", "gone.json"],
        ["run", "text.json"],
        ["run", WORKFLOW],
        ["run", WORKFLOW, "--models", "MODELS", "--set", "size=huge"],
        ["run", WORKFLOW, "--set", "sed=1"],
        ["plan", "--vram", "4"],
        ["plan", "--vram", "0.1"],
        ["plan", "--json", "--vram", "8", "--precision", "int8 rotated", "--batch", "2"],
        ["plan", "--file", f"MODELS/{demo_models.DIT_FILE}"],
        ["plan", "--references", "1024x1024", "512x768"],
        ["cache", "list", "--models", "MODELS"],
        ["cache", "clear"],
    ],
    ids=lambda arguments: " ".join(map(str, arguments)).replace(str(WORKFLOW), "WORKFLOW"),
)
def test_what_computes_nothing_waits_for_no_library(
    models: Path, tmp_path: Path, arguments: list
) -> None:
    """PyTorch alone takes seconds to import."""
    (tmp_path / "text.json").write_text("no JSON")
    code = f"""
import sys
from majicflux.cli import main
try:
    main(sys.argv[1:])
finally:
    print("LOADED", *{LIBRARIES} & {{name.partition(".")[0] for name in sys.modules}})
"""
    filled = [str(argument).replace("MODELS", str(models)) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-c", code, *filled], cwd=tmp_path, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_a_canvas_file_is_told_from_an_api_file(models: Path, tmp_path: Path) -> None:
    canvas = WORKFLOW.parent.parent / WORKFLOW.name
    own = tmp_path / "own.json"
    shutil.copy(canvas, own)
    for command, further in (
        (["run", canvas, "--models", models], f"{WORKFLOW} is the same as one."),
        (["demo", "--workflow", canvas], f"{WORKFLOW} is the same as one."),
        (["run", own, "--set", "seed=1"], "In ComfyUI, use Workflow > Export (API)."),
    ):
        done = majicflux(tmp_path, *command)
        assert done.returncode == 1
        assert done.stderr == f"error: This is not an API-format workflow. {further}\n"


def test_prepared_weights_are_listed_and_cleared(models: Path, tmp_path: Path) -> None:
    # Other tests prepare weights in the folder that they share.
    own = tmp_path / "models"
    others = shutil.ignore_patterns("majicflux_prepared")
    shutil.copytree(models, own, copy_function=os.link, ignore=others)
    models, folder = own, own / "majicflux_prepared"
    run = ["run", WORKFLOW, "--models", models, "--set=width=32", "--set=height=32"]
    assert majicflux(tmp_path, *run, "--set=steps=1").returncode == 0
    listed = majicflux(tmp_path, "cache", "list", "--models", models).stdout
    kept = sorted(folder.glob("*.majicflux"))
    assert [line.split(maxsplit=2)[2] for line in listed.splitlines()] == [*map(str, kept)]
    assert any(path.name.startswith(Path(demo_models.DIT_FILE).stem) for path in kept)
    assert f"0.01 GB  {folder}" in listed
    everything = sum(path.stat().st_size for path in kept)
    cleared = majicflux(tmp_path, "cache", "clear", "--models", models).stdout
    assert cleared.startswith(f"{everything / 1e9:.2f} GB freed")
    assert not list(folder.iterdir())
    assert majicflux(tmp_path, "cache", "list", "--models", models).stdout == ""


def test_demo_models_are_written_once(tmp_path: Path) -> None:
    first = majicflux(tmp_path, "demo-models", "set")
    assert first.returncode == 0, first.stderr
    assert f"set/{demo_models.VAE_FILE}\n" in first.stdout
    assert "not the real ones whose names they have" in first.stdout
    assert (tmp_path / "set" / demo_models.VAE_FILE).is_file()
    second = majicflux(tmp_path, "demo-models", "set")
    assert second.returncode == 1
    assert "may be a real model; choose an empty folder" in second.stderr


def test_inspect_works_offline_and_shows_its_chart(models: Path, tmp_path: Path) -> None:
    done = majicflux(tmp_path, "inspect", models / demo_models.DIT_FILE)
    assert done.returncode == 0, done.stderr
    assert "up to 64 rows of each matrix" in done.stdout
    assert "Suggested weight_precision: int8 rotated" in done.stdout
    with Image.open(tmp_path / done.stdout.splitlines()[-1]) as picture:
        assert picture.width == 1200
