"""`majicflux`: the same nodes and workflows without a ComfyUI server."""

import argparse
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from .downloads.catalogue import (
    GROUPS,
    HUB_NAMES,
    MODELSCOPE,
    TRANSLATION,
    TRANSLATOR,
    files_of,
)
from .engine.quant.formats import PRECISIONS
from .host import standalone
from .host.canvas import node_types, with_values
from .host.graph import Graph, read_graph, read_json, run_graph, set_inputs
from .host.image_nodes import image_nodes
from .host.schema import ComfyNode
from .messages import MajicFluxError, say
from .nodes import NODES
from .nodes.translate import translator_of

DEMO_WORKFLOW = Path(__file__).parent / "workflows" / "api" / "text_to_image.json"
DEMO_FOLDER = Path("majicflux-demo")
DEMO_SIZE = (256, 256)  # that the demo models know best
PROMPTS = {  # inputs that `run --translate` translates, by node
    "MajicFluxSample": ("prompt", "negative_prompt"),
    "MajicFluxEncodePrompt": ("prompt",),
}
MOST = 1_000_000  # that any number of an option may be


class _Unheard:
    """A stream that may have no reader any more: what is said is then lost, and nothing else."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def main(arguments: list[str] | None = None) -> int:
    _open_streams()
    # Threads of PyTorch that spin while they wait take the processor from those they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, TextIOWrapper):  # a console may lack characters that are printed
        sys.stdout.reconfigure(errors="replace")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("majicflux").setLevel(logging.INFO)  # others would log every request
    try:
        options.command(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(say("stopped"), file=sys.stderr)
        return 130
    except Exception as error:
        if "debug" in options:
            raise
        print(say("error: {error}", error=_sentence(error)), file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # which would be raised once more at the end
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 1
    return 0


def _open_streams() -> None:
    """Let Python have all three streams, and stderr take what is said whoever listens."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # or a file of ours would get its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    sys.stderr = _Unheard(sys.stderr)


