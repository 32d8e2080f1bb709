"""How time grows with layers, windows and tokens, and memory with layers: shardprune in one process."""

import shutil
import statistics
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from benchmarking.conditions import SHARDPRUNE, Conditions, Shape, make_model
from benchmarking.table import spread, tabulate

FORMATS = frozenset(FigureCanvasBase.get_supported_filetypes())
_FACTORS = (1, 2, 4, 8)
_DIRECTIONS = {"layers": "num_layers", "windows": "num_windows", "tokens in a window": "window_length"}


@dataclass
class Line:
    """What a method took at several sizes in one direction."""

    method: str
    direction: str
    seconds: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    num_bytes: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def fitted(self) -> dict[int, float]:
        """Seconds on the straight line that fits the medians best."""
        sizes = list(self.seconds)
        slope, start = np.polyfit(sizes, [statistics.median(self.seconds[size]) for size in sizes], 1)
        return {size: float(start + slope * size) for size in sizes}


def measure_growth(
    smallest: Shape, methods: list[str], num_rounds: int, conditions: Conditions, folder: Path
) -> list[Line]:
    """All sizes in turn, round after round."""
    lines = [Line(method, direction) for method in methods for direction in _DIRECTIONS]
    for _round in range(num_rounds):
        for line in lines:
            for factor in _FACTORS:
                name = _DIRECTIONS[line.direction]
                size = getattr(smallest, name) * factor
                place = make_model(replace(smallest, **{name: size}), folder)
                measured = conditions.run(SHARDPRUNE, conditions.task(place, place / "out" / "run", line.method))
                line.seconds[size].append(measured.seconds_of("prune"))
                line.num_bytes[size].append(measured.peak_bytes_until("prune"))
                shutil.rmtree(place / "out")
                print(f"{line.method}; {line.direction}: {size}; {line.seconds[size][-1]:.2f} s", flush=True)
    return lines


def describe_growth(lines: list[Line]) -> str:
    """A table with a row for each size."""
    columns = ("method", "", "pruning s", "on a straight line", "peak MB")
    return tabulate(columns, [row for line in lines for row in _rows(line)])


def draw_growth(lines: list[Line], smallest: Shape, plot: Path) -> None:
    """A picture, in the format that the name of its file ends with."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    axes = figure.subplots(1, len(_DIRECTIONS) + 1)
    for line in lines:
        axis = axes[list(_DIRECTIONS).index(line.direction)]
        medians = [statistics.median(seconds) for seconds in line.seconds.values()]
        (drawn,) = axis.plot(list(line.seconds), medians, "o", label=line.method)
        axis.plot(list(line.fitted), list(line.fitted.values()), color=drawn.get_color(), linewidth=1)
        axis.set(xlabel=line.direction, ylabel="pruning, seconds")
        if line.direction == "layers":
            peaks = [statistics.median(num_bytes) / 1e6 for num_bytes in line.num_bytes.values()]
            axes[-1].plot(list(line.num_bytes), peaks, "o-", label=line.method)
            axes[-1].set(xlabel="layers", ylabel="peak, MB")
    for axis in axes:
        axis.set(xlim=(0, None), ylim=(0, None))
    axes[0].legend()
    figure.suptitle(f"from {smallest}", fontsize=9)
    figure.savefig(plot)


def _rows(line: Line) -> list[list[str]]:
    return [
        [
            line.method,
            f"{line.direction}: {size}",
            spread(line.seconds[size], ".2f"),
            f"{line.fitted[size]:.2f}",
            spread([num_bytes / 1e6 for num_bytes in line.num_bytes[size]], ".0f"),
        ]
        for size in line.seconds
    ]
