"""Hosts made of Linux namespaces: they share the disk and the clock of this machine and nothing else. Needs root.

Each has its own network, process ids, mounts, name, shared memory and Ray, and a cable to a switch. Where one is
killed, its cable is cut first: the others hear nothing of it, as when a machine loses power.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

PORT = 6379
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
_BIN = Path(sys.executable).parent


def why_not() -> str | None:
    """Why this machine can have no such hosts, None if it can."""
    if os.geteuid() != 0:
        return "hosts are made of network, process and mount namespaces, which only root may make"
    name = f"try-{os.getpid()}"
    for command in (
        ["ip", "netns", "add", name],
        ["ip", "netns", "delete", name],
        ["unshare", "--pid", "--fork", "true"],
    ):
        try:
            tried = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            return f"there is no command {command[0]!r}"
        if tried.returncode:
            return f"{' '.join(command)}: {tried.stderr.strip()}"
    return None


class Network:
    """A switch, and the hosts that are plugged into it. All of them end with the context.

    Every command on a host finds `environment`.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.environment = {**ENVIRONMENT, **(environment or {})}
        self.prefix = f"shardprune-{os.getpid()}"
        self.switch = f"{self.prefix}-switch"
        self.hosts: list[Host] = []
        self.numbers = itertools.count(1)

    def __enter__(self) -> Self:
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self.hosts:
            host.kill()
        _ip("netns", "delete", self.switch)

    def host(self, name: str, folders: Mapping[Path, str] | None = None) -> "Host":
        """A running host. `folders`: places where it has a small disk of its own, with their sizes as mount has it."""
        host = Host(self, name, f"10.99.0.{len(self.hosts) + 1}", folders or {})
        self.hosts.append(host)
        host.start()
        return host


class Host:
    """One of a network's. Commands run in it see its processes, network and folders only."""

    def __init__(self, network: Network, name: str, address: str, folders: Mapping[Path, str]) -> None:
        self.network, self.name, self.address = network, name, address
        self._space = f"{network.prefix}-{name}"
        self._folders = {Path("/dev/shm"): "2g", Path("/tmp/ray"): "1g", **folders}
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Switch it on: nothing runs in it."""
        port = f"port{next(self.network.numbers)}"
        _ip("netns", "add", self._space)
        switch = self.network.switch
        _ip("link", "add", "eth0", "netns", self._space, "type", "veth", "peer", "name", port, "netns", switch)
        _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", self._space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self._space, "link", "set", "lo", "up")
        self.mend()
        mounts = [
            f"mkdir -p {folder} && mount -t tmpfs -o size={size} tmpfs {folder}"
            for folder, size in self._folders.items()
        ]
        # bash stays as the first process, since it waits for those that nobody else waits for
        script = " && ".join([f"hostname {self.name}", *mounts, "echo ready", "sleep infinity & wait"])
        namespaces = ["unshare", "--pid", "--mount", "--uts", "--fork", "--mount-proc", "--kill-child"]
        # hosts end with this process, also where it is killed itself
        bound = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self._space]
        command = [*bound, *namespaces, "bash", "-c", script]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        """Gone at once with all that runs in it, and without a word to the others."""
        if self._process is not None:
            self.cut()
            self._process.kill()
            self._process.wait()
            self._process = None
            _ip("netns", "delete", self._space)

    def cut(self) -> None:
        """Cut the cable."""
        _ip("-n", self._space, "link", "set", "eth0", "down")

    def mend(self) -> None:
        """The cable is whole again."""
        _ip("-n", self._space, "link", "set", "eth0", "up")

    def command(self, *arguments: object) -> list[str]:
        """The command that runs another one in this host, in the folder that this process is in."""
        assert self._process is not None
        (first,) = psutil.Process(self._process.pid).children()
        inside = ["nsenter", "--target", str(first.pid), "--net", "--pid", "--mount", "--uts"]
        settings = [f"{name}={value}" for name, value in self.network.environment.items()]
        return [*inside, "env", f"--chdir={Path.cwd()}", *settings, *map(str, arguments)]

    def run(self, *arguments: object) -> str:
        """What a command prints that runs in this host."""
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True)
        assert done.returncode == 0, (arguments, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout

    def start_ray(self, head: "Host", num_cpus: int, *options: str) -> None:
        """A Ray node on this host, the head itself or one that joins it."""
        where = [f"--address={head.address}:{PORT}"]
        if head is self:
            where = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        store = [] if any("object-store" in option for option in options) else ["--object-store-memory=100000000"]
        self.run(
            *(_BIN / "ray", "start", *where, f"--node-ip-address={self.address}", f"--num-cpus={num_cpus}"),
            *("--include-log-monitor=false", *store, *options),
        )

    def node_id(self) -> str:
        """Of the Ray node on this host, as its processes have been told."""
        told: Iterator[str] = itertools.chain.from_iterable(process.cmdline() for process in self.processes(""))
        return next(word.partition("=")[2] for word in told if word.startswith(("--node-id=", "--node_id=")))

    def processes(self, beginning: str) -> Iterator[psutil.Process]:
        """Those that run in this host and whose command begins so."""
        if self._process is None:
            return
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                command = process.cmdline()
            except psutil.Error:
                continue
            if command and command[0].startswith(beginning):
                yield process


def _ip(*arguments: Any) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, (arguments, done.stderr)
