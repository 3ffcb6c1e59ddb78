"""Batches on the machines of a Ray cluster."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
from PIL import Image

from majicflux.batch import Batch, BatchError, cluster
from majicflux.batch.cluster import _require_answer
from majicflux.batch.identity import differences, of_models, of_software
from majicflux.batch.remote import RemotePainter
from majicflux.host import standalone
from majicflux.host.image_nodes import image_nodes
from majicflux.messages import MajicFluxError
from majicflux.nodes import NODES

API = Path(__file__).parents[2] / "workflows" / "api"
SMALL = {"width": 32, "height": 32, "steps": 1}
LITTLE = {"object_store_memory": 80 * 2**20, "num_cpus": 0}
# A machine is given up after 3 seconds without a sign of life.
SOON = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a graph and some rows."""
    monkeypatch.setattr(standalone, "models_folder", models)
    graph = json.loads((API / "text_to_image.json").read_text(encoding="utf-8"))
    graph["5"]["inputs"] |= SMALL
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    (tmp_path / "rows.txt").write_text("".join(f"{number} cats\n" for number in range(5)))
    return tmp_path


def batch(place: Path, output: str, **options: Any) -> Batch:
    return Batch(place / "rows.txt", place / "graph.json", place / output, **options)


def pictures(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.png")}


# With Ray


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """A head and two machines, with a card each that is none."""
    reason = "several machines need Linux, and Ray: pip install ray"
    if sys.platform != "linux" or find_spec("ray") is None:  # not imported: it reads what follows
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        from ray.cluster_utils import Cluster

        head = {**LITTLE, "num_gpus": 0, "include_dashboard": False, "_system_config": SOON}
        made = Cluster(initialize_head=True, head_node_args=head)
        made.machines = [made.add_node(**LITTLE, num_gpus=1) for _ in range(2)]
        yield made
        made.shutdown()


def test_machines_paint_what_one_worker_paints_though_one_is_killed(
    ray_cluster: Any, place: Path
) -> None:
    records = []
    for record in batch(place, "many", ray=ray_cluster.address):
        records.append(record)
        if len(records) == 2:
            ray_cluster.remove_node(ray_cluster.machines[0], allow_graceful=False)
    assert len(list(batch(place, "one", workers=1))) == 5
    assert sorted(record["row"] for record in records) == [*range(5)]
    assert [record["error"] for record in records] == [None] * 5
    assert max(record["tries"] for record in records) <= 2
    assert pictures(place / "many") == pictures(place / "one")
    assert sorted(path.name for path in (place / "many").iterdir()) == [
        *(f"0000{number}.png" for number in range(5)),
        "manifest.jsonl",
    ]


def test_a_machine_that_came_is_seen_and_one_that_differs_refused(
    ray_cluster: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came = ray_cluster.add_node(**LITTLE, num_gpus=1)
    seen: list[dict] = []
    own = cluster.ClusterWorker.__init__

    def begin(worker: cluster.ClusterWorker, of: object, node: dict, shared: int) -> None:
        seen.append(node)
        own(worker, of, node, shared)

    monkeypatch.setattr(cluster.ClusterWorker, "__init__", begin)
    monkeypatch.setattr(cluster, "of_software", lambda: {"torch": "another"})
    painting = batch(place, "refused", ray=ray_cluster.address)
    machine = socket.gethostname()
    said = f"^{machine} paints nothing: torch there are not those of this machine.$"
    with pytest.raises(BatchError, match=said):
        list(painting)
    assert (place / "refused" / "manifest.jsonl").read_text() == ""
    assert came.node_id in {node["NodeID"] for node in seen}


def test_without_the_token_nobody_is_let_in(ray_cluster: Any, place: Path, models: Path) -> None:
    command = [sys.executable, "-m", "majicflux.cli", "batch", "rows.txt", "--graph", "graph.json",
               "--out", "out", "--models", models, "--ray", ray_cluster.address]  # fmt: skip
    environment = os.environ | {"RAY_AUTH_TOKEN": "0" * 64}
    began = time.monotonic()
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert time.monotonic() - began < 15
    assert done.returncode == 1
    assert f"error: The Ray cluster at {ray_cluster.address} did not let this" in done.stderr


def test_a_cluster_of_this_machine_listens_to_nobody_else(
    ray_cluster: Any, place: Path, models: Path
) -> None:
    (place / "rows.txt").write_text("a cat\n" * 3)
    command = [sys.executable, "-m", "majicflux.cli", "batch", "rows.txt", "--graph", "graph.json",
               "--out", "out", "--models", models, "--ray", "local", "--workers", "1"]  # fmt: skip
    process = subprocess.Popen(command, cwd=place, stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    next(line for line in process.stdout if ".png" in line)
    children = psutil.Process(process.pid).children(recursive=True)
    listening = {
        connection.laddr.ip
        for each in (psutil.Process(process.pid), *children)
        for connection in each.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    process.kill()
    process.communicate()
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    # Ray's agents look only now and then whether their machine's other processes are still there.
    left = {process.name() for process in psutil.wait_procs(children, timeout=10)[1]}
    assert left <= {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}


# Without it


class NoCluster:
    """What a worker asks of its cluster, but for Ray."""

    def __init__(self, place: Path):
        self.setup = {"parts": place / "parts", "output": place / "out", "input": place}
        self.setup["parts"].mkdir()
        self.setup["output"].mkdir()
        self.classes: dict = {}


def test_a_picture_that_came_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    node = {"NodeID": "1", "NodeManagerHostname": "b"}
    worker = cluster.ClusterWorker(NoCluster(tmp_path), node, 1)
    kept = worker._kept({"pictures": {"a.png": b"abc"}, "seconds": 1.0})
    assert kept["pictures"] == {"a.png": sha256(b"abc").hexdigest()}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]
    assert not [*(tmp_path / "parts").iterdir()]
    (tmp_path / "parts/b.png").symlink_to("/dev/full")
    full = worker._kept({"pictures": {"b.png": b"abc"}})
    assert full["fatal"]
    assert full["problem"].endswith("out cannot be written: No space left on device.")


def test_a_picture_that_has_gone_is_the_problem_of_its_row(tmp_path: Path) -> None:
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": "gone.png"}}}
    node = {"NodeID": "1", "NodeManagerHostname": "b"}
    answer = cluster.ClusterWorker(NoCluster(tmp_path), node, 1).paint("a", graph, [])
    assert "No such file" in answer["problem"]
    assert not answer["fatal"]


@pytest.mark.parametrize("address", ["somewhere", "ray://host:1", "a:b", ":1", "host:1234567"])
def test_an_address_that_is_none_is_told(place: Path, address: str) -> None:
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install ray")
    with pytest.raises(BatchError, match=rf"^--ray {address}: give HOST:PORT, such as "):
        list(batch(place, "out", ray=address))


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_an_address_where_no_ray_answers_is_told_soon(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | None
) -> None:
    """None: whoever listens there says nothing."""
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer) if answer is not None else time.sleep(1)

        Thread(target=serve, daemon=True).start()
        port = server.getsockname()[1]
        with pytest.raises(BatchError, match=f"^No Ray cluster answers at 127.0.0.1:{port}: "):
            _require_answer("127.0.0.1", port)
    with pytest.raises(BatchError, match="Connection refused"):
        _require_answer("127.0.0.1", port)


def test_without_ray_a_sentence_says_how_to_get_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BatchError, match=r'^Ray is not installed\. .*pip install "ray>='):
        list(batch(place, "out", ray="127.0.0.1:6379"))


def test_what_a_machine_paints_with_is_told_apart(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = {node.define_schema().node_id: node for node in NODES}
    classes |= image_nodes(tmp_path, tmp_path, {})
    graph = json.loads((API / "text_to_image.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(standalone, "models_folder", models)
    here = of_models(graph, classes)
    assert {*here} == {
        "majicflus_v134.safetensors", "clip_l.safetensors", "t5xxl_fp16.safetensors",
        "ae.safetensors",
    }  # fmt: skip
    (tmp_path / "vae").mkdir()
    for folder in models.iterdir():
        if folder.name != "vae":
            (tmp_path / folder.name).symlink_to(folder)
    file = bytearray((models / "vae/ae.safetensors").read_bytes())
    (tmp_path / "vae/ae.safetensors").write_bytes(file)
    monkeypatch.setattr(standalone, "models_folder", tmp_path)
    assert of_models(graph, classes) == here, "the same file at another place"
    file[-1] ^= 1
    (tmp_path / "vae/ae.safetensors").write_bytes(file)
    assert differences(here, of_models(graph, classes)) == ["ae.safetensors"]
    assert differences({"a": "1", "b": "2"}, {"a": "1"}) == ["b"]
    (tmp_path / "vae/other").mkdir()
    shutil.copy(models / "vae/ae.safetensors", tmp_path / "vae/other")
    one, other = (
        {"class_type": "MajicFluxVAELoader", "inputs": {"file": file}}
        for file in ("ae.safetensors", "other/ae.safetensors")
    )
    two = of_models({"0": other, "1": one}, classes)
    assert differences(two, of_models({"1": one}, classes)) == ["ae.safetensors"]
    assert {*of_software()} >= {"majicflux", "torch", "diffsynth"}


def test_a_remote_worker_paints_from_what_it_is_sent(place: Path, models: Path) -> None:
    graph = json.loads((API / "image_to_image.json").read_text(encoding="utf-8"))
    graph["6"]["inputs"] |= {"steps": 1}
    Image.new("RGB", (32, 32), "red").save(place / "example.png")
    painter = RemotePainter({"models": str(models), "shared": 1, "latents": False})
    here = of_models(graph, painter._classes | image_nodes(place, place, {}))
    sent = {"example.png": (place / "example.png").read_bytes()}
    differing = painter.answer("a", graph, [], here | {"ae.safetensors": "another"}, sent)
    assert differing["differ"]["ae.safetensors"] == here["ae.safetensors"]
    answer = painter.answer("a", graph, [], here, sent)
    assert answer["pictures"]["a.png"].startswith(b"\x89PNG")
    with pytest.raises(MajicFluxError, match="leads out of the folder"):
        painter.answer("b", graph, [], here, {"../out.png": b""})
