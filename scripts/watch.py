"""Watching a process that was started: moments to look at it, its memory, and the CPU seconds of those that ended."""

import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil

# A look at memory walks all page tables of the process: it may take a twentieth of a core.
SHORTEST_PAUSE_SECONDS, SHARE = 0.05, 20


def looks(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Moments to look at a process, until it has ended; a pause is as long as the look before it asks for."""
    while process.poll() is None:
        before = time.monotonic()
        yield
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(SHORTEST_PAUSE_SECONDS, SHARE * (time.monotonic() - before)))


def unique_bytes(pid: int) -> int:
    """What a process has for itself (unique set size), 0 if it has ended."""
    try:
        return int(psutil.Process(pid).memory_full_info().uss)
    except psutil.Error:
        return 0


def ended_cpu_seconds() -> float:
    """Of all processes that have been started from here and have ended, and of those they waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
