"""Runs tests in the process of a ComfyUI server, when asked.

Put into custom_nodes of a test server. POST /tests with a list of ids begins a run in a thread of
its own, which has neither a running loop nor inference mode; GET /tests?id=... answers when that
test has ended.
"""

import asyncio
import os
import threading

import pytest
from aiohttp import web
from server import PromptServer

ROOT = os.environ["MAJICFLUX_ROOT"]
OPTIONS = [
    f"--rootdir={ROOT}", f"--config-file={ROOT}/pyproject.toml", "--capture=sys", "--color=no",
    "-p", "no:cacheprovider", "-p", "no:faulthandler",
]  # fmt: skip
NODE_CLASS_MAPPINGS = {}


class Outcomes:
    """Of the tests that have ended: "passed", "failed" or "skipped", and what was said."""

    def __init__(self) -> None:
        self.ended: dict[str, tuple[str, str]] = {}
        self.said: dict[str, list[tuple[str, str]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        said = self.said.setdefault(report.nodeid, [])
        if report.skipped:
            reason = report.longrepr  # with a place before it, when it is a skip
            said.append(("skipped", reason[-1] if isinstance(reason, tuple) else str(reason)))
        elif report.failed:
            captured = [f"--- {name} ---\n{text}" for name, text in report.sections]
            said.append(("failed", "\n".join([report.longreprtext, *captured])))
        if report.when == "teardown":
            self.ended[report.nodeid] = max(said, default=("passed", ""), key=_failed)


def _failed(said: tuple[str, str]) -> bool:
    return said[0] == "failed"


outcomes = Outcomes()
running: list[threading.Thread] = []


@PromptServer.instance.routes.post("/tests")
async def begin(request: web.Request) -> web.Response:
    ids = [os.path.join(ROOT, test) for test in await request.json()]
    running.append(threading.Thread(target=pytest.main, args=([*OPTIONS, *ids], [outcomes])))
    running[-1].start()
    return web.json_response(None)


@PromptServer.instance.routes.get("/tests")
async def result(request: web.Request) -> web.Response:
    test = request.query["id"]
    while test not in outcomes.ended and any(thread.is_alive() for thread in running):
        await asyncio.sleep(0.02)
    return web.json_response(outcomes.ended.get(test))
