"""What a process and all its descendants took, seen from outside: seconds, CPU seconds, memory.

Memory is the sum of proportional set sizes, in which a page that several of them share counts once.
"""

import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from watch import ended_cpu_seconds, looks

from benchmarking.subject import read_phases


class Failed(RuntimeError):
    """A process ended with another code than 0; its output is the message."""


@dataclass(frozen=True)
class Sample:
    """CPU seconds so far and memory now, of a process and its descendants."""

    at: float
    cpu_seconds: float
    num_bytes: int


@dataclass(frozen=True)
class Measured:
    """`phases` has the beginning and the end of each, by the clock of the samples."""

    seconds: float
    cpu_seconds: float
    samples: list[Sample]
    phases: dict[str, tuple[float, float]]

    def seconds_of(self, phase: str) -> float:
        start, stop = self.phases[phase]
        return stop - start

    @property
    def seconds_of_phases(self) -> float:
        """From the beginning of the first phase to the end of the last."""
        return max(stop for _, stop in self.phases.values()) - min(start for start, _ in self.phases.values())

    def cpu_seconds_of(self, phase: str) -> float:
        """As near as the samples lie."""
        start, stop = self.phases[phase]
        return self._cpu_seconds_at(stop) - self._cpu_seconds_at(start)

    def peak_bytes_until(self, phase: str) -> int:
        """The most memory from the start of the process to the end of a phase."""
        stop = self.phases[phase][1]
        return max(sample.num_bytes for sample in self.samples if sample.at <= stop)

    def _cpu_seconds_at(self, moment: float) -> float:
        return min(self.samples, key=lambda sample: abs(sample.at - moment)).cpu_seconds


@dataclass
class _Tree:
    """The processes that a process has started and they have, also those that are gone."""

    root: psutil.Process
    cpu_seconds: dict[psutil.Process, float] = field(default_factory=dict)

    def sample(self) -> Sample:
        num_bytes = 0
        for process in self._alive():
            try:
                times = process.cpu_times()
                self.cpu_seconds[process] = times.user + times.system
                num_bytes += process.memory_full_info().pss
            except psutil.Error:
                continue
        return Sample(time.monotonic(), sum(self.cpu_seconds.values()), num_bytes)

    def _alive(self) -> list[psutil.Process]:
        try:
            return [self.root, *self.root.children(recursive=True)]
        except psutil.Error:
            return []


def run_measured(command: list[str], environment: dict[str, str], folder: Path) -> Measured:
    """Run a subject in a folder to its end. Raises Failed."""
    with tempfile.TemporaryFile("w+") as output:
        started, cpu_before = time.monotonic(), ended_cpu_seconds()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        tree = _Tree(psutil.Process(process.pid))
        samples = [tree.sample() for _ in looks(process)]
        seconds = time.monotonic() - started
        output.seek(0)
        told = output.read()
    if process.returncode:
        raise Failed(f"{told}\nexit code {process.returncode}")
    # exact for one process and those it waited for, while samples miss the last moments of each
    cpu_seconds = max(ended_cpu_seconds() - cpu_before, samples[-1].cpu_seconds)
    return Measured(seconds, cpu_seconds, samples, read_phases(told))
