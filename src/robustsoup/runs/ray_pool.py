"""A pool of workers on a Ray cluster, or on Ray started on this machine (extra `ray`)."""

import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from robustsoup.errors import RequestError, WorkError
from robustsoup.interruption import handled_signals
from robustsoup.printable import first_line
from robustsoup.runs.cluster import Lost
from robustsoup.runs.remote import Meeting, StepEnd, find_misfit, run_assignment
from robustsoup.runs.tasks import Key

LOCAL = "local"
OBJECT_STORE_BYTES = 80 * 2**20
"""Memory for the objects of a local Ray; steps exchange nothing but a few lines."""
CONNECT_SECONDS = 5.0
CANCEL_SECONDS = 10.0
"""How long cancelled steps may take to save their state."""


class RayPool:
    """Runs each step as a Ray task with its threads as CPUs, and one GPU if it uses one.

    Args:
        address: "local", "auto" or HOST:PORT.
        threads: CPUs of a step.
        gpus: GPUs of a step.

    Raises:
        RequestError: Ray is not installed.
    """

    most_at_once = 1000

    def __init__(self, address: str, *, threads: int, gpus: int) -> None:
        self.address, self.threads, self.gpus = address, threads, gpus
        self.ray: ModuleType = import_ray()
        self.tasks: dict[Any, Key] = {}  # keys by reference of the result
        self.head = address  # HOST:PORT once Ray is reached

    def open(self, meeting: Meeting) -> str:
        """Connect to Ray, and check a worker on each machine.

        Raises:
            RequestError: Ray is not reached, no machine is large enough, or a worker does not fit.
        """
        self._connect()
        nodes = [node for node in self.ray.nodes() if node["Alive"]]
        fitting = [node for node in nodes if self._count_slots(node)]
        if not fitting:
            needs = f"{self.threads} CPUs" + (f" and {self.gpus} GPU" if self.gpus else "")
            raise RequestError(
                f"ray: a step needs {needs}, and no machine of {self.address} has them; "
                "set --threads or --device"
            )
        for node in fitting:
            self._check_node(node, meeting)
        slots = sum(map(self._count_slots, fitting))
        machines = f"{len(fitting)} machine{'s' if len(fitting) > 1 else ''}"
        return f"ray {self.address}: {machines}, at most {slots} steps at once"

    def _connect(self) -> None:
        options: dict[str, Any] = {"logging_level": "CRITICAL", "log_to_driver": False}
        if self.address == LOCAL:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        elif self.address != "auto":
            _check_reached(self.address)
        try:
            with _kept_handlers():
                self.ray.init(address=self.address, **options)
            self.head = self.ray.get_runtime_context().gcs_address
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise RequestError(
                f"ray: {self.address} cannot be used: {first_line(error)}; "
                "give HOST:PORT of a running cluster, or local (RAY_AUTH_MODE=token if the "
                "cluster demands its token)"
            ) from error

    def _count_slots(self, node: Mapping[str, Any]) -> int:
        """Return how many steps a machine runs at once."""
        resources = node["Resources"]
        by_cpu = int(resources.get("CPU", 0) // self.threads)
        return min(by_cpu, int(resources.get("GPU", 0) // self.gpus)) if self.gpus else by_cpu

    def _check_node(self, node: Mapping[str, Any], meeting: Meeting) -> None:
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        check = self.ray.remote(num_cpus=0, max_retries=0)(find_misfit)
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        try:
            misfit = self.ray.get(check.options(scheduling_strategy=place).remote(meeting))
        except (RayError, RuntimeError) as error:
            misfit = (
                f"worker {node['NodeManagerHostname']}: robustsoup cannot be run there "
                f"({first_line(error)}); install it on every machine"
            )
        if misfit is not None:
            raise RequestError(misfit)

    def submit(self, key: Key, name: str, meeting: Meeting, content: bytes) -> None:
        """Submit a step as a task."""
        task = self.ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_retries=0)
        reference = task(run_task).options(name=name).remote(meeting, content)
        self.tasks[reference] = key

    def poll(self, seconds: float) -> Mapping[Key, StepEnd | Lost]:
        """Return how tasks ended."""
        ended, _ = self.ray.wait(list(self.tasks), num_returns=1, timeout=seconds)
        return {self.tasks.pop(reference): self._fetch(reference) for reference in ended}

    def _fetch(self, reference: Any) -> StepEnd | Lost:
        from ray import exceptions

        lost = (
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
            exceptions.LocalRayletDiedError,
            exceptions.OutOfMemoryError,
            exceptions.ObjectLostError,
        )
        try:
            return self.ray.get(reference)
        except lost as error:
            self._check_head()
            return Lost(first_line(error))
        except exceptions.RayError as error:
            raise WorkError(f"ray: a task failed: {first_line(error)}") from error

    def _check_head(self) -> None:
        """Raise WorkError if the head of the cluster is gone, for which Ray waits a minute."""
        try:
            _check_reached(self.head)
        except RequestError as error:
            raise WorkError(
                f"ray: the head of the cluster is gone: nothing answers at {self.head}; start Ray "
                "again and run the same command: finished steps are in the store"
            ) from error

    def close(self) -> None:
        """Interrupt the tasks, so that they save their state, and disconnect."""
        try:
            for reference in self.tasks:
                self.ray.cancel(reference, force=False, recursive=False)
            if self.tasks:
                tasks = list(self.tasks)
                self.ray.wait(tasks, num_returns=len(tasks), timeout=CANCEL_SECONDS)
        finally:
            self.ray.shutdown()


def run_task(meeting: Meeting, content: bytes) -> StepEnd | Lost:
    """Run a step in a task; SIGTERM, and SIGINT from Ray's cancelling, let it save its state.

    Args:
        meeting: What is compared first.
        content: A pickled Assignment.
    """
    with handled_signals(restore=True):
        try:
            return run_assignment(meeting, content)
        except KeyboardInterrupt:
            return Lost("the task was told to end", saved=True)


def import_ray() -> ModuleType:
    """Return the module ray; RequestError where it is not installed."""
    try:
        import ray
    except ImportError:
        raise RequestError("ray is not installed; pip install 'robustsoup[ray]'") from None
    return ray


def _check_reached(address: str) -> None:
    """Raise RequestError unless something listens at HOST:PORT, which Ray would await for long."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")  # an IPv6 address
    if not host or not port.isdecimal() or "/" in host:
        raise RequestError(f"--ray: got {address}, expected local, auto or HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(
            f"--ray: nothing answers at {address} ({reason}); start Ray there, or use local"
        ) from None


@contextmanager
def _kept_handlers() -> Iterator[None]:
    """Restore the handler of SIGTERM, which Ray replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