def _sentence(error: Exception) -> str:
    """What a user can read of an error; MajicFluxError has been written for that."""
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename else ""
        return f"{named}{error.strerror}"
    if isinstance(error, (MajicFluxError, OSError)):
        return str(error)
    return say(
        "{kind}: {error}. With --debug, this says where.",
        kind=type(error).__name__,
        error=str(error).rstrip("."),
    )


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show where an error was"
    )
    parser = argparse.ArgumentParser(prog="majicflux", description=__doc__, parents=[common])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", parents=[common], help="paint with the toy models that come with the pack"
    )
    demo.add_argument(
        "--prompt",
        metavar="TEXT",
        help="what to paint, in English or Chinese, such as 'a red house by day, falling snow'",
    )
    demo.add_argument("--seed", type=int, metavar="N", help="another one, another picture")
    demo.add_argument("--size", type=_size, default=DEMO_SIZE, metavar="WIDTHxHEIGHT")
    demo.add_argument("--workflow", type=Path, default=DEMO_WORKFLOW, help="API-format JSON")
    demo.set_defaults(command=_demo)

    models = commands.add_parser(
        "demo-models", parents=[common], help="write these toy models as files for ComfyUI"
    )
    models.add_argument("folder", type=Path)
    models.set_defaults(command=_demo_models)

    cache = commands.add_parser("cache", parents=[common], help="list or remove prepared weights")
    cache.add_argument("action", choices=["list", "clear"])
    _add_models(cache)
    cache.set_defaults(command=_cache)

    inspect = commands.add_parser(
        "inspect",
        parents=[common],
        help="measure what each precision costs a Flux.1 transformer, or say what is in a LoRA",
    )
    inspect.add_argument("file", type=Path, help="a .safetensors, or the folder of its parts")
    inspect.add_argument(
        "--chart",
        type=Path,
        metavar="PNG",
        help="where the chart goes, by default FILE-precision.png",
    )
    inspect.add_argument(
        "--rows",
        type=_positive,
        metavar="N",
        help="how many rows of each matrix are measured; more are slower and a little more exact",
    )
    inspect.set_defaults(command=_inspect)

    doctor = commands.add_parser(
        "doctor", parents=[common], help="say what this machine has, for a bug report"
    )
    _add_models(doctor)
    doctor.set_defaults(command=_doctor)

    plan = commands.add_parser(
        "plan", parents=[common], help="say what a VRAM budget allows, without a card"
    )
    plan.add_argument("--vram", type=_above_zero, metavar="GB", help="the budget; none: no limit")
    plan.add_argument("--size", type=_size, default=(1024, 1024), metavar="WIDTHxHEIGHT")
    plan.add_argument("--batch", type=_positive, default=1, metavar="N", help="pictures at once")
    plan.add_argument("--steps", type=_positive, default=20, metavar="N")
    plan.add_argument(
        "--references", type=_size, nargs="+", default=(), metavar="WIDTHxHEIGHT",
        help="pictures that a Kontext model is shown",
    )  # fmt: skip
    plan.add_argument(
        "--control-nets", type=Path, nargs="+", default=(), metavar="FILE",
        help="ControlNets that run beside the transformer, in its precision",
    )  # fmt: skip
    plan.add_argument(
        "--file", type=Path, help="a transformer, by default one of FLUX.1-dev's sizes"
    )
    plan.add_argument("--precision", choices=PRECISIONS, default="float8_e4m3fn")
    plan.add_argument(
        "--compute",
        choices=["8-bit", "bfloat16"],
        default="8-bit",
        help="products of 8-bit weights",
    )
    plan.add_argument(
        "--copy-rate", type=_above_zero, metavar="GB/S", help="of the card, from pinned memory"
    )
    plan.add_argument(
        "--matrix-rate", type=_above_zero, metavar="TFLOP/S", help="of the card, in 8 bits"
    )
    plan.add_argument("--json", action="store_true", help="everything, for programs")
    plan.set_defaults(command=_plan)

    run = commands.add_parser("run", parents=[common], help="run an API-format workflow")
    run.add_argument("workflow", type=Path, help="API-format JSON")
    run.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="may be repeated"
    )
    _add_models(run)
    run.add_argument("--output", type=Path, default=Path("output"), help="where pictures go")
    run.add_argument("--input", type=Path, default=Path("input"), help="where LoadImage looks")
    run.add_argument(
        "--translate",
        nargs="?",
        const=TRANSLATOR,
        metavar="MODEL",
        help="translate the Chinese in its prompts, with this folder in models/translation "
        f"(without one: {TRANSLATOR})",
    )
    run.set_defaults(command=_run)

    batch = commands.add_parser(
        "batch",
        parents=[common],
        help="paint many pictures with one workflow, on all cards; the same command goes on later",
    )
    batch.add_argument("rows", type=Path, help=".csv, .jsonl, or .txt with a prompt in each line")
    batch.add_argument("--graph", type=Path, required=True, metavar="JSON", help="API-format JSON")
    batch.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where pictures and manifest go"
    )
    batch.add_argument("--input", type=Path, default=Path("input"), help="where LoadImage looks")
    batch.add_argument(
        "--repeat", type=_positive, default=1, metavar="N", help="seeds for each row, by default 1"
    )
    batch.add_argument(
        "--retry-failed", action="store_true", help="try rows again that could not be painted"
    )
    where = batch.add_mutually_exclusive_group()
    where.add_argument("--gpus", type=_numbers, metavar="N,N", help="which cards, by default all")
    where.add_argument(
        "--workers", type=_positive, metavar="N", help="so many processes on the CPU instead"
    )
    _add_models(batch)
    batch.set_defaults(command=_batch)

    download = commands.add_parser("download", parents=[common], help="fetch the model files")
    download.add_argument("group", nargs="?", choices=GROUPS, default="all")
    download.add_argument(
        "--from",
        dest="hub",
        choices=HUB_NAMES,
        default=MODELSCOPE,
        help="modelscope has majicflus in bf16, huggingface in float8 (default: %(default)s)",
    )
    _add_models(download)
    download.set_defaults(command=_download)
    return parser


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        type=Path,
        default=standalone.models_folder,
        help="folder with diffusion_models, loras, text_encoders and vae in it "
        "(default: %(default)s)",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 7 or not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"give a whole number, 1 to {MOST}")
    return int(text)


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r"\d{1,3}(,\d{1,3})*", text, re.ASCII):
        raise argparse.ArgumentTypeError("give numbers of cards such as 0,1")
    return [*dict.fromkeys(map(int, text.split(",")))]


def _above_zero(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) <= MOST:
            return float(text)
    raise argparse.ArgumentTypeError(f"give a number above 0, {MOST} at most")


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError("give a size such as 1024x768")
    return int(width), int(height)


