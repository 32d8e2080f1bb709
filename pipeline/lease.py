"""The lease on a run directory: one writer at a time, and a writer that was replaced commits nothing.

The file lease.json names its owner and when the lease ends; the owner renews it. Reading and replacing it happens under
a lock on the directory, so that of two processes that find an ended lease only one takes it over.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import Incomplete, Refusal
from pipeline.files import write_file

LEASE_NAME = "lease.json"
_LASTS_SECONDS = 60.0
_RENEWED_EVERY_SECONDS = 5.0


class LeaseLost(Incomplete):
    """Another process has taken the run directory over."""


@dataclass(frozen=True)
class LeaseGuard:
    """What a worker needs to know to commit: the directory and whose lease it works under. Can be sent anywhere."""

    directory: Path
    owner: str

    def check(self) -> None:
        """Raises LeaseLost unless the lease is still this owner's and has not ended."""
        holder = _read(self.directory)
        if holder is None or holder["owner"] != self.owner:
            raise LeaseLost(f"{self.directory}: another process has taken this run over; this one writes nothing more")
        if time.time() > holder["ends"]:
            raise LeaseLost(f"{self.directory}: the lease ended, its owner did not renew it; run again to resume")


class Lease:
    """The lease held by this process, renewed by a thread until it is released."""

    def __init__(self, directory: Path, owner: str) -> None:
        self.guard = LeaseGuard(directory, owner)
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        directory = self.guard.directory
        with _locked(directory):
            holder = _read(directory)
            if holder is not None and holder["owner"] == self.guard.owner:
                (directory / LEASE_NAME).unlink()

    def _renew(self) -> None:
        while not self._released.wait(_RENEWED_EVERY_SECONDS):
            # a storage that refuses writes for a while costs a renewal; if it lasts, the guard finds the lease ended
            with suppress(Incomplete, OSError), _locked(self.guard.directory):
                holder = _read(self.guard.directory)
                if holder is None or holder["owner"] != self.guard.owner:
                    return
                _write(self.guard.directory, self.guard.owner)


def refuse_live(directory: Path) -> None:
    """Raises Refusal where another process holds the lease; changes nothing."""
    holder = _read(directory)
    if holder is not None and not _is_dead(holder) and time.time() <= holder["ends"]:
        raise Refusal(
            f"output.path = {directory}: process {holder['pid']} on {holder['host']} is running it; wait for that run, "
            f"or for its lease to end in {max(0, holder['ends'] - time.time()):.0f} s if it is gone"
        )


def acquire(directory: Path) -> tuple[Lease, str | None]:
    """Take the lease, and a sentence if it had to be taken over. Raises Refusal where the directory is in use."""
    with _locked(directory):
        refuse_live(directory)
        holder = _read(directory)
        owner = uuid.uuid4().hex
        _write(directory, owner)
    if holder is None:
        return Lease(directory, owner), None
    reason = "is dead" if _is_dead(holder) else "let its lease end"
    return Lease(directory, owner), f"taking over from process {holder['pid']} on {holder['host']}, which {reason}"


@dataclass(frozen=True)
class _Host:
    """Where a process id means something: the host and, for containers that share its name, the pid namespace."""

    host: str
    pid_namespace: str

    @classmethod
    def here(cls) -> "_Host":
        namespace = Path("/proc/self/ns/pid")
        return cls(socket.gethostname(), os.readlink(namespace) if namespace.exists() else "")


def _is_dead(holder: dict[str, Any]) -> bool:
    here = _Host.here()
    if (holder["host"], holder["pid_namespace"]) != (here.host, here.pid_namespace):
        return False
    return bool(_started(holder["pid"]) != holder["started"])


def _started(pid: int) -> str | None:
    """When a process of this host started, None if there is none: process ids are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(directory: Path) -> dict[str, Any] | None:
    try:
        holder = json.loads((directory / LEASE_NAME).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    assert isinstance(holder, dict)
    return holder


def _write(directory: Path, owner: str) -> None:
    holder = {
        "owner": owner,
        **asdict(_Host.here()),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "renewed": time.time(),
        "ends": time.time() + _LASTS_SECONDS,
    }
    write_file(directory / LEASE_NAME, json.dumps(holder, indent=1).encode())
