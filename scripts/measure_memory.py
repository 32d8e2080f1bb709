"""Measures peak memory: against the depth of the model, of the Ray path against the windows, and of every method.

    python scripts/measure_memory.py depth
    python scripts/measure_memory.py streaming
    python scripts/measure_memory.py methods

`depth` prunes random models of 4, 8 and 16 layers of the same width, five times each, in processes of their own.
`streaming` prunes one model on a Ray whose object store is a third of the largest activations, with 32, 128 and 512
windows, and compares the bytes with those of a run in one process. `methods` prunes a random model of one layer with
every method of configs/studies/methods.yaml, five times in turn, to 70 %, on one thread. Memory is what a process has
for itself (unique set size), by sampling.
"""

import argparse
import hashlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import yaml
from watch import looks, unique_bytes

FOLDER = Path(sys.executable).parent
OBJECT_STORE_BYTES = 80 * 1024**2
WINDOW_LENGTH = 1024
HIDDEN = 768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = {"depth": measure_depth, "streaming": measure_streaming, "methods": measure_methods}
    parser.add_argument("what", choices=ways)
    with tempfile.TemporaryDirectory() as folder:
        ways[parser.parse_args().what](Path(folder))


def measure_depth(folder: Path) -> None:
    medians, traces = {}, []
    print("| layers | peak MB, median | lowest - highest |\n|---|---|---|")
    for num_layers in (4, 8, 16):
        work = folder / str(num_layers)
        make_model(work, "--layers", num_layers, "--hidden", HIDDEN, "--windows", 16, "--window-length", 256)
        traces = [run(work, work / f"run-{i}", 16, 256, "cluster.address=none") for i in range(5)]
        runs = [trace["driver"] for trace in traces]
        medians[num_layers] = statistics.median(runs)
        print(f"| {num_layers} | {medians[num_layers]:.0f} | {min(runs):.0f} - {max(runs):.0f} |", flush=True)
    slope = (medians[16] - medians[4]) / 12
    print(f"\n{slope:.2f} MB per layer; one layer's weights have {one_layer_megabytes(HIDDEN):.0f} MB")
    print("\nWithin the runs of 16 layers, peak MB so far when so many layers were committed, median:\n")
    steps = [
        f"{n}: {statistics.median(trace.get(f'{n} layers', 0.0) for trace in traces):.0f}" for n in (2, 4, 8, 12, 15)
    ]
    print(", ".join(steps))


def measure_streaming(folder: Path) -> None:
    make_model(folder, "--layers", 4, "--hidden", 128, "--windows", 512, "--window-length", WINDOW_LENGTH)
    print("| windows | activations MB | object store MB | driver MB | largest worker MB |\n|---|---|---|---|---|")
    for num_windows in (32, 128, 512):
        out = folder / f"ray-{num_windows}"
        peaks = run(folder, out, num_windows, WINDOW_LENGTH, "cluster.address=local", "cluster.num_shards=4")
        activations = num_windows * WINDOW_LENGTH * 128 * 4 / 1e6
        store = OBJECT_STORE_BYTES / 1e6
        print(
            f"| {num_windows} | {activations:.0f} | {store:.0f} | {peaks['driver']:.0f} | {peaks['worker']:.0f} |",
            flush=True,
        )
    run(folder, folder / "alone", 512, WINDOW_LENGTH, "cluster.address=none")
    same = digests(folder / "alone") == digests(folder / "ray-512")
    print(f"\n512 windows: model/ of the Ray path and of one process have {'the same' if same else 'OTHER'} sha256")
    sys.exit(0 if same else 1)


def measure_methods(folder: Path) -> None:
    make_model(folder, "--layers", 1, "--hidden", 1024, "--windows", 16, "--window-length", 512)
    methods = {
        name: settings["pruning.method"]
        for name, settings in yaml.safe_load(Path("configs/studies/methods.yaml").read_text())["methods"].items()
        if "pruning.allocation" not in settings
    }
    peaks: dict[str, list[float]] = {name: [] for name in methods}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _repeat, (name, method) in itertools.product(range(5), methods.items()):
        out = folder / "run"
        overrides = [f"pruning.method={json.dumps(method)}", "pruning.sparsity=0.7", "cluster.address=none"]
        peaks[name].append(run(folder, out, 16, 512, *overrides)["driver"])
        receipt = json.loads((out / "receipts/layer-00000.json").read_text())
        seconds[name].append(sum(linear["seconds"] for linear in receipt["linears"]))
        shutil.rmtree(out)
    print("| method | seconds, median | lowest - highest | peak MB, median | lowest - highest |\n|---|---|---|---|---|")
    for name in methods:
        median, low, high = statistics.median(seconds[name]), min(seconds[name]), max(seconds[name])
        print(f"| {name} | {median:.1f} | {low:.1f} - {high:.1f} ", end="")
        print(f"| {statistics.median(peaks[name]):.0f} | {min(peaks[name]):.0f} - {max(peaks[name]):.0f} |")


def make_model(folder: Path, *arguments: object) -> None:
    subprocess.run([sys.executable, "scripts/random_model.py", folder, *map(str, arguments)], check=True)


def run(work: Path, out: Path, num_windows: int, window_length: int, *overrides: str) -> dict[str, float]:
    """Prune with Wanda; returns peak megabytes of the driver, of the largest worker, and by layers committed."""
    config = work / "run.yaml"
    config.write_text(
        f"model: {{path: {work}/model}}\n"
        f"calibration: {{source: {{name: parquet, path: {work}/windows.parquet}}, num_windows: {num_windows}, "
        f"window_length: {window_length}}}\n"
        "pruning: {method: {name: wanda}, sparsity: 0.5}\n"
        f"runtime: {{threads: 1}}\noutput: {{path: {out}}}\n"
    )
    environment = {**os.environ, "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(OBJECT_STORE_BYTES)}
    command: list[str | Path] = [FOLDER / "shardprune", "run", config, *overrides]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    peaks = {"driver": 0.0, "worker": 0.0}
    # often: the highest moment may be short, and nothing is timed from here
    for _ in looks(process, pause=1):
        sample(psutil.Process(process.pid), peaks)
        peaks.setdefault(f"{len(list((out / 'receipts').glob('*.json')))} layers", peaks["driver"])
    if process.returncode:
        sys.exit(f"shardprune run failed with exit code {process.returncode}")
    return peaks


def sample(driver: psutil.Process, peaks: dict[str, float]) -> None:
    peaks["driver"] = max(peaks["driver"], unique_bytes(driver.pid) / 1e6)
    for child in driver.children(recursive=True):
        with suppress(psutil.Error):
            if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::ShardActor"):
                peaks["worker"] = max(peaks["worker"], unique_bytes(child.pid) / 1e6)


def one_layer_megabytes(hidden: int) -> float:
    intermediate = hidden * 11 // 4
    return 4 * (3 * hidden**2 + 3 * hidden * intermediate) / 1e6


def digests(out: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((out / "model").iterdir())}


if __name__ == "__main__":
    main()