def _plan(options: argparse.Namespace) -> None:
    from .engine.errors import BudgetTooSmallError
    from .engine.plan.estimate import estimate_plan
    from .engine.sizes import require_size
    from .loaders.controlnet import inspect_control_net
    from .loaders.flux_dit import inspect_flux_dit

    for size in (options.size, *options.references):
        for name, side in zip(("Width", "Height"), size, strict=True):
            require_size(name, side)
    if (options.copy_rate is None) != (options.matrix_rate is None):
        raise MajicFluxError(say("The time is told from --copy-rate and --matrix-rate together."))
    geometry = None if options.file is None else inspect_flux_dit(options.file)[0]
    plan = estimate_plan(
        geometry,
        PRECISIONS[options.precision],
        (*options.size, options.batch, options.steps),
        options.vram,
        options.compute == "8-bit",
        options.copy_rate,
        options.matrix_rate,
        options.references,
        [inspect_control_net(path)[0] for path in options.control_nets],
    )
    print(json.dumps(plan.as_dict(), indent=2) if options.json else plan)
    try:
        plan.require_budget()
    except BudgetTooSmallError as error:
        advice = say("Give --vram {enough} or more, or choose {smaller}.", **error.values)
        error.advise(advice)
        raise


def _cache(options: argparse.Namespace) -> None:
    from .loaders.weight_cache import cached_files, clear_cache

    standalone.models_folder = options.models
    folder = standalone.prepared_folder()
    if options.action == "clear":
        freed = clear_cache(folder) / 1e9
        print(say("{freed:.2f} GB freed in {folder}", freed=freed, folder=folder))
        return
    for path in cached_files(folder):
        print(f"{path.stat().st_size / 1e9:8.2f} GB  {path}")


def _demo(options: argparse.Namespace) -> None:
    graph = read_graph(options.workflow)
    width, height = options.size
    chosen = {"prompt": options.prompt, "seed": options.seed, "width": width, "height": height}
    for node in graph.values():
        for name, value in chosen.items():
            given = node["inputs"].get(name)
            if value is not None and given is not None and not isinstance(given, list):
                node["inputs"][name] = value
    models = _models_of_the_demo()
    folders = (DEMO_FOLDER / "output", DEMO_FOLDER / "input")
    for path in _paint(options.workflow, graph, models, *folders):
        print(say("The picture: {path}", path=path))
    program = Path(sys.executable).parent / "majicflux"
    print(
        "",
        say(
            "A toy model painted it, which knows a little world only: neon cities, houses, trees, "
            "hills, snow, the sea with boats, sun and moon. Tell it what to paint, in English or "
            "Chinese:"
        ),
        f"  {program} demo --prompt TEXT",
        "",
        say(
            "For pictures of everything else, download the real models, which take 34 GB of disk, "
            "and run the same workflow with them:"
        ),
        f"  {program} download all --models FOLDER",
        f"  {program} run {options.workflow} --models FOLDER",
        sep="\n",
    )


def _models_of_the_demo() -> Path:
    """A folder with the toy models, written where this is the first demo with these weights."""
    from .loaders.demo_models import edition, write_demo_models

    models = DEMO_FOLDER / f"models-{edition()}"
    if not models.is_dir():
        print(say("Writing the toy models to {folder} ...", folder=models), flush=True)
        partial = models.with_suffix(".part")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was stopped
        write_demo_models(partial)
        partial.rename(models)
    return models


def _demo_models(options: argparse.Namespace) -> None:
    from .loaders.demo_models import write_demo_models

    for path in write_demo_models(options.folder):
        print(path)
    print(
        "",
        say(
            "These are toy models of a little world, not the real ones whose names they have. If "
            "{folder} is not the models folder of ComfyUI, copy what is in it there. Then open a "
            "template of MajicFlux, set the size to {width} x {height}, and press Run.",
            folder=options.folder,
            width=DEMO_SIZE[0],
            height=DEMO_SIZE[1],
        ),
        say("Delete these files before you download the real ones, which have the same names."),
        sep="\n",
    )


