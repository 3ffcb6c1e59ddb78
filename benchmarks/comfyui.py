"""A ComfyUI process of one's own: its main.py with this pack installed, used through its API."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 180


class Refused(Exception):
    """POST /prompt answered 400; `errors` is node id -> list of messages."""

    def __init__(self, body: dict[str, Any]):
        super().__init__(json.dumps(body))
        self.errors = {
            node: [f"{e['message']}: {e['details']}" for e in found["errors"]]
            for node, found in body["node_errors"].items()
        }


class ComfyUI:
    """`python main.py FLAGS` of the checkout `comfyui`, in the base folder `base`; its canvas is an
    empty page where none is installed.

    Raises RuntimeError with the end of its log when it does not start.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ):
        installed = base / "custom_nodes" / "majicflux"
        installed.parent.mkdir(parents=True, exist_ok=True)
        installed.unlink(missing_ok=True)  # it may be of another checkout
        installed.symlink_to(ROOT, target_is_directory=True)
        if find_spec("comfyui_frontend_package") is None and "--front-end-root" not in flags:
            page = base / "page"
            page.mkdir(exist_ok=True)
            (page / "index.html").write_text("<html></html>")
            flags = [*flags, "--front-end-root", str(page)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.base = base
        self.address = f"127.0.0.1:{port}"
        self.log_file = base / "server.log"
        command = [
            sys.executable, "main.py", "--listen", "127.0.0.1", "--port", str(port),
            "--disable-auto-launch", "--base-directory", str(base),
            "--database-url", "sqlite:///:memory:", "--disable-api-nodes", *flags,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=comfyui, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log()[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str, timeout: float = 60) -> Any:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=timeout) as answer:
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

    def ended(self, prompt_id: str) -> dict[str, Any] | None:
        """The history of a prompt that came to its end, else None."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def pictures(self, prompt_id: str, kind: str) -> dict[str, list[Path]]:
        """The pictures of each node, by its id; kind: "output" when saved, "temp" when shown."""
        found = self.get(f"/history/{prompt_id}")[prompt_id]["outputs"]
        return {
            node: [
                self.base / image["type"] / image["subfolder"] / image["filename"]
                for image in shown.get("images", [])
                if image["type"] == kind
            ]
            for node, shown in found.items()
        }
