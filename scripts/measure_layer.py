"""Prunes a layer of Llama-70B's shape on one GPU, as a run does it: every stage beside its floor, in one table.

    python scripts/measure_layer.py
    python scripts/measure_layer.py --device cpu --hidden 256 --windows 4 --window-length 64

The second takes a minute, to see that it works. Three layers with random weights in bfloat16, windows of random tokens.
Of each way to prune them the first layer warms up; the second is pruned as in a run, and is the line "whole layer"; in
the third the device is waited for after every stage, which gives the other lines. The last layer's weights have been
read ahead in both, its input is not kept, and the write is waited for as in a run. "solving" is what factorisation,
sweep and choice of one group take, which the other lines have of all groups. Cells are seconds, with the floor in
brackets: floating-point operations as pipeline/planning/cost.py counts them over what the device does in products of
that dtype, or the bytes that must be read and written once over the device's memory or the link from the host; all
rates are measured before. Products of float32 are of float32: TF32 must be off, as it is by default.
Needs neither Ray nor a network: README.md, "On a GPU", says which packages.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from benchmarking.device_floor import DTYPE, Way, floors_of, measure_rates, name_of  # noqa: E402
from benchmarking.stages import watched  # noqa: E402

from pipeline.config import RunConfig  # noqa: E402
from pipeline.config_file import validate  # noqa: E402
from pipeline.models.checkpoint import open_checkpoint  # noqa: E402
from pipeline.models.skeleton import Skeleton  # noqa: E402
from pipeline.models.tracing import trace_layers  # noqa: E402
from pipeline.planning.cost import LayerShape  # noqa: E402
from pipeline.preparation import begin, opened, prepare  # noqa: E402
from pipeline.runtime import Machine, environment  # noqa: E402
from pipeline.worker import ShardWorker  # noqa: E402


@dataclass(frozen=True)
class Measured:
    """`beside`: of threads that read and write meanwhile; `groups`: of each group, until its weights are chosen."""

    whole_seconds: float
    stages: dict[str, float]
    beside: dict[str, float]
    groups: dict[str, float]
    gpu_bytes: int
    host_bytes: int
    error: float


def main() -> None:
    arguments = parse()
    if arguments.device == "cuda" and torch.get_float32_matmul_precision() != "highest":
        sys.exit("products of float32 are not of float32: TF32 is on; unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
    ways = [Way(*each) for each in itertools.product(arguments.methods, arguments.patterns, arguments.granularities)]
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name)
        make_model(arguments, folder)
        shape = shape_of(folder / "model", arguments.window_length)
        rates = measure_rates(torch.device(arguments.device))
        print(f"{environment(arguments.device)}; {rates}; TF32 is off", flush=True)
        tokens, measured = (arguments.windows, arguments.window_length), {}
        for way in ways:
            config = config_of(way, folder, tokens, arguments.device)
            measured[way] = measure(config, folder, shape)
            print(f"{way}: {measured[way]}", file=sys.stderr, flush=True)
    floors = {way: floors_of(way, shape, config_of(way, folder, tokens, arguments.device), rates) for way in ways}
    print(f"\nA layer of {shape.num_weights / 1e6:.0f} M weights, {tokens[0]} x {tokens[1]} tokens.\n")
    print(tabulate(measured, floors))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--window-length", type=int, default=2048)
    parser.add_argument("--methods", nargs="+", choices=["sparsegpt", "wanda"], default=["sparsegpt", "wanda"])
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--granularities", nargs="+", choices=["layer", "linear"], default=["layer", "linear"])
    parser.add_argument("--work", type=Path, help="a folder with room for nine layers")
    return parser.parse_args()


def make_model(arguments: argparse.Namespace, folder: Path) -> None:
    words = {"layers": 3, "hidden": arguments.hidden, "aspect": "70b", "head-size": 128, "dtype": "bfloat16"}
    words |= {"vocabulary": 1024, "windows": arguments.windows, "window-length": arguments.window_length}
    command = [sys.executable, ROOT / "scripts" / "random_model.py", folder]
    command += [word for name, value in words.items() for word in (f"--{name}", value)]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


def shape_of(model: Path, window_length: int) -> LayerShape:
    skeleton = Skeleton(open_checkpoint(str(model)), DTYPE, torch.device("cpu"))
    return trace_layers(skeleton, window_length)[0].shape


def config_of(way: Way, folder: Path, tokens: tuple[int, int], device: str) -> RunConfig:
    """Nothing but the layers is written: no input of a layer is kept."""
    source = {"name": "parquet", "path": str(folder / "windows.parquet")}
    values = {
        "model": {"path": str(folder / "model")},
        "calibration": {"source": source, "num_windows": tokens[0], "window_length": tokens[1]},
        "pruning": {"method": {"name": way.method}, "pattern": way.pattern, "granularity": way.granularity},
        "runtime": {"device": device},
        "output": {"path": str(folder / "out"), "keep_entry_every": 1000},
    }
    return validate(RunConfig, values, [])


def measure(config: RunConfig, folder: Path, shape: LayerShape) -> Measured:
    prepared = prepare(config, Machine.here(), print)
    with opened(prepared) as (guard, _):
        worker = ShardWorker(begin(prepared, guard, lambda job: []))
        settle: Callable[[], None] = torch.cuda.synchronize if worker.device.type == "cuda" else lambda: None
        worker.enter(0, is_dense=False)
        worker.prune(0, 0, is_last=False)
        settle()
        begin_peaks(worker.device)
        started = time.perf_counter()
        receipt = worker.prune(1, 0, is_last=False)
        settle()
        seconds = time.perf_counter() - started
        peaks = read_peaks(worker.device)
        with watched(folder / "stages.json", settle):
            staged = worker.prune(2, 0, is_last=False)
    del worker
    if config.runtime.device == "cuda":
        torch.cuda.empty_cache()
    shutil.rmtree(folder / "out")
    stages, beside = read_stages(folder / "stages.json", config.pruning.granularity == "linear")
    assert receipt is not None and staged is not None
    groups: dict[str, float] = defaultdict(float)
    by_number = {group.number: group for group in shape.groups}
    for linear, result in zip(shape.linears, staged.linears, strict=True):
        assert linear.num_weights == result.num_weights, result.name
        groups[name_of(by_number[linear.group])] += result.seconds
    return Measured(seconds, stages, beside, groups, *peaks, receipt.relative_error)


def read_stages(file: Path, is_single: bool) -> tuple[dict[str, float], dict[str, float]]:
    """In a single pass one forward is both."""
    spent: dict[bool, dict[str, float]] = {False: defaultdict(float), True: defaultdict(float)}
    for entry in json.loads(file.read_text()):
        name = "forward" if is_single and entry["stage"].startswith("forward, ") else entry["stage"]
        spent[entry["beside"]][name] += entry["spent"][0]
    return spent[False], spent[True]


def begin_peaks(device: torch.device) -> None:
    # where that cannot be, the peak is that since the process began
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def read_peaks(device: torch.device) -> tuple[int, int]:
    """Of what torch has had on the GPU, and of this process on the host, libraries included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    host = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0, host


