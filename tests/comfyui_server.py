"""A real ComfyUI process for tests, and what a client sees of it."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import websocket
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
START_SECONDS = 180
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
BINARY_TEXT = 3


@dataclass
class Run:
    """What the client of one prompt received."""

    prompt_id: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    previews: int = 0
    all_texts: list[tuple[str, str]] = field(default_factory=list)  # node's id, text shown on it

    def receive(self, data: bytes) -> None:
        """A binary message: its kind, then a preview, or the length of a node id, the id, text."""
        kind = int.from_bytes(data[:4], "big")
        self.previews += kind in BINARY_PREVIEW
        if kind == BINARY_TEXT:
            end = 8 + int.from_bytes(data[4:8], "big")
            self.all_texts.append((data[8:end].decode(), data[end:].decode()))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [m["data"] for m in self.messages if m["type"] == kind]

    @property
    def texts(self) -> dict[str, str]:
        """What each node shows in the end."""
        return dict(self.all_texts)

    @property
    def executed_nodes(self) -> set[str]:
        return {data["node"] for data in self.of("executing") if data["node"] is not None}


class Refused(Exception):
    """POST /prompt answered 400; `errors` is node id -> list of messages."""

    def __init__(self, body: dict[str, Any]):
        super().__init__(json.dumps(body))
        self.errors = {
            node: [f"{e['message']}: {e['details']}" for e in found["errors"]]
            for node, found in body["node_errors"].items()
        }


def example_picture() -> Image.Image:
    """64 x 64, transparent in the upper half, which LoadImage makes the white of a mask."""
    shade = Image.linear_gradient("L").resize((64, 64))
    picture = Image.merge("RGB", [shade, shade.rotate(90), shade.rotate(180)])
    picture.putalpha(shade.point([0] * 128 + [255] * 128))
    return picture


class Server:
    """`python main.py --cpu` in a base folder of its own, with this pack and `small_encoders`."""

    def __init__(self, comfyui: Path, base: Path, models: Path):
        (base / "custom_nodes").mkdir(parents=True)
        (base / "user" / "default").mkdir(parents=True)
        (base / "custom_nodes" / "majicflux").symlink_to(ROOT, target_is_directory=True)
        shutil.copy(ROOT / "tests" / "small_encoders.py", base / "custom_nodes")
        shutil.copytree(models, base / "models", dirs_exist_ok=True)
        (base / "input").mkdir()
        example_picture().save(base / "input" / "example.png")
        self.settings_file = base / "user" / "default" / "comfy.settings.json"
        self.forget_settings()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.base = base
        self.address = f"127.0.0.1:{port}"
        self.log_file = base / "server.log"
        command = [
            sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port),
            "--disable-auto-launch", "--base-directory", str(base),
            "--database-url", "sqlite:///:memory:", "--disable-api-nodes",
        ]  # fmt: skip
        # Threads that spin while they wait take the processor from the tests and the browser.
        policy = {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        environment = {**os.environ, **policy}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=comfyui, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        self._wait_until_ready()

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

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log()[-3000:]}")

    def forget_settings(self) -> None:
        """Those of a user whom the canvas need not introduce itself to, and who chose nothing.

        The canvas checks what it opens against its own schema of workflows.
        """
        self.settings_file.write_text(json.dumps(SETTINGS), encoding="utf-8")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=60) as answer:
            return json.loads(answer.read())

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            f"http://{self.address}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise Refused(json.loads(error.read())) from None

    def run(
        self,
        graph: dict[str, Any],
        preview_method: str | None = None,
        on_message: Callable[[dict[str, Any]], None] = lambda _: None,
        workflow: dict[str, Any] | None = None,
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

    def outputs(self, run: Run) -> list[Path]:
        """The files that the run saved."""
        return [path for images in self.images(run, "output").values() for path in images]

    def images(self, run: Run, kind: str) -> dict[str, list[Path]]:
        """The pictures of each node, by its id; kind: "output" when saved, "temp" when shown."""
        found = self.get(f"/history/{run.prompt_id}")[run.prompt_id]["outputs"]
        return {
            node: [
                self.base / image["type"] / image["subfolder"] / image["filename"]
                for image in shown.get("images", [])
                if image["type"] == kind
            ]
            for node, shown in found.items()
        }
