"""A real ComfyUI process for tests, and what a client sees of it."""

import contextlib
import json
import shutil
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import websocket
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from majicflux.benchmarks.comfyui import ROOT, ComfyUI, Refused

__all__ = ["Refused", "Run", "Server"]
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.OnboardingCoachmarks.Seen": ["appMode", "firstRun"],
    "Comfy.Validation.Workflows": True,
}
VOCABULARIES = {  # rows of the real tables
    "text_model.embeddings.token_embedding.weight": 49408,
    "shared.weight": 32128,
}
BINARY_PREVIEW = (1, 4)


def reports_in(outputs: dict[str, Any]) -> dict[str, Any]:
    """By the node's id: its report, of the outputs of nodes that each ran once."""
    return {node: one for node, kept in outputs.items() for one in kept.get("majicflux", ())}


@dataclass
class Run:
    """What the client of one prompt received."""

    prompt_id: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    previews: int = 0

    def receive(self, data: bytes) -> None:
        """A binary message, which begins with its kind."""
        self.previews += int.from_bytes(data[:4], "big") in BINARY_PREVIEW

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [m["data"] for m in self.messages if m["type"] == kind]

    @property
    def live_texts(self) -> list[tuple[str, str]]:
        """What was shown while it ran: the node's id, and the text."""
        return [(data["node"], data["text"]) for data in self.of("majicflux.text")]

    @property
    def reports(self) -> dict[str, Any]:
        """What each node keeps, as `reports_in` has it."""
        done = self.of("executed")
        return reports_in({data["node"]: data["output"] or {} for data in done})

    @property
    def texts(self) -> dict[str, str]:
        """What each node shows in the end."""
        return {node: report["text"] for node, report in self.reports.items()}

    @property
    def executed_nodes(self) -> set[str]:
        return {data["node"] for data in self.of("executing") if data["node"] is not None}


def example_picture() -> Image.Image:
    """64 x 64, transparent in the upper half, which LoadImage makes the white of a mask."""
    shade = Image.linear_gradient("L").resize((64, 64))
    picture = Image.merge("RGB", [shade, shade.rotate(90), shade.rotate(180)])
    picture.putalpha(shade.point([0] * 128 + [255] * 128))
    return picture


class Server(ComfyUI):
    """`python main.py` in a base folder of its own, with this pack, `any_value` and
    `small_encoders`.

    runs_tests: it also takes calls of `begin_tests`.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        models: Path,
        flags: Sequence[str] = ("--cpu",),
        runs_tests: bool = False,
    ):
        (base / "custom_nodes").mkdir(parents=True)
        (base / "user" / "default").mkdir(parents=True)
        for name in ("any_value.py", "small_encoders.py"):
            shutil.copy(ROOT / "tests" / name, base / "custom_nodes")
        if runs_tests:
            shutil.copy(ROOT / "tests" / "tests_inside.py", base / "custom_nodes")
        shutil.copytree(models, base / "models", dirs_exist_ok=True)
        (base / "input").mkdir()
        example_picture().save(base / "input" / "example.png")
        self.settings_file = base / "user" / "default" / "comfy.settings.json"
        self.forget_settings()
        # Threads that spin while they wait take the processor from the tests and the browser.
        passive = {"OMP_WAIT_POLICY": "PASSIVE", "MAJICFLUX_ROOT": str(ROOT)}
        super().__init__(comfyui, base, flags, passive)

    @contextlib.contextmanager
    def real_vocabularies(self) -> Iterator[None]:
        """The text encoders have a row for every token of ComfyUI's own tokenizers."""
        folder = self.base / "models" / "text_encoders"
        before = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
        for path in before:
            tensors = load_file(path)
            for name, rows in VOCABULARIES.items():
                if name in tensors:
                    missing = rows - len(tensors[name])
                    tensors[name] = F.pad(tensors[name], (0, 0, 0, missing), value=0.01)
            save_file(tensors, path)
        try:
            yield
        finally:
            for path, content in before.items():
                path.write_bytes(content)

    def forget_settings(self, **chosen: Any) -> None:
        """Those of a user whom the canvas need not introduce itself to, and what else he chose.

        The canvas checks what it opens against its own schema of workflows.
        """
        self.settings_file.write_text(json.dumps(SETTINGS | chosen), encoding="utf-8")

    def run(
        self,
        graph: dict[str, Any],
        preview_method: str | None = None,
        on_message: Callable[[dict[str, Any]], None] = lambda _: None,
        workflow: Any = None,
    ) -> Run:
        """Queue a graph and follow it to its end, however it ends.

        workflow: what the canvas sends with it, for the pictures' metadata.
        """
        client = uuid.uuid4().hex
        extra: dict[str, Any] = {"preview_method": preview_method} if preview_method else {}
        if workflow is not None:
            extra["extra_pnginfo"] = {"workflow": workflow}
        channel = websocket.create_connection(f"ws://{self.address}/ws?clientId={client}")
        channel.settimeout(300)
        with contextlib.closing(channel):
            channel.send(
                json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            )
            body = {"prompt": graph, "client_id": client, "extra_data": extra}
            run = Run(self.post("/prompt", body)["prompt_id"])
            while True:
                received = channel.recv()
                if isinstance(received, bytes):
                    run.receive(received)
                    continue
                message = json.loads(received)
                run.messages.append(message)
                on_message(message)
                data = message.get("data", {})
                if message["type"] in ("execution_error", "execution_interrupted"):
                    return run
                if message["type"] == "executing" and data["node"] is None:
                    return run

    def begin_tests(self, ids: Sequence[str]) -> None:
        """Run these tests in the server's process, in this order; see `outcome`."""
        self.post("/tests", ids)

    def outcome(self, test: str) -> tuple[str, str]:
        """Whether it "passed", "failed" or was "skipped", and what was said; waits for its end."""
        found = None
        with contextlib.suppress(OSError):  # the server has gone, of which its log may tell
            found = self.get(f"/tests?id={urllib.parse.quote(test)}", timeout=900)
        return tuple(found) if found else ("failed", f"It did not run.\n{self.log()[-5000:]}")

    def outputs(self, run: Run) -> list[Path]:
        """The files that the run saved."""
        return [path for images in self.images(run, "output").values() for path in images]

    def images(self, run: Run, kind: str) -> dict[str, list[Path]]:
        """The pictures of each node, by its id; kind: "output" when saved, "temp" when shown."""
        return self.pictures(run.prompt_id, kind)
