"""Where shardprune's time goes in one process: a table of its stages, beside what each costs by count."""

import json
import shutil
import statistics
from collections import defaultdict
from pathlib import Path

from benchmarking.conditions import Conditions, Shape, Subject, make_model
from benchmarking.table import tabulate

# stages whose floating-point operations are counted, by their names in pipeline/planning/cost.py
_COUNTED = {
    "forward, collecting": ("collecting",),
    "forward, propagating": ("propagating",),
    "forward": ("collecting", "propagating"),
    **{name: (name,) for name in ("statistic", "factorisation", "sweep", "errors")},
}
# Seconds and CPU seconds of each stage, in the thread that prunes (False) and beside it (True).
Spent = dict[tuple[bool, str], list[float]]


def profile(shape: Shape, method: str, subject: Subject, num_rounds: int, conditions: Conditions, folder: Path) -> str:
    """Medians of the rounds; the machine's rate is taken between them."""
    place = make_model(shape, folder)
    told = conditions.ask("benchmarking.floor", place / "model", method, shape.num_windows, shape.window_length)
    rates, rounds = [conditions.rate()], []
    for _round in range(num_rounds):
        file = place / "out" / "stages.json"
        task = conditions.task(place, place / "out" / "run", method)
        conditions.run(subject, task, "--stages", str(file))
        rounds.append(_read(file, is_single=subject.granularity == "linear"))
        shutil.rmtree(place / "out")
        rates.append(conditions.rate())
    flops = json.loads(told)[subject.granularity]
    columns = (f"{shape}; {method}; {subject.name}", "s", "share", "CPU s of its thread", "GFLOP", "of the rate")
    return tabulate(columns, _rows(_medians(rounds), flops, statistics.median(rates)))


def _read(file: Path, is_single: bool) -> Spent:
    """In a single pass one forward is both."""
    spent: Spent = defaultdict(lambda: [0.0, 0.0])
    for entry in json.loads(file.read_text()):
        name = "forward" if is_single and entry["stage"].startswith("forward, ") else entry["stage"]
        total = spent[entry["beside"], name]
        total[:] = [before + more for before, more in zip(total, entry["spent"], strict=True)]
    return spent


def _medians(rounds: list[Spent]) -> Spent:
    return {
        stage: [statistics.median(spent[stage][column] for spent in rounds) for column in range(2)]
        for stage in rounds[0]
    }


def _rows(spent: Spent, flops: dict[str, float], rate: float) -> list[list[str]]:
    total, rows = sum(seconds for (is_beside, _), (seconds, _) in spent.items() if not is_beside), []
    # those of the thread that prunes first, the longest first
    for (is_beside, stage), (seconds, cpu_seconds) in sorted(spent.items(), key=lambda item: (item[0][0], -item[1][0])):
        counted = sum(flops[name] for name in _COUNTED.get(stage, ()))
        rows.append(
            [
                f"{stage} (beside)" if is_beside else stage,
                f"{seconds:.2f}",
                "" if is_beside else f"{seconds / total:.1%}",
                f"{cpu_seconds:.2f}",
                f"{counted / 1e9:.0f}" if counted else "",
                f"{counted / rate / seconds:.0%}" if counted else "",
            ]
        )
    necessary = flops["necessary"]
    return [*rows, ["all", f"{total:.2f}", "100%", "", f"{necessary / 1e9:.0f}", f"{necessary / rate / total:.0%}"]]
