"""Workers on all machines of a Ray cluster, one a card.

The driver alone writes: it sends graphs and the pictures that they begin from, and gets pictures.
"""

import logging
import os
import re
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..host.graph import Graph
from ..host.image_nodes import picture_path
from ..messages import MajicFluxError, say
from .identity import Identity, differences, of_models, of_software
from .jobs import NodeClasses
from .pictures import FATAL, finish
from .process import MOST_STARTS, MachineRefused, Message, WorkerLost
from .rows import BatchError

log = logging.getLogger("majicflux")

LOCAL = "local"  # a cluster of this machine alone, for the length of the batch
ADDRESS = re.compile(r"([^/:\s]+):(\d{1,5})")
ANSWER_SECONDS = 5.0  # that a cluster has to answer in
LISTEN_SECONDS = 0.5
STORE_BYTES = 200 * 2**20  # of memory, for pictures on their way
PASSED_ON = ("COMFYUI_PATH", "LC_ALL", "LC_MESSAGES", "LANG")  # of the environment
INSTALL = 'pip install "ray>=2.60,<3"'
# What a client of HTTP/2 begins with, as gRPC is: its own words, and empty settings.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


class Cluster:
    """The staff of a batch: a worker for each card of each machine that is there, or comes.

    address: of a cluster, or LOCAL; setup: of the workers; processes: so many on the CPU of each
    machine instead; cards: of this machine, for LOCAL.
    """

    def __init__(
        self,
        address: str,
        setup: Message,
        classes: NodeClasses,
        processes: int | None,
        cards: Sequence[int | None],
    ):
        """Raises BatchError when there is none."""
        on_cards = processes is None and (address != LOCAL or None not in cards)
        self.ray = _ray()
        if address == LOCAL:
            _begin_here(self.ray, len(cards), on_cards)
        else:
            _join(self.ray, address)
        self.setup, self.classes = setup, classes
        self.software = of_software()
        self.refused: dict[str, str] = {}  # why, by machine
        self._resource = "GPU" if on_cards else "CPU"
        self._processes = len(cards) if address == LOCAL else processes
        self._known: set[tuple[str, int]] = set()
        self._told = False  # that nobody can paint now

    def newcomers(self, wanted: int) -> "list[ClusterWorker]":
        found = []
        for node in self.alive():
            for place in range(self._places(node)):
                if len(found) < wanted and (node["NodeID"], place) not in self._known:
                    self._known.add((node["NodeID"], place))
                    found.append(ClusterWorker(self, node, self._places(node)))
        return found

    def require_hope(self) -> None:
        if self.refused and {n["NodeManagerHostname"] for n in self.alive()} <= {*self.refused}:
            raise BatchError("\n".join(self.refused.values()))
        if not self._told:
            log.warning("No machine of the cluster can paint now; one that comes will.")
        self._told = True

    def close(self) -> None:
        self.ray.shutdown()

    def alive(self) -> list[dict[str, Any]]:
        """The machines that have a place for a worker."""
        return [node for node in self.ray.nodes() if node["Alive"] and self._places(node)]

    def refuse(self, machine: str, reason: str) -> None:
        if machine not in self.refused:
            self.refused[machine] = say(
                "{machine} paints nothing: {reason}", machine=machine, reason=reason
            )
            log.warning("%s", self.refused[machine])

    def actor_on(self, node_id: str, shared: int) -> Any:
        """A new worker on that machine. shared: by how many the machine is."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from .remote import RemotePainter

        on_card = self._resource == "GPU"
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {} if on_card else {"CUDA_VISIBLE_DEVICES": ""}
        actor = self.ray.remote(
            num_cpus=0 if on_card else 1,
            num_gpus=1 if on_card else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            runtime_env={"env_vars": environment},
            max_restarts=0,  # they are begun anew here, where their jobs are known
        )(RemotePainter)
        return actor.remote(self.setup | {"shared": shared})

    def _places(self, node: dict[str, Any]) -> int:
        there = int(node["Resources"].get(self._resource, 0))
        return there if self._processes is None else min(there, self._processes)


class ClusterWorker:
    """One place for a worker on a machine, and the actor that has it."""

    def __init__(self, cluster: Cluster, node: dict[str, Any], shared: int):
        self._cluster, self._node_id, self._shared = cluster, node["NodeID"], shared
        self._actor: Any = None
        self._stopped = False
        self.machine, self.card = node["NodeManagerHostname"], ""

    def start(self) -> bool:
        """Waits for as long as others have the card."""
        failures = 0
        while self._actor is None:
            if not self._is_wanted():
                return False
            self._actor = self._cluster.actor_on(self._node_id, self._shared)
            try:
                told = self._result(self._actor.begin.remote())
            except WorkerLost as error:
                self.end()
                if self._stopped:
                    raise
                failures += 1
                if failures == MOST_STARTS and self._is_wanted():
                    self._cluster.refuse(self.machine, str(error))
                continue
            self.machine, self.card = told["machine"], told["card"]
            self._require_same(self._cluster.software, told["software"])
        return True

    def paint(self, id: str, graph: Graph, coming: Sequence[Graph]) -> Message:
        setup = self._cluster.setup
        try:
            models = of_models(graph, self._cluster.classes)
            pictures = _pictures_of(graph, Path(setup["input"]), Path(setup["output"]))
        except (MajicFluxError, OSError) as error:  # it was there when the batch began
            return {"problem": str(error), "fatal": False}
        try:
            call = self._actor.answer.remote(id, graph, coming, models, pictures)
            answer = self._result(call)
        except WorkerLost:
            self.end()
            raise
        if "differ" in answer:
            self._require_same(models, answer["differ"])
            raise MachineRefused
        if answer.get("last"):
            self.end()
        return self._kept(answer)

    def end(self) -> None:
        actor, self._actor = self._actor, None
        if actor is not None:
            self._cluster.ray.kill(actor)

    def stop(self) -> None:
        self._stopped = True

    def _require_same(self, wanted: Identity, found: Identity) -> None:
        """Refuse the machine where it would not paint as this one."""
        if names := differences(wanted, found):
            reason = say("{names} there are not those of this machine.", names=", ".join(names))
            self._cluster.refuse(self.machine, reason)
            self.end()

    def _is_wanted(self) -> bool:
        there = {node["NodeID"] for node in self._cluster.alive()}
        return self._node_id in there and self.machine not in self._cluster.refused

    def _result(self, call: Any) -> Message:
        """Raises WorkerLost when there is none."""
        ray = self._cluster.ray
        try:
            while not ray.wait([call], timeout=LISTEN_SECONDS)[0]:
                if self._stopped:
                    raise WorkerLost
            return ray.get(call)
        except ray.exceptions.RayError as error:
            raise WorkerLost(str(error)) from error

    def _kept(self, answer: Message) -> Message:
        """The answer, once its files are in their folder."""
        setup = self._cluster.setup
        try:
            for kind in ("latents", "pictures"):
                for name, content in answer.get(kind, {}).items():
                    part = Path(setup["parts"], name)
                    part.write_bytes(content)
                    answer[kind][name] = finish(part, Path(setup["output"], name))
        except OSError as error:
            reason = error.strerror or error
            problem = say(
                "{file} cannot be written: {reason}.", file=setup["output"], reason=reason
            )
            return {"problem": problem, "fatal": error.errno in FATAL}
        return answer


def _ray() -> Any:
    """Ray, which reads its environment as it is imported. Raises BatchError."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # without one a port runs anybody's code
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "5")  # to join, in about as many seconds
    try:
        import ray
    except ImportError as error:
        raise BatchError(
            say("Ray is not installed. Install it with: {command}", command=INSTALL)
        ) from error
    return ray


