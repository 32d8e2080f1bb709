"""The lease on a run directory: one writer at a time, and a writer that was replaced commits nothing.

The file lease.json names its owner and when the lease ends; the owner renews it. Reading and replacing it happens under
a lock, so that of two processes that find an ended lease only one takes it over.
"""

import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pipeline.errors import Incomplete, Refusal
from pipeline.files import read_text, write_file
from pipeline.settings import Settings

LEASE_NAME, LOCK_NAME = "lease.json", ".lease.lock"
_LASTS_SECONDS = 60.0
_RENEWED_EVERY_SECONDS = 5.0


class LeaseLost(Incomplete):
    """Another process has taken the run directory over."""


class Holder(Settings):
    """Who holds a lease. A process id means something on its host and, in containers that share a host's name, only in
    its pid namespace; `started` tells processes apart that had the same id one after the other."""

    owner: str
    host: str
    pid_namespace: str
    pid: int
    started: str | None
    ends: float

    @classmethod
    def here(cls, owner: str) -> "Holder":
        """This process, from now on."""
        namespace = Path("/proc/self/ns/pid")
        return cls(
            owner=owner,
            host=socket.gethostname(),
            pid_namespace=os.readlink(namespace) if namespace.exists() else "",
            pid=os.getpid(),
            started=_started(os.getpid()),
            ends=time.time() + _LASTS_SECONDS,
        )

    def is_dead(self) -> bool:
        """Whether the process is known to be gone, which only its own host can tell."""
        here = Holder.here("")
        is_neighbour = (self.host, self.pid_namespace) == (here.host, here.pid_namespace)
        return is_neighbour and _started(self.pid) != self.started


@dataclass(frozen=True)
class LeaseGuard:
    """What a worker needs to know to commit: the directory and whose lease it works under. Can be sent anywhere."""

    directory: Path
    owner: str

    @property
    def is_ours(self) -> bool:
        """Whether the directory, as this process sees it, is the owner's: not another's by now, nor of another host."""
        holder = _read(self.directory)
        return holder is not None and holder.owner == self.owner

    def check(self) -> None:
        """Raises LeaseLost unless the lease is still this owner's and has not ended."""
        holder = _read(self.directory)
        if holder is None or holder.owner != self.owner:
            raise LeaseLost(f"{self.directory}: another process has taken this run over; this one writes nothing more")
        if time.time() > holder.ends:
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
        with suppress(Incomplete, OSError):
            if not self.guard.is_ours:
                return
            with _locked(directory):
                if self.guard.is_ours:
                    (directory / LEASE_NAME).unlink()
                    (directory / LOCK_NAME).unlink()

    def _renew(self) -> None:
        while not self._released.wait(_RENEWED_EVERY_SECONDS):
            # a storage that refuses writes for a while costs a renewal; if it lasts, the guard finds the lease ended
            with suppress(Incomplete, OSError):
                if not self.guard.is_ours:
                    return
                with _locked(self.guard.directory):
                    if self.guard.is_ours:
                        _write(self.guard.directory, self.guard.owner)


def holder(directory: Path) -> Holder | None:
    """Who holds the lease on a directory, or left it behind; None where nobody did."""
    return _read(directory)


def refuse_live(directory: Path) -> None:
    """Raises Refusal where another process holds the lease; changes nothing."""
    holder = _read(directory)
    if holder is not None and not holder.is_dead() and time.time() <= holder.ends:
        raise Refusal(
            f"output.path = {directory}: process {holder.pid} on {holder.host} is running it; wait for that run, "
            f"or for its lease to end in {max(0, holder.ends - time.time()):.0f} s if it is gone"
        )


def acquire(directory: Path) -> tuple[Lease, str | None]:
    """Take the lease, and a sentence if it had to be taken over. Raises Refusal where the directory is in use."""
    refuse_live(directory)
    with _locked(directory):
        refuse_live(directory)
        holder = _read(directory)
        owner = uuid.uuid4().hex
        _write(directory, owner)
    if holder is None:
        return Lease(directory, owner), None
    reason = "is dead" if holder.is_dead() else "let its lease end"
    return Lease(directory, owner), f"taking over from process {holder.pid} on {holder.host}, which {reason}"


def _started(pid: int) -> str | None:
    """When a process of this host started, None if there is none: process ids are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # a zombie has ended, though its parent has not asked yet
        return None if fields[0] in "ZX" else fields[19]
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
    # a file opened for writing: network file systems refuse to lock anything else, or do it on one host only
    path = directory / LOCK_NAME
    while True:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # whoever releases the lease removes the file: a lock on a removed one excludes nobody
            if _inode(path) == os.fstat(file.fileno()).st_ino:
                yield
                return


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _read(directory: Path) -> Holder | None:
    file = directory / LEASE_NAME
    try:
        return Holder.model_validate_json(read_text(file))
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError):
        raise Refusal(f"{file}: cannot be read; delete it if no process is running this directory") from None


def _write(directory: Path, owner: str) -> None:
    write_file(directory / LEASE_NAME, Holder.here(owner).model_dump_json(indent=1).encode())
