"""Watching a process that was started: moments to look at it, its memory, and the CPU seconds of those that ended."""

import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

SHORTEST_PAUSE_SECONDS = 0.05
_KILOBYTES = re.compile(r"^(VmHWM|Rss|Private_Clean|Private_Dirty):\s+(\d+) kB", re.MULTILINE)


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
    """What a process has for itself now (unique set size), 0 if it has ended."""
    try:
        return int(psutil.Process(pid).memory_full_info().uss)
    except psutil.Error:
        return 0


def most_unique_bytes(pid: int) -> int:
    """The most that a process has had for itself so far (unique set size), 0 if it has ended.

    All of its memory at its peak, which the kernel knows, so that no moment before this look is missed, less what it
    shares now: too much where it has let go of something shared since.
    """
    try:
        maps, status = (Path(f"/proc/{pid}/{name}").read_text() for name in ("smaps_rollup", "status"))
    except ProcessLookupError:
        return 0
    except FileNotFoundError:
        if not Path("/proc/self/smaps_rollup").exists():
            sys.exit("memory is looked up in /proc/PID/smaps_rollup, which is not here; run this on Linux")
        return 0
    found = {name: int(kilobytes) for name, kilobytes in _KILOBYTES.findall(maps + status)}
    if "VmHWM" not in found:
        return 0
    return (found["VmHWM"] - found["Rss"] + found["Private_Clean"] + found["Private_Dirty"]) * 1024


def forget_peak(pid: int) -> None:
    """Let the peak of a process begin at what it has now."""
    with suppress(FileNotFoundError, ProcessLookupError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def ended_cpu_seconds() -> float:
    """Of all processes that have been started from here and have ended, and of those they waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
