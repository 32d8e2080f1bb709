"""Prunes a random model that is larger than the memory of this machine, killed and resumed once; one table.

    python scripts/larger_than_memory.py /folder/on/a/large/disk
    python scripts/larger_than_memory.py /tmp/small --layers 4 --hidden 512 --intermediate 1792 --kill-after 2

Layers are as wide as those of Llama-70B. The checkpoint is written layer by layer, then `shardprune plan --calibrate-
plan` says what the run will take, and SparseGPT prunes to one half, where --set says nothing else. After some
committed layers the process gets a SIGKILL, and the same command resumes, finishes and evaluates the dense and the
pruned model on random words. At the end every tensor of the result is looked at. Memory is the most that the process
has for itself (unique set size); the time that is planned is that of a run that nobody kills. What has been written
is left in the folder; a checkpoint that is there already is taken.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import yaml
from door import positive
from random_checkpoint import VOCABULARY, write_shape, write_weights, write_windows
from watch import forget_peak, looks, most_unique_bytes

from cluster.cli import in_one_sentence
from cluster.planning.forecast import Forecast, forecast
from cluster.planning.portion import Choice
from pipeline.clock import clock
from pipeline.config_file import load_config
from pipeline.errors import Refusal
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.hollow import open_or_imagine
from pipeline.models.skeleton import Skeleton
from pipeline.planning.disk import entry_bytes
from pipeline.planning.rates import Rates
from pipeline.planning.scope import Scope, examine
from pipeline.runtime import Machine

COMMAND = [sys.executable, "-m", "cluster"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=positive, default=15)
    parser.add_argument("--hidden", type=positive, default=8192)
    parser.add_argument("--intermediate", type=positive, default=28672)
    parser.add_argument("--windows", type=positive, default=16)
    parser.add_argument("--window-length", type=positive, default=512)
    parser.add_argument("--evaluation-windows", type=positive, default=4)
    parser.add_argument("--kill-after", type=int, default=3, help="committed layers, before the last")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY.SUB=VALUE")
    arguments = parser.parse_args()
    if not 0 < arguments.kill_after < arguments.layers:
        parser.error("--kill-after: must be at least 1 and less than --layers")
    out = arguments.out.absolute()
    try:
        if (out / "run").exists():
            raise Refusal(f"{out / 'run'}: is there already; delete it, or give another folder")
        (out / "model").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"{out}: {error.strerror}; give a folder that can be written to") from None
    config = write_inputs(out, arguments)
    scope, expected = plan(config, out / "rates.yaml")
    attempts = [run(config, out / "run", arguments.kill_after), run(config, out / "run", None)]
    report(out, scope, expected, attempts)


def write_inputs(out: Path, arguments: argparse.Namespace) -> Path:
    """Model, windows, text and config.

    Raises Refusal for what cannot work, and where the disk has no room for the model twice and what a run keeps.
    """
    model = out / "model"
    write_shape(model, arguments.layers, arguments.hidden, arguments.intermediate, arguments.window_length)
    words = torch.Generator().manual_seed(0)
    write_windows(out / "windows.parquet", arguments.windows, arguments.window_length, VOCABULARY, words)
    text = torch.randint(3, VOCABULARY, (arguments.evaluation_windows * arguments.window_length,), generator=words)
    (out / "text.txt").write_text(" ".join(f"w{token}" for token in text.tolist()))
    source = {"name": "parquet", "path": str(out / "windows.parquet")}
    calibration = {"source": source, "num_windows": arguments.windows, "window_length": arguments.window_length}
    settings = {
        "model": {"path": str(model)},
        "calibration": calibration,
        "pruning": {"method": {"name": "sparsegpt"}, "sparsity": 0.5},
        "evaluation": {"text": str(out / "text.txt")},
        "output": {"path": str(out / "run")},
    }
    config = out / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    # as a run is told on the command line, so that all that follows is of one config
    told = load_config(config, arguments.set)
    if (told.model.path, told.output.path) != (str(model), str(out / "run")):
        raise Refusal("--set: model.path and output.path are what is made and looked at here; leave them out")
    config.write_text(yaml.safe_dump(told.model_dump(mode="json")))
    hollow = Skeleton(open_or_imagine(str(model), None, False), torch.bfloat16, torch.device("cpu"))
    if not (model / "model.safetensors.index.json").exists():
        check_disk(out, hollow, arguments.windows * arguments.window_length)
        write_weights(model, hollow)
    return config


def check_disk(out: Path, hollow: Skeleton, num_tokens: int) -> None:
    """Before the checkpoint is written: room for it, for what it becomes, and for two kept inputs of layers."""
    num_bytes = sum(entry.num_bytes for entry in hollow.checkpoint.entries.values())
    needed = 2 * num_bytes + 2 * entry_bytes(num_tokens, hollow.hidden_size, hollow.dtype.itemsize, 1)
    free = shutil.disk_usage(out).free
    print(f"model {num_bytes / 1e9:.1f} GB, memory {memory_bytes() / 1e9:.1f} GB, disk {free / 1e9:.1f} GB free")
    if free < needed:
        raise Refusal(
            f"{out}: {needed / 1e9:.1f} GB of disk are needed (twice the model, and inputs of layers) and "
            f"{free / 1e9:.1f} GB are free; make room for {(needed - free) / 1e9:.1f} GB more, or give another folder"
        )


def plan(config: Path, rates: Path) -> tuple[Scope, Forecast]:
    """What `shardprune plan` says, on screen and as values. Exits where it says that it cannot."""
    planned = subprocess.run([*COMMAND, "plan", str(config), "--calibrate-plan", "--rates", str(rates)])
    if planned.returncode:
        sys.exit(planned.returncode)
    settings = load_config(config, [])
    scope, _ = examine(settings, Machine.here())
    return scope, forecast(scope, Rates.of_file(rates), Choice.of(settings, 1))


@dataclass
class Attempt:
    """`finished_after` is when the model was complete, None where it was killed before."""

    seconds: float
    peak_bytes: int
    peak_evaluating_bytes: int
    finished_after: float | None


def run(config: Path, output: Path, kill_after: int | None) -> Attempt:
    """Run it to its end, or kill it once so many layers are committed. Exits where it ends otherwise."""
    complete = output / "model/model.safetensors.index.json"
    started, found, was_killed = time.monotonic(), Attempt(0.0, 0, 0, None), False
    process = subprocess.Popen([*COMMAND, "run", str(config)])
    for _ in looks(process):
        now = most_unique_bytes(process.pid)
        if found.finished_after is None:
            found.peak_bytes = max(found.peak_bytes, now)
        else:
            found.peak_evaluating_bytes = max(found.peak_evaluating_bytes, now)
        if found.finished_after is None and complete.exists():
            found.finished_after = time.monotonic() - started
            forget_peak(process.pid)
        if kill_after is not None and len(list((output / "receipts").glob("*.json"))) >= kill_after:
            was_killed = process.poll() is None
            process.kill()
            break
    code, found.seconds = process.wait(), time.monotonic() - started
    if code != (-signal.SIGKILL if was_killed else 0):
        sys.exit(f"shardprune run failed with exit code {code}")
    if kill_after is not None and complete.exists():
        sys.exit(f"the model was complete before the run was killed after {kill_after} layers; give more --layers")
    return found


def report(out: Path, scope: Scope, expected: Forecast, attempts: list[Attempt]) -> None:
    """The table, and whether the result is whole; exits with 1 where it is not."""
    killed, resumed = attempts
    receipts = [json.loads(file.read_text()) for file in sorted((out / "run/receipts").glob("*.json"))]
    written = sum(file.stat().st_size for file in (out / "run/model").iterdir())
    # evaluating may be over before it is looked at
    pruned_after = resumed.finished_after or resumed.seconds
    pruning = killed.seconds + pruned_after
    peak = max(killed.peak_bytes, resumed.peak_bytes)
    rows = [
        ("memory of the machine, GB", "", f"{memory_bytes() / 1e9:.1f}"),
        ("model, GB", f"{scope.model_bytes / 1e9:.1f}", f"{written / 1e9:.1f}"),
        ("model, bytes", f"{scope.model_bytes:,}", f"{written:,}"),
        ("peak of the process, GB", f"{expected.host.host_bytes / 1e9:.2f}", f"{peak / 1e9:.2f}"),
        ("peak while evaluating, GB", "", f"{resumed.peak_evaluating_bytes / 1e9:.2f}"),
        ("time until the model is complete", clock(expected.seconds), clock(pruning)),
        ("- of which before the kill", "", clock(killed.seconds)),
        ("time of evaluating", "", clock(resumed.seconds - pruned_after)),
        ("layers run again", "", str(sum(receipt["num_layers_replayed"] for receipt in receipts))),
        ("attempts", "", str(max(receipt["attempt"] for receipt in receipts))),
    ]
    print("\n| | planned | measured |\n|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    num_pruned = {linear["key"]: linear["num_pruned"] for receipt in receipts for linear in receipt["linears"]}
    wrong = faults(open_checkpoint(str(out / "model")), open_checkpoint(str(out / "run/model")), num_pruned)
    print("\n" + "\n".join(wrong or ["whole: all tensors are there, every linear has the zeros of its receipt"]))
    sys.exit(1 if wrong else 0)


def faults(source: Checkpoint, result: Checkpoint, num_pruned: dict[str, int]) -> list[str]:
    """What is wrong with the result: a tensor too few, too many or of another kind, or a linear pruned otherwise.

    `num_pruned` has what the receipts say, by key.
    """

    def kinds(checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], str]]:
        return {key: (entry.shape, entry.dtype) for key, entry in checkpoint.entries.items()}

    found = [] if kinds(source) == kinds(result) else ["the tensors are not those of the source"]
    for key, entry in result.entries.items():
        if "_proj" in key:
            (weight,) = result.read([key]).values()
            num_zeros = weight.numel() - int(weight.count_nonzero())
            if num_zeros != num_pruned.get(key, 0):
                found.append(f"{key}: {num_zeros} weights are 0, pruned were {num_pruned.get(key, 0)} of {entry.shape}")
    return found


def memory_bytes() -> int:
    return int(psutil.virtual_memory().total)


if __name__ == "__main__":
    with in_one_sentence():
        main()