def _begin_here(ray: Any, places: int, on_cards: bool) -> None:
    """Start a cluster of this machine, which ends with this process."""
    from ray._private import services

    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray would put the address in its place that other machines see, and answer there.
    services.resolve_ip_for_localhost = str
    ray.init(
        address=LOCAL,
        num_cpus=0 if on_cards else places,
        num_gpus=places if on_cards else 0,
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )


def _join(ray: Any, address: str) -> None:
    """Raises BatchError when there is no cluster, or it does not let us in."""
    parts = ADDRESS.fullmatch(address)
    if parts is None:
        raise BatchError(
            say(
                "--ray {address}: give HOST:PORT, such as 192.168.1.10:6379, or local.",
                address=address,
            )
        )
    _require_answer(parts[1], int(parts[2]))
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # anything: what Ray raises is not written down
        raise BatchError(
            say(
                "The Ray cluster at {address} did not let this machine in: {reason}. Do both have "
                "the same token, and is this machine one of the cluster's?",
                address=address,
                reason=str(error).strip().split(". ")[0],
            )
        ) from error


def _require_answer(host: str, port: int) -> None:
    """Raises BatchError when no gRPC answers there, for which Ray would wait long."""
    reason: object = say("it does not speak as Ray does")
    try:
        with socket.create_connection((host, port), ANSWER_SECONDS) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(PREFACE)
            frame = connection.recv(9)
        if frame[3:4] == b"\x04":  # settings, which a server begins with
            return
    except (OSError, OverflowError) as error:
        reason = error
    raise BatchError(
        say(
            "No Ray cluster answers at {address}: {reason}. Is it started, and its port open?",
            address=f"{host}:{port}",
            reason=reason,
        )
    )


def _pictures_of(graph: Graph, input_folder: Path, output_folder: Path) -> dict[str, bytes]:
    """The files that LoadImage reads, by the names that the graph has for them."""
    names = [n["inputs"]["image"] for n in graph.values() if n["class_type"] == "LoadImage"]
    return {
        name: picture_path(input_folder, output_folder, name).read_bytes()
        for name in names
        if isinstance(name, str)
    }