def tabulate(measured: dict[Way, Measured], floors: dict[Way, dict[str, float]]) -> str:
    columns = ["", *(f"{way.method} {way.pattern} {way.granularity}" for way in measured)]
    names = dict.fromkeys(name for each in measured.values() for name in sorted(each.stages))
    rows = [
        [name, *(cell(each.stages.get(name), floors[way].get(name)) for way, each in measured.items())]
        for name in names
    ]
    beside = dict.fromkeys(name for each in measured.values() for name in sorted(each.beside))
    rows += [
        [f"{name} (beside)", *(cell(each.beside.get(name), None) for each in measured.values())] for name in beside
    ]
    totals = {way: sum(floors[way].get(name, 0.0) for name in each.stages) for way, each in measured.items()}

    groups = dict.fromkeys(name for each in measured.values() for name in each.groups)

    def line(name: str, value: Callable[[Way, Measured], Any]) -> list[str]:
        return [name, *(value(way, each) for way, each in measured.items())]

    def by_group(name: str, way: Way, each: Measured) -> str:
        return cell(each.groups[name], floors[way].get(name))

    rows += [
        line("all stages", lambda way, each: cell(sum(each.stages.values()), totals[way])),
        line("**whole layer**", lambda way, each: cell(each.whole_seconds, totals[way])),
        *(line(name, partial(by_group, name)) for name in groups),
        line("peak GPU memory, GB", lambda _, each: f"{each.gpu_bytes / 1e9:.1f}"),
        line("peak host memory, GB", lambda _, each: f"{each.host_bytes / 1e9:.1f}"),
        line("mean relative error", lambda _, each: f"{each.error:.4f}"),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def cell(seconds: float | None, floor: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.3f}" + ("" if floor is None else f" ({floor:.3f})")


if __name__ == "__main__":
    main()
