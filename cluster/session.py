"""A connection to Ray: what the cluster has, and waiting for what it does not have yet."""

import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.config import ClusterSettings, WorkerSettings
from pipeline.errors import Incomplete, Refusal
from pipeline.lease import LeaseGuard
from pipeline.runtime import Machine

_TOLD_EVERY_SECONDS = 30.0


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


def machine() -> Machine:
    """What every node of the cluster has: the fewest cores, and whether there are GPUs at all."""
    nodes = _alive_resources()
    return Machine(
        num_cores=max(1, int(min(resources.get("CPU", 1) for resources in nodes))),
        has_cuda=any(resources.get("GPU", 0) >= 1 for resources in nodes),
    )


def count_workers(settings: WorkerSettings, num_gpus: float) -> int:
    """How many workers fit the cluster as it is now; at least one, which is then waited for."""
    asked = {"CPU": settings.num_cpus, "GPU": num_gpus, "memory": settings.memory_bytes or 0}
    fits = [
        min(int(resources.get(name, 0) // amount) for name, amount in asked.items() if amount > 0)
        for resources in _alive_resources()
    ]
    return max(1, sum(fits))


@dataclass(frozen=True)
class Waiter:
    """Waits for calls to workers: never in silence, and never after the lease is lost."""

    guard: LeaseGuard
    tell: Callable[[str], None]

    def result(self, reference: Any, what: str) -> Any:
        """The result of a remote call. Raises what the call raised, or WorkerLost."""
        started = time.monotonic()
        while not ray.wait([reference], timeout=_TOLD_EVERY_SECONDS)[0]:
            self.guard.check()
            self.tell(f"{what}: {time.monotonic() - started:.0f} s so far; free in the cluster: {_free_resources()}")
        try:
            return ray.get(reference)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, RayError):
            raise WorkerLost(f"{what}: the worker is gone ({str(cause).strip().splitlines()[0]})")
        raise cause


def _check_reachable(address: str) -> None:
    """Raises OSError where no host answers: Ray itself would go on trying."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=10).close()


def _alive_resources() -> list[dict[str, float]]:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not nodes:
        raise Incomplete("the Ray cluster has no node that is alive; start one and run again to resume")
    return nodes


def _free_resources() -> str:
    free = ray.available_resources()
    return ", ".join(f"{free.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
