"""A connection to Ray: what the cluster has, and waiting for what it does not have yet."""

import logging
import queue
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import ray
from ray.exceptions import AuthenticationError, ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from cluster.reasons import in_a_line, unreachable, without_token
from cluster.recovery import Loss
from pipeline.config import ClusterSettings, RunConfig, WorkerSettings
from pipeline.errors import Incomplete, Refusal
from pipeline.lease import LeaseGuard, LeaseLost
from pipeline.replicas import ReplicaLost
from pipeline.runtime import Machine
from pipeline.storage import concealed

T = TypeVar("T")

_TOLD_EVERY_SECONDS, _PROBED_EVERY_SECONDS = 30.0, 5.0


class WorkerLost(Exception):
    """A worker or what it held is gone; everything committed is kept."""

    def __init__(self, message: str, loss: Loss = Loss.WORKER) -> None:
        super().__init__(message)
        self.loss = loss


@contextmanager
def connected(settings: ClusterSettings) -> Iterator[None]:
    """Connected to the cluster at an address, or to a Ray of its own that ends with the context.

    Raises Incomplete where nobody answers, Refusal where what answers cannot be joined.
    """
    where = concealed(f"cluster.address = {settings.address!r}")
    try:
        if ":" in settings.address:
            _check_reachable(settings.address)
        with _keeping_sigterm(settings.address):
            # a private Ray needs no dashboard, and a cluster that is joined has its own
            ray.init(settings.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except AuthenticationError:
        raise without_token(where) from None
    except OSError as error:
        raise unreachable(where, concealed(in_a_line(error))) from None
    except (ValueError, RuntimeError) as error:
        raise Refusal(f"{where}: no Ray cluster to join there ({concealed(in_a_line(error))})") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _keeping_sigterm(address: str) -> Iterator[None]:
    """SIGTERM means what it meant before, whatever Ray makes of it: it ends the process with a code of its own, and
    while it joins a cluster may even lose it."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    # the processes of a private Ray would inherit it, and could not be ended
    waits = {signal.SIGTERM} if address != "local" else set()
    signal.pthread_sigmask(signal.SIG_BLOCK, waits)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, waits)


@contextmanager
def connecting(settings: ClusterSettings) -> Iterator[Callable[[], None]]:
    """What connects to Ray as soon as Ray is needed; a cluster that exists is joined at once, to see what it has."""
    with ExitStack() as stack:

        @cache
        def connect() -> None:
            if settings.address != "none":
                stack.enter_context(connected(settings))

        if not settings.is_here:
            connect()
        yield connect


def machine(config: RunConfig) -> Machine:
    """What a worker has: in this process all there is, on a Ray of this machine its share of that, else the cores it
    asks for; and a GPU if it asks for one or there are any."""
    cluster, here = config.cluster, Machine.here()
    if cluster.address == "none":
        return here
    num_cores = max(1, int(cluster.worker.num_cpus))
    if cluster.address == "local":
        # pruned propagation keeps one team busy
        is_one_team = config.pruning.propagation == "pruned"
        at_once = cluster.num_replicas if is_one_team else here.num_cores // num_cores
        return Machine(max(num_cores, here.num_cores // max(1, at_once)), here.has_cuda)
    # an autoscaler brings the GPUs that are asked for only once somebody waits for them
    is_asked = cluster.worker.num_gpus not in ("auto", 0)
    has_cuda = is_asked or any(resources.get("GPU", 0) >= 1 for resources in _alive_resources())
    return Machine(num_cores, has_cuda)


def count_workers(cluster: ClusterSettings, num_gpus: float, num_needed: int = 1) -> int:
    """How many workers fit the cluster as it is now; at least as many as are needed, which are then waited for.

    Raises Refusal where fewer fit a Ray of its own, which never grows.
    """
    settings = cluster.worker
    asked = {"CPU": settings.num_cpus, "GPU": num_gpus, "memory": settings.memory_bytes or 0}
    fits = [
        min(int(resources.get(name, 0) // amount) for name, amount in asked.items() if amount > 0)
        for resources in _alive_resources()
    ]
    if cluster.address == "local" and not sum(fits):
        raise Refusal(f"cluster.worker = {_describe(asked)}: more than this machine has; ask for less")
    if cluster.address == "local" and sum(fits) < num_needed:
        raise Refusal(
            f"cluster.num_replicas = {num_needed}: this machine has room for {sum(fits)} workers of "
            f"{_describe(asked)}; ask for fewer or smaller ones"
        )
    return max(num_needed, sum(fits))


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to be taken away. Ray tells it nowhere but in a private place."""
    try:
        from ray._private.state import state

        return set(state.get_draining_nodes())
    except (ImportError, AttributeError):
        return set()


@dataclass(frozen=True)
class Waiter:
    """Waits for calls to workers: never in silence, and never after the lease is lost."""

    guard: LeaseGuard
    tell: Callable[[str], None]

    def ready(self, awaited: Mapping[Any, str], watch: Callable[[], None]) -> list[Any]:
        """Those of some references that are there, at least one; `watch` is called while there is none."""
        ready: list[Any] = []

        def is_there(seconds: float) -> bool:
            ready.extend(ray.wait(list(awaited), num_returns=1, timeout=seconds)[0])
            if not ready:
                watch()
            return bool(ready)

        self._wait(is_there, "; ".join(dict.fromkeys(awaited.values())))
        rest = [reference for reference in awaited if reference not in ready]
        return [*ready, *(ray.wait(rest, num_returns=len(rest), timeout=0)[0] if rest else [])]

    def take(self, reference: Any, what: str) -> Any:
        """The result of a call that has ended. Raises what the call raised, or WorkerLost."""
        try:
            return ray.get(reference)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            reason = in_a_line(cause)
            if isinstance(cause, ObjectStoreFullError | OutOfDiskError):
                raise WorkerLost(f"{what}: the object store has no room left ({reason})", Loss.MEMORY) from None
            # the others of a group may notice that one is gone before Ray does
            if isinstance(cause, RayError | ReplicaLost):
                raise WorkerLost(f"{what}: the worker is gone ({reason})", Loss.WORKER) from None
            if isinstance(cause, Incomplete) and not isinstance(cause, LeaseLost):
                raise WorkerLost(f"{what}: {cause}", Loss.STORAGE) from None
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

    def pause(self, seconds: float) -> None:
        """Let time pass."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            self.guard.check()
            time.sleep(min(1.0, seconds))

    def _wait(self, is_there: Callable[[float], bool], what: str) -> None:
        started = time.monotonic()
        told = started
        while not is_there(_PROBED_EVERY_SECONDS):
            self.guard.check()
            check_head()
            if time.monotonic() - told >= _TOLD_EVERY_SECONDS:
                told = time.monotonic()
                free = _describe({name: ray.available_resources().get(name, 0) for name in ("CPU", "GPU")})
                self.tell(f"{what}: {told - started:.0f} s so far; free in the cluster: {free}")


def check_head() -> None:
    """Raises Incomplete where the head of the cluster is gone: Ray itself ends the process, with a code of its own."""
    try:
        _check_reachable(ray.get_runtime_context().gcs_address)
    except OSError as error:
        raise Incomplete(f"the head of the Ray cluster is gone ({error}); run again to resume") from None


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


def _describe(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
