"""A connection to Ray: what the cluster has, and waiting for what it does not have yet."""

import logging
import queue
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.config import ClusterSettings, WorkerSettings
from pipeline.errors import Incomplete, Refusal
from pipeline.lease import LeaseGuard
from pipeline.runtime import Machine

T = TypeVar("T")

_TOLD_EVERY_SECONDS, _PROBED_EVERY_SECONDS = 30.0, 5.0


class WorkerLost(Exception):
    """A worker or what it held is gone; everything committed is kept."""


@contextmanager
def connected(settings: ClusterSettings) -> Iterator[None]:
    """Connected to the cluster at an address, or to a Ray of its own that ends with the context."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if ":" in settings.address:
            _check_reachable(settings.address)
        # a private Ray needs no dashboard, and a cluster that is joined has its own
        ray.init(settings.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Refusal(f"cluster.address = {settings.address!r}: no Ray cluster answers there ({reason})") from None
    # Ray ends the process on SIGTERM with a code of its own
    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def connecting(settings: ClusterSettings) -> Iterator[Callable[[], None]]:
    """What connects to Ray as soon as Ray is needed; a cluster that exists is joined at once, to see what it has."""
    with ExitStack() as stack:

        @cache
        def connect() -> None:
            if settings.address != "none":
                stack.enter_context(connected(settings))

        if settings.address not in ("none", "local"):
            connect()
        yield connect


def machine(cluster: ClusterSettings) -> Machine:
    """What a worker has: on a cluster the cores it asks for, and a GPU if there are any."""
    if cluster.address in ("none", "local"):
        return Machine.here()
    has_cuda = any(resources.get("GPU", 0) >= 1 for resources in _alive_resources())
    return Machine(num_cores=max(1, int(cluster.worker.num_cpus)), has_cuda=has_cuda)


def count_workers(cluster: ClusterSettings, num_gpus: float) -> int:
    """How many workers fit the cluster as it is now; at least one, which is then waited for.

    Raises Refusal where none fits a Ray of its own, which never grows.
    """
    settings = cluster.worker
    asked = {"CPU": settings.num_cpus, "GPU": num_gpus, "memory": settings.memory_bytes or 0}
    fits = [
        min(int(resources.get(name, 0) // amount) for name, amount in asked.items() if amount > 0)
        for resources in _alive_resources()
    ]
    if cluster.address == "local" and not sum(fits):
        raise Refusal(f"cluster.worker = {_describe(asked)}: more than this machine has; ask for less")
    return max(1, sum(fits))


@dataclass(frozen=True)
class Waiter:
    """Waits for calls to workers: never in silence, and never after the lease is lost."""

    guard: LeaseGuard
    tell: Callable[[str], None]

    def result(self, reference: Any, what: str) -> Any:
        """The result of a remote call. Raises what the call raised, or WorkerLost."""
        self._wait(lambda seconds: bool(ray.wait([reference], timeout=seconds)[0]), what)
        try:
            return ray.get(reference)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(cause, RayError):
                raise WorkerLost(f"{what}: the worker is gone ({str(cause).strip().splitlines()[0]})") from None
            raise cause from error

    def next(self, results: "queue.Queue[T]", what: str) -> T:
        """The next of the results that another thread gives."""
        found: list[T] = []

        def is_there(seconds: float) -> bool:
            with suppress(queue.Empty):
                found.append(results.get(timeout=seconds))
            return bool(found)

        self._wait(is_there, what)
        return found[0]

    def _wait(self, is_there: Callable[[float], bool], what: str) -> None:
        started = time.monotonic()
        told = started
        while not is_there(_PROBED_EVERY_SECONDS):
            self.guard.check()
            _check_head()
            if time.monotonic() - told >= _TOLD_EVERY_SECONDS:
                told = time.monotonic()
                free = _describe({name: ray.available_resources().get(name, 0) for name in ("CPU", "GPU")})
                self.tell(f"{what}: {told - started:.0f} s so far; free in the cluster: {free}")


def gpus_of_worker(settings: WorkerSettings, device: str) -> float:
    """GPUs that a worker asks for: one where it computes on one, unless told otherwise."""
    return float(device == "cuda") if settings.num_gpus == "auto" else settings.num_gpus


def _check_reachable(address: str) -> None:
    """Raises OSError where no host answers: Ray itself would go on trying."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _alive_resources() -> list[dict[str, float]]:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not nodes:
        raise Incomplete("the Ray cluster has no node that is alive; run again to resume")
    return nodes


def _check_head() -> None:
    """Raises Incomplete where the head of the cluster is gone: Ray itself ends the process, with a code of its own."""
    try:
        _check_reachable(ray.get_runtime_context().gcs_address)
    except OSError as error:
        raise Incomplete(f"the head of the Ray cluster is gone ({error}); run again to resume") from None


def _describe(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
