"""A process of some host, and whether it is known to be gone."""

import os
import socket
from pathlib import Path

from pipeline.settings import Settings

_HIDDEN = "unknown"


class Process(Settings):
    """A process id means something on its host and, in containers that share a host's name, only in its pid namespace;
    `started` tells processes apart that had the same id one after the other, `boot` hosts that have the same name."""

    host: str
    boot: str
    pid_namespace: str
    pid: int
    started: str | None

    @classmethod
    def here(cls) -> "Process":
        """This process."""
        namespace, boot = Path("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id")
        return cls(
            host=socket.gethostname(),
            boot=boot.read_text().strip() if boot.exists() else "",
            pid_namespace=os.readlink(namespace) if namespace.exists() else "",
            pid=os.getpid(),
            started=_started(os.getpid()),
        )

    def is_dead(self) -> bool:
        """Whether the process is known to be gone, which only its own host can tell."""
        if not self.is_neighbour:
            return False
        now = _started(self.pid)
        return now is None or (now != self.started and _HIDDEN not in (now, self.started))

    @property
    def is_neighbour(self) -> bool:
        """Whether it is, or was, a process of this host as this one is."""
        here = Process.here()
        return (self.host, self.boot, self.pid_namespace) == (here.host, here.boot, here.pid_namespace)


def _started(pid: int) -> str | None:
    """When a process of this host started, None if there is none: process ids are used again.

    _HIDDEN where there is one, and nothing is told of it.
    """
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
    return _HIDDEN
