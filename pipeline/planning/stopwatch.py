"""How long something takes, by doing it, and how much of it is done at most."""

import statistics
import time
from collections.abc import Callable

import torch

# What would take more operations is measured on less.
MOST_FLOPS = 4e12
LEAST_SECONDS = 1e-6
_REPEATS = 5


class Stopwatch:
    """Seconds that something takes, the median of several times after one that does not count."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, action: Callable[[], object], repeats: int = _REPEATS) -> float:
        taken = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            action()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            taken.append(time.perf_counter() - started)
        return max(statistics.median(taken[1:]), LEAST_SECONDS)
