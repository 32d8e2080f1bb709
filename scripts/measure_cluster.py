"""Measures how much faster two workers are than one, beside what two processes can be on this machine at all.

    python scripts/measure_cluster.py --hidden 1024 --layers 8 --windows 48

A random model is pruned with SparseGPT on a Ray of this machine, by every propagation, with one worker and with two,
one thread each, in turn and several times; before each turn one process and two multiply matrices. Seconds are those
from the request for the workers to the finished model, so that they hold the start of the workers. What comes out is
compared: it does not depend on the number of workers, and on that of replicas only by rounding.
"""

import argparse
import hashlib
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

from cluster.driver import run_on_cluster
from cluster.metrics import RunMetrics
from cluster.session import connected
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.preparation import begin, opened, prepare
from pipeline.runtime import Machine

WINDOW_LENGTH = 512
ONE, TWO = "cluster.worker.num_cpus=2", "cluster.worker.num_cpus=1"
WAYS = {
    "dense": (["pruning.propagation=dense", "cluster.num_shards=2"], [ONE], [TWO]),
    "shard, 4 shards": (["pruning.propagation=shard", "cluster.num_shards=4"], [ONE], [TWO]),
    "pruned, 2 replicas, `layer`": (["pruning.granularity=layer"], [ONE], [TWO, "cluster.num_replicas=2"]),
    "pruned, 2 replicas, `linear`": (["pruning.granularity=linear"], [ONE], [TWO, "cluster.num_replicas=2"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--method", default="sparsegpt")
    arguments = parser.parse_args()
    seconds: dict[tuple[str, int], list[float]] = {(way, n): [] for way in WAYS for n in (1, 2)}
    ceilings: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder), arguments)
        for _ in range(arguments.repeats):
            ceilings.append(rate(2) / rate(1))
            for way, (settings, *by_number) in WAYS.items():
                for num_workers, layout in enumerate(by_number, 1):
                    out = Path(folder, "out")
                    taken = run_once(load_config(config, [*settings, *layout, f"output.path={out}"]))
                    seconds[way, num_workers].append(taken)
                    print(f"{way}, {num_workers}: {taken:.1f} s, {digest(out)[:12]}", flush=True)
                    subprocess.run(["rm", "-r", out], check=True)
    ceiling = statistics.median(ceilings)
    print("\n| | 1 worker, s | 2 workers, s | times faster | of the ceiling |\n|---|---|---|---|---|")
    for way in WAYS:
        one, two = (statistics.median(seconds[way, n]) for n in (1, 2))
        spread = [f"{median:.1f} ({min(s):.1f} - {max(s):.1f})" for median, s in spreads(seconds, way)]
        print(f"| {way} | {' | '.join(spread)} | {one / two:.2f} | {one / two / ceiling:.0%} |")
    print(f"\nThe ceiling: two processes multiply matrices {ceiling:.2f} times as fast as one ", end="")
    print(f"({min(ceilings):.2f} - {max(ceilings):.2f}).")


def spreads(seconds: dict[tuple[str, int], list[float]], way: str) -> list[tuple[float, list[float]]]:
    return [(statistics.median(seconds[way, n]), seconds[way, n]) for n in (1, 2)]


def make_config(folder: Path, arguments: argparse.Namespace) -> Path:
    sizes = ["--layers", arguments.layers, "--hidden", arguments.hidden, "--windows", arguments.windows]
    command = [sys.executable, "scripts/random_model.py", folder, *sizes, "--window-length", WINDOW_LENGTH]
    subprocess.run([str(word) for word in command], check=True)
    config = folder / "run.yaml"
    config.write_text(
        f"model: {{path: {folder}/model}}\n"
        f"calibration: {{source: {{name: parquet, path: {folder}/windows.parquet}}, num_windows: {arguments.windows}, "
        f"window_length: {WINDOW_LENGTH}}}\n"
        f"pruning: {{method: {{name: {arguments.method}}}, sparsity: 0.5}}\n"
        f"cluster: {{address: local}}\nruntime: {{threads: 1}}\noutput: {{path: {folder}/out}}\n"
    )
    return config


def run_once(config: RunConfig) -> float:
    with connected(config.cluster):
        prepared = prepare(config, Machine.here(), print)
        with opened(prepared) as (guard, _):
            job = begin(prepared, guard, lambda job: [])
            started = time.perf_counter()
            run_on_cluster(job, prepared, lambda receipt: None, RunMetrics(job, []), print)
            return time.perf_counter() - started


def digest(out: Path) -> str:
    told = hashlib.sha256()
    for file in sorted((out / "model").glob("*.safetensors")):
        told.update(file.read_bytes())
    return told.hexdigest()


def rate(num_processes: int) -> float:
    """Products per second of some processes together, begun together and with one thread each."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(num_processes), context.Queue()
    processes = [context.Process(target=multiply, args=(barrier, results)) for _ in range(num_processes)]
    for process in processes:
        process.start()
    rates = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return float(sum(rates))


def multiply(barrier: Barrier, results: "multiprocessing.Queue[float]") -> None:
    torch.set_num_threads(1)
    factor = torch.randn(2048, 2048)
    _ = factor @ factor
    barrier.wait()
    started = time.perf_counter()
    for _ in range(20):
        _ = factor @ factor
    results.put(20 / (time.perf_counter() - started))


if __name__ == "__main__":
    main()
