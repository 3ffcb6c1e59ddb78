"""Publishes the version that is checked out to the Comfy registry.

By Python alone: where the registry's token is, nothing is installed. Takes it from the environment
as REGISTRY_ACCESS_TOKEN. The two requests are those of `comfy node publish`.
"""

import json
import os
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import tomllib  # of Python 3.11, which runners have

REGISTRY = os.environ.get("COMFY_REGISTRY", "https://api.comfy.org")
SECONDS = 300


def publish(root: Path, token: str) -> None:
    config = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    project, comfy = config["project"], config["tool"]["comfy"]
    requirements = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    runs_on = {
        "supported_os": _classified(project, "Operating System"),
        "supported_accelerators": _classified(project, "Environment"),
        "supported_comfyui_version": comfy["requires-comfyui"],
    }
    body = {
        "personal_access_token": token,
        "node": {
            "id": project["name"],
            "name": comfy["DisplayName"],
            "description": project["description"],
            "license": json.dumps(project["license"]),
            "repository": project["urls"]["Repository"],
            **runs_on,
        },
        "node_version": {
            "version": project["version"],
            "dependencies": [line for line in requirements if line and line[0] != "#"],
            **runs_on,
        },
    }
    publisher, node = comfy["PublisherId"], project["name"]
    url = f"{REGISTRY}/publishers/{publisher}/nodes/{node}/versions"
    answer = _send("POST", url, json.dumps(body).encode(), "application/json")
    archive = ["git", "-C", str(root), "archive", "--format=zip", "HEAD"]
    content = subprocess.run(archive, check=True, stdout=subprocess.PIPE).stdout
    _send("PUT", json.loads(answer)["signedUrl"], content, "application/zip")


def _classified(project: dict[str, Any], kind: str) -> list[str]:
    start = f"{kind} :: "
    return [c.removeprefix(start) for c in project["classifiers"] if c.startswith(start)]


def _send(method: str, url: str, content: bytes, kind: str) -> bytes:
    request = urllib.request.Request(url, content, {"Content-Type": kind}, method=method)
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return answer.read()


if __name__ == "__main__":
    publish(Path(__file__).resolve().parents[1], os.environ["REGISTRY_ACCESS_TOKEN"])
