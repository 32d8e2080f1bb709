"""Compares what `shardprune plan` says with what runs then take: seconds, peak memory and bytes, one table.

    python scripts/measure_plan.py [CONFIG ...] [--set KEY.SUB=VALUE ...] [--repeats 3]

Without a CONFIG: those of configs/plans, from the root of the repository. Where model.path has a config.json and no
weights, the plan is made from that alone, and the runs prune random weights of the shape on random windows. Of every
config the rates of this machine are measured by --calibrate-plan, then it is run in one process, each time anew in a
folder of its own. Seconds are those of the whole command, the median of the runs; memory is the most that the process
has for itself (unique set size); bytes are those of the finished model. On a machine that is not quiet, CPU seconds
tell more than seconds where there is one thread. No plan holds the time in which a model writes its calibration text,
nor that of singular values, so a config with source selfgen or allocation alphapruning is refused.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from door import positive
from random_checkpoint import write_weights, write_windows
from watch import ended_cpu_seconds, looks, most_unique_bytes

from cluster.cli import in_one_sentence
from cluster.planning.forecast import Forecast, forecast
from cluster.planning.portion import Choice
from pipeline.calibration.mix import MixSource
from pipeline.calibration.selfgen import SelfgenSource
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.models.hollow import is_imagined, open_or_imagine
from pipeline.models.skeleton import Skeleton
from pipeline.planning.rates import Rates
from pipeline.planning.scope import Scope, examine
from pipeline.runtime import Machine

COLUMNS = ["config", "seconds planned", "measured", "ratio", "CPU seconds", "peak MB planned", "measured", "ratio"]
COLUMNS += ["bytes planned", "written"]
PLANS = Path(__file__).parent.parent / "configs" / "plans"
COMMAND = [sys.executable, "-m", "cluster"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path, metavar="CONFIG", default=sorted(PLANS.glob("*.yaml")))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY.SUB=VALUE")
    parser.add_argument("--repeats", type=positive, default=3)
    arguments = parser.parse_args()
    for config in arguments.configs:
        settings = load_config(config, arguments.set)
        if generates(settings):
            parser.error(f"{config}: no plan holds the time of source selfgen; give another calibration.source")
        if settings.pruning.allocation.name == "alphapruning":
            parser.error(f"{config}: no plan holds the time of allocation alphapruning; give another")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for config in arguments.configs:
        with tempfile.TemporaryDirectory() as folder:
            print(compare(config, arguments.set, arguments.repeats, Path(folder)), flush=True)


def generates(config: RunConfig) -> bool:
    """Whether the model writes any of its calibration text itself."""
    source = config.calibration.source
    sources = [part.source for part in source.parts] if isinstance(source, MixSource) else [source]
    return any(isinstance(single, SelfgenSource) for single in sources)


def compare(config: Path, overrides: list[str], repeats: int, folder: Path) -> str:
    # what is measured for the plan is written where the runs will write
    overrides = [*overrides, "cluster.address=none", "evaluation.text=null", f"output.path={folder}/plan"]
    rates = folder / "rates.yaml"
    plan = [*COMMAND, "plan", config, *overrides, "--calibrate-plan", "--rates", rates]
    if code := subprocess.run(list(map(str, plan)), stdout=subprocess.DEVNULL).returncode:
        # it has said why
        sys.exit(code)
    settings = load_config(config, overrides)
    scope, expected = expect(settings, Rates.of_file(rates))
    overrides += write_inputs(settings, folder)
    seconds, peaks, written = [], [], 0
    cpu_before = ended_cpu_seconds()
    for index in range(repeats):
        out = folder / f"run-{index}"
        taken, peak = run([*COMMAND, "run", str(config), *overrides, f"output.path={out}"])
        seconds.append(taken)
        peaks.append(peak)
        written = sum(file.stat().st_size for file in (out / "model").rglob("*") if file.is_file())
        shutil.rmtree(out)
    cpu = (ended_cpu_seconds() - cpu_before) / repeats
    planned = expected.host.host_bytes / 1e6
    cells = [os.path.relpath(config), f"{expected.seconds:.1f}", *beside(expected.seconds, seconds, 1), f"{cpu:.1f}"]
    cells += [f"{planned:.0f}", *beside(planned, peaks, 0), f"{scope.model_bytes:,}", f"{written:,}"]
    return f"| {' | '.join(cells)} |"


def write_inputs(config: RunConfig, folder: Path) -> list[str]:
    """Random weights and windows where there is nothing but a config.json, and the settings that name them."""
    calibration, checkpoint = config.calibration, open_or_imagine(config.model.path, config.model.revision, False)
    if not is_imagined(checkpoint) or not Path(config.model.path).is_dir():
        # also a model id on the hub, of which the run downloads all
        return []
    model, windows = folder / "model", folder / "windows.parquet"
    model.mkdir()
    shutil.copy(Path(config.model.path) / "config.json", model)
    hollow = Skeleton(checkpoint, torch.float32, torch.device("cpu"))
    write_weights(model, hollow)
    words = torch.Generator().manual_seed(0)
    write_windows(windows, calibration.num_windows, calibration.window_length, hollow.vocabulary_size, words)
    source = json.dumps({"name": "parquet", "path": str(windows)})
    return [f"model.path={model}", f"calibration.source={source}"]


def beside(planned: float, measured: list[float], digits: int) -> list[str]:
    """The median with the spread, and the plan's share of it."""
    median, low, high = statistics.median(measured), min(measured), max(measured)
    return [f"{median:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})", f"{planned / median:.2f}"]


def expect(config: RunConfig, rates: Rates) -> tuple[Scope, Forecast]:
    """What the plan says of a run in one process."""
    scope, _ = examine(config, Machine.here())
    return scope, forecast(scope, rates, Choice.of(config, 1))


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and the peak of memory in megabytes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = max(most_unique_bytes(process.pid) for _ in looks(process)) / 1e6
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"shardprune run failed with exit code {process.returncode}")
    return seconds, peak


if __name__ == "__main__":
    with in_one_sentence():
        main()
