"""Where shardprune's time goes in one process: a table of its stages, beside what each costs by count."""

import json
import shutil
import statistics
from collections import defaultdict
from pathlib import Path

from benchmark.conditions import SHARDPRUNE, Conditions, Shape, make_model
from benchmark.table import tabulate

# stages whose floating-point operations are counted, by their names in pipeline/cost.py
_COUNTED = {
    "forward, collecting": "collecting",
    "forward, propagating": "propagating",
    **{name: name for name in ("statistic", "factorisation", "sweep", "errors")},
}


def profile(shape: Shape, method: str, num_rounds: int, conditions: Conditions, folder: Path) -> str:
    """Medians of the rounds."""
    place = make_model(shape, folder)
    told = conditions.ask("benchmark.floor", place / "model", method, shape.num_windows, shape.window_length)
    flops = json.loads(told)[SHARDPRUNE.granularity]
    spent: dict[tuple[bool, str], list[list[float]]] = defaultdict(list)
    rates = [conditions.rate()]
    for _round in range(num_rounds):
        file = place / "out" / "stages.json"
        task = conditions.task(place, place / "out" / "run", method)
        conditions.run(SHARDPRUNE, task, "--stages", str(file))
        for entry in json.loads(file.read_text()):
            spent[entry["beside"], entry["stage"]].append(entry["spent"])
        shutil.rmtree(place / "out")
        rates.append(conditions.rate())
    rate = statistics.median(rates)
    medians = {
        key: [statistics.median(column) for column in zip(*values, strict=True)] for key, values in spent.items()
    }
    total = sum(seconds for (beside, _), (seconds, _) in medians.items() if not beside)
    rows = []
    for (beside, stage), (seconds, cpu_seconds) in sorted(medians.items(), key=lambda item: (item[0][0], -item[1][0])):
        counted = flops.get(_COUNTED.get(stage, ""), 0.0)
        of_rate = f"{counted / rate / seconds:.0%}" if counted else ""
        name = f"{stage} (beside)" if beside else stage
        share = "" if beside else f"{seconds / total:.1%}"
        rows.append([name, f"{seconds:.2f}", share, f"{cpu_seconds:.2f}", f"{counted / 1e9:.0f}", of_rate])
    least = flops["necessary"] / rate
    rows.append(["all", f"{total:.2f}", "100%", "", f"{flops['necessary'] / 1e9:.0f}", f"{least / total:.0%}"])
    columns = (f"{shape}; {method}", "s", "share", "CPU s of its thread", "GFLOP", "of the rate")
    return tabulate(columns, rows)