def _inspect(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .lab.precision import ROWS, measure
    from .lab.precision_chart import require_place, write_chart
    from .lab.precision_table import table
    from .loaders.flux_dit import inspect_flux_dit
    from .loaders.lora import describe_lora

    path = Path(os.path.abspath(options.file))  # not resolved: a link may have the better name
    lora = describe_lora(path)
    if lora is not None:
        print(lora)
        return
    stem = path.name if path.is_dir() else path.stem
    chart = options.chart or Path(f"{stem}-precision.png")
    require_place(chart)
    geometry, sources = inspect_flux_dit(path)
    with tqdm(desc="reading", unit="B", unit_scale=True, leave=False, delay=1) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = measure(geometry, sources, options.rows or ROWS, progress)
    print(table(path.name, report))
    write_chart(chart, path.name, report)
    print(chart)


def _doctor(options: argparse.Namespace) -> None:
    from .lab.doctor import diagnosis

    standalone.models_folder = options.models
    print(diagnosis())


def _run(options: argparse.Namespace) -> None:
    graph = read_graph(options.workflow)
    folders = (options.output, options.input)
    translate = None
    if options.translate is not None:
        translate = _translator(options.translate, options.models)
    for path in _paint(options.workflow, graph, options.models, *folders, options.set, translate):
        print(path)


def _translator(model: str, models: Path) -> Callable[[Graph], None]:
    """A function that puts the prompts of a graph into English, and prints each that was not.

    Raises ModelFileError when there is no such translator, or it is damaged.
    """
    from .translation.frame import has_chinese

    standalone.models_folder = models
    translate = translator_of(model)

    def on_graph(graph: Graph) -> None:
        for node in graph.values():
            for name in PROMPTS.get(node["class_type"], ()):
                prompt = node["inputs"].get(name)
                if isinstance(prompt, str) and has_chinese(prompt):
                    node["inputs"][name] = translate(prompt)
                    print(node["inputs"][name], flush=True)

    return on_graph


def _batch(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .batch import Batch, BatchError

    batch = Batch(
        options.rows,
        options.graph,
        options.out,
        models=options.models,
        input_folder=options.input,
        gpus=options.gpus,
        workers=options.workers,
        repeat=options.repeat,
        retry_failed=options.retry_failed,
    )
    total, known = len(batch.jobs), len(batch.jobs) - len(batch.waiting)
    if known:
        print(say("{known} of {total} were done before.", known=known, total=total), flush=True)
    # disable=None: no bar where there is no terminal.
    with tqdm(total=total, initial=known, unit="", disable=None, smoothing=0.1) as bar:
        for done, record in enumerate(batch, start=known + 1):
            if bar.disable:
                print(f"{done}/{total} {_outcome(record)}", flush=True)
            elif record["error"] is not None:
                bar.write(_outcome(record))
            bar.update()
    if batch.failed:
        raise BatchError(
            say(
                "{failed} of {total} could not be painted; {file} says why. --retry-failed tries "
                "them again.",
                failed=batch.failed,
                total=total,
                file=batch.manifest,
            )
        )


def _outcome(record: dict[str, Any]) -> str:
    """Of a row of a batch, as a line."""
    if record["error"] is not None:
        return f"{record['id']}: {record['error']}"
    pictures = " ".join(record["pictures"])
    return say("{pictures}: {seconds:.1f} s", pictures=pictures, seconds=record["seconds"])


def _download(options: argparse.Namespace) -> None:
    from .downloads.download import download, require_space, target_of

    files = files_of(options.group, options.hub)
    print(say("From {hub}:", hub=HUB_NAMES[options.hub]))
    for file in files:
        size = (file.size or file.least_size) / 1e9
        print(f"  {target_of(file, options.models)} ({size:.1f} GB, {file.licence})")
    require_space(files, options.hub, options.models)  # for all, so that none fails hours later
    for file in files:
        print(download(file, options.hub, options.models))
    if options.group == "translator":
        from .translation.conversion import convert_pickled

        for path in convert_pickled(options.models / TRANSLATION):
            print(path)


def _paint(
    workflow: Path,
    graph: Graph,
    models: Path,
    output: Path,
    input_folder: Path,
    settings: Sequence[str] = (),
    change: Callable[[Graph], None] | None = None,
) -> list[Any]:
    """Run the graph; returns the paths of its pictures. change: called with it as it will run."""
    standalone.models_folder = models
    metadata: dict[str, Any] = {"prompt": graph}
    ComfyNode.hidden.extra_pnginfo = metadata
    classes = {node.define_schema().node_id: node for node in NODES}
    classes |= image_nodes(output, input_folder, metadata)
    set_inputs(graph, settings, classes)
    if change is not None:
        change(graph)
    with suppress(Exception):  # anything: a file of another shape, and no picture is lost for it
        canvas = _canvas_of(workflow)
        schemas = {name: node.define_schema() for name, node in classes.items()}
        types = {key: node["class_type"] for key, node in graph.items()}
        if canvas is not None and types == node_types(canvas):
            metadata["workflow"] = with_values(canvas, graph, schemas)
    return [path for shown in run_graph(graph, classes) for path in shown]


def _canvas_of(workflow: Path) -> dict[str, Any] | None:
    """The canvas twin of `workflows/api/NAME.json`, which is `workflows/NAME.json`."""
    twin = workflow.resolve().parent.parent / workflow.name
    return read_json(twin) if workflow.resolve().parent.name == "api" and twin.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
