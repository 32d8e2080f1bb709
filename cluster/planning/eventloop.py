"""Processes that take time or wait for each other, by a clock that only they move.

A process is a generator: it yields the seconds that it takes, or a condition that it waits for.
"""

import heapq
import itertools
from collections.abc import Callable, Generator

Process = Generator[float | Callable[[], bool], None, None]


class Clock:
    """The event loop: whatever is due next happens next."""

    def __init__(self, now: float) -> None:
        self.now = now
        self._due: list[tuple[float, int, Process]] = []
        self._waiting: list[tuple[Callable[[], bool], Process]] = []
        self._number = itertools.count()

    def start(self, process: Process) -> None:
        """From now on, side by side with the others."""
        self._advance(process)

    def run(self, until: float | None = None) -> None:
        """Until all processes are at their end, or a moment has come."""
        self._wake()
        while self._due:
            if until is not None and self._due[0][0] >= until:
                self.now = until
                return
            self.now, _, process = heapq.heappop(self._due)
            self._advance(process)
            self._wake()
        assert not self._waiting, "processes wait for each other"

    def _wake(self) -> None:
        """Go on with those whose condition holds, which may make others hold."""
        is_any = True
        while is_any:
            ready = [process for condition, process in self._waiting if condition()]
            self._waiting = [(condition, process) for condition, process in self._waiting if process not in ready]
            for process in ready:
                self._advance(process)
            is_any = bool(ready)

    def _advance(self, process: Process) -> None:
        told = next(process, None)
        if callable(told):
            self._waiting.append((told, process))
        elif told is not None:
            heapq.heappush(self._due, (self.now + told, next(self._number), process))
