"""Watching a process that was started: moments to look at it, its memory, and the CPU seconds of those that ended."""

import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil

SHORTEST_PAUSE_SECONDS = 0.05


def looks(process: subprocess.Popen[bytes], pause: int = 20) -> Iterator[None]:
    """Moments to look at a process, until it has ended.

    A look at memory walks all page tables: a pause is so many times as long as the look before it, which leaves the
    process, by default, all but a twentieth of a core.
    """
    while process.poll() is None:
        before = time.monotonic()
        yield
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(SHORTEST_PAUSE_SECONDS, pause * (time.monotonic() - before)))


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
