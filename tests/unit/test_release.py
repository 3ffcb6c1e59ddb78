"""The workflow that publishes a version."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOW = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
TEST_JOB, PUBLISH_JOB = WORKFLOW.split("  publish:\n")


def test_a_release_leaves_nothing_out() -> None:
    tested = TEST_JOB.index("run: python dev.py test --in-comfyui\n")
    cloned = re.search(r"git clone --depth 1 --branch v[\d.]+ \S+/ComfyUI \S+/ComfyUI", TEST_JOB)
    assert cloned.start() < tested
    assert "needs: test\n" in PUBLISH_JOB


def test_the_registrys_token_is_where_nothing_is_installed() -> None:
    assert "secrets." not in TEST_JOB
    used = re.findall(r"(?:uses|run): (.*)", PUBLISH_JOB)
    assert [re.sub("@.*", "", step) for step in used] == [
        "actions/checkout",
        "python3 .github/publish.py",
    ]
    assert "\npermissions:\n  contents: read\n\njobs:" in WORKFLOW
    for action in re.findall(r"uses: \S+@(\S+)", WORKFLOW):
        assert re.fullmatch("[0-9a-f]{40}", action), "a tag can be moved"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the runner's Python has tomllib")
def test_what_is_published_is_what_comfy_node_publish_sends(tmp_path: Path) -> None:
    """As comfy-cli 1.23 sent it, and the dependencies, which it does not find in another file."""
    asked: list[tuple[str, str, bytes]] = []

    class Registry(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.command + self.path, self.headers["Content-Type"], content))
            self.send_response(201)
            self.end_headers()
            self.wfile.write(json.dumps({"signedUrl": f"{url}/signed"}).encode())

        do_PUT = do_POST

        def log_message(self, format: str, *_: object) -> None: ...

    (tmp_path / ".github").mkdir()
    for name in (".github/publish.py", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y"]
    for step in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *step], cwd=tmp_path, check=True)
    (tmp_path / "untracked").touch()
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        subprocess.run(
            [sys.executable, tmp_path / ".github" / "publish.py"],
            env={**os.environ, "COMFY_REGISTRY": url, "REGISTRY_ACCESS_TOKEN": "secret"},
            check=True,
        )
        server.shutdown()
    (to, kind, body), (to_storage, kind_of_archive, archive) = asked
    assert (to, kind) == ("POST/publishers/majicflux/nodes/majicflux/versions", "application/json")
    assert (to_storage, kind_of_archive) == ("PUT/signed", "application/zip")
    sent = json.loads(body)
    assert sent["personal_access_token"] == "secret"
    runs_on = {
        "supported_os": ["OS Independent"],
        "supported_accelerators": ["GPU :: NVIDIA CUDA"],
        "supported_comfyui_version": ">=0.15.0",
    }
    assert sent["node"] == {
        "id": "majicflux",
        "name": "MajicFlux 麦橘超然",
        "description": sent["node"]["description"],
        "license": '{"file": "LICENSE"}',
        "repository": "https://github.com/majicflux/majicflux",
        **runs_on,
    }
    assert "transformers>=4.57" in sent["node_version"].pop("dependencies")
    assert sent["node_version"] == {"version": sent["node_version"]["version"], **runs_on}
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        names = {name for name in files.namelist() if not name.endswith("/")}
    assert names == {".github/publish.py", "pyproject.toml", "requirements.txt"}
