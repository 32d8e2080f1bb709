"""The ways in which a run is disturbed: each is a function of a scene, and tells what it has done.

A fault returns when what it broke is whole again, but for workers and drivers, which it leaves to those who replace
them. It returns None where there was nothing to strike.
"""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from hosts import PORT, Host

NUM_CPUS, STORE_BYTES, SPILL_SIZE = 2, 80_000_000, "32m"
_WORKER, _PYTHON, _SCRIPTS = "ray::ShardActor", Path(sys.executable), Path(__file__).parent


@dataclass
class Scene:
    """`hosts`: the head, which runs the driver, and those that run workers; none where a run has a Ray of its own.

    `storage`: the disk that the run directory lies on. `spill`: the disk of each host that its objects spill to.
    `ends`: when the run that is disturbed has taken too long.
    """

    chance: random.Random
    storage: Path
    spill: Path
    hosts: list[Host] = field(default_factory=list)
    driver: "subprocess.Popen[bytes] | None" = None
    ends: float = 0.0

    @property
    def is_running(self) -> bool:
        return self.driver is not None and self.driver.poll() is None and time.monotonic() < self.ends

    @property
    def address(self) -> str:
        return f"{self.hosts[0].address}:{PORT}" if self.hosts else "local"

    def start_ray(self, host: Host) -> None:
        options = [f"--object-store-memory={STORE_BYTES}", f"--object-spilling-directory={self.spill}"]
        host.start_ray(self.hosts[0], 0 if host is self.hosts[0] else NUM_CPUS, *options)

    def workers(self, beginning: str) -> list[psutil.Process]:
        """The workers that there are now."""
        if self.hosts:
            return [worker for host in self.hosts[1:] for worker in host.processes(beginning)]
        return list(self._of_driver(beginning))

    def some_worker(self, is_busy: bool = False) -> psutil.Process | None:
        """One of the workers, as soon as there is one, or one that is at work."""
        while self.is_running:
            # while a call runs, Ray adds its name
            if workers := self.workers(f"{_WORKER}." if is_busy else _WORKER):
                return self.chance.choice(workers)
            time.sleep(0.05)
        return None

    def some_host(self) -> Host | None:
        """A host that runs a worker, as soon as there is one."""
        while self.is_running:
            if busy := [host for host in self.hosts[1:] if any(host.processes(_WORKER))]:
                return self.chance.choice(busy)
            time.sleep(0.05)
        return None

    def driver_process(self) -> psutil.Process | None:
        """The driver itself, which in a host is a child of what started it there."""
        assert self.driver is not None
        with suppress(psutil.Error):
            process = psutil.Process(self.driver.pid)
            return next(iter(process.children()), None) if self.hosts else process
        return None

    def _of_driver(self, beginning: str) -> Iterator[psutil.Process]:
        assert self.driver is not None
        with suppress(psutil.Error):
            for process in psutil.Process(self.driver.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if process.cmdline()[:1] and process.cmdline()[0].startswith(beginning):
                        yield process


def kill_worker(scene: Scene) -> str | None:
    worker = scene.some_worker()
    if worker is None:
        return None
    with suppress(psutil.NoSuchProcess):
        worker.kill()
        return "SIGKILL"
    return None


def kill_driver(scene: Scene) -> str | None:
    driver = scene.driver_process()
    if driver is None:
        return None
    with suppress(psutil.NoSuchProcess):
        driver.kill()
        return "SIGKILL"
    return None


def kill_node(scene: Scene) -> str | None:
    host = scene.some_host()
    if host is None:
        return None
    return _lose(scene, host, scene.chance.uniform(0, 8))


def give_notice(scene: Scene) -> str | None:
    """Preemption: Ray is told that a node will go, and some seconds later its host is gone."""
    host, seconds = scene.some_host(), scene.chance.randint(4, 12)
    if host is None:
        return None
    host.run(
        *(_PYTHON.with_name("ray"), "drain-node", "--address", scene.address, "--node-id", host.node_id()),
        *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "preempted"),
        *("--deadline-remaining-seconds", seconds),
    )
    time.sleep(seconds)
    return f"{seconds} s of notice, then {_lose(scene, host, scene.chance.uniform(0, 4))}"


def fill_object_store(scene: Scene) -> str | None:
    seconds = scene.chance.uniform(8, 16)
    nodes = [host.address for host in scene.hosts[1:]]
    told = scene.hosts[0].run(_PYTHON, _SCRIPTS / "fill_store.py", scene.address, "--seconds", seconds, *nodes)
    # Ray tells of its own troubles too
    (held,) = (line for line in told.splitlines() if line.endswith(" held"))
    return f"{held} for {seconds:.0f} s"


def fill_storage(scene: Scene) -> str | None:
    """The disk of the run directory is full for a while."""
    seconds, filler = scene.chance.uniform(3, 10), scene.storage / "filler"
    ends = time.monotonic() + seconds
    with filler.open("wb", buffering=0) as file:
        while time.monotonic() < ends:
            try:
                file.write(bytes(2**20))
            except OSError:
                time.sleep(0.02)
    filler.unlink()
    return f"full for {seconds:.0f} s"


def stop_worker(scene: Scene) -> str | None:
    """A straggler: SIGSTOP, and SIGCONT after some seconds or never."""
    worker = scene.some_worker(is_busy=True)
    if worker is None:
        return None
    seconds = scene.chance.choice([None, scene.chance.uniform(2, 6)])
    with suppress(psutil.NoSuchProcess):
        worker.send_signal(signal.SIGSTOP)
        if seconds is None:
            return "SIGSTOP for ever"
        time.sleep(seconds)
        worker.send_signal(signal.SIGCONT)
    return f"SIGSTOP for {seconds:.0f} s"


def _lose(scene: Scene, host: Host, seconds: float) -> str:
    """A host is gone, and after some seconds a new one has taken its place."""
    host.kill()
    time.sleep(seconds)
    host.start()
    scene.start_ray(host)
    return f"host {host.name} gone, another one {seconds:.0f} s later"


FAULTS: dict[str, Callable[[Scene], str | None]] = {
    "worker killed": kill_worker,
    "node killed": kill_node,
    "driver killed": kill_driver,
    "object store full": fill_object_store,
    "storage full": fill_storage,
    "straggler": stop_worker,
    "preemption notice": give_notice,
}
WITHOUT_HOSTS = ("worker killed", "driver killed", "straggler")
