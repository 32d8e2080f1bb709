"""Kills a run at random moments, starts it again each time, and compares the model with that of an undisturbed run.

    python scripts/chaos.py --kills 10 --seed 0

Each kill is a SIGKILL of the driver or of a worker of a run with Ray, after a random time. Prints a Markdown table and
fails unless every file of model/ is the same, no receipt was written twice, and every replay stayed within bounds.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

KEEP_ENTRY_EVERY = 2
OVERRIDES = ["evaluation.text=null", "runtime.threads=1", f"output.keep_entry_every={KEEP_ENTRY_EVERY}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart/run.yaml")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="settings, as for shardprune run")
    arguments = parser.parse_args()
    command = [Path(sys.executable).parent / "shardprune", "run", arguments.config, *OVERRIDES, *arguments.overrides]
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, disturbed = Path(folder, "undisturbed"), Path(folder, "disturbed")
        started = time.monotonic()
        subprocess.run([*command, f"output.path={undisturbed}"], check=True, stdout=subprocess.DEVNULL)
        duration = time.monotonic() - started
        print(f"undisturbed: {duration:.0f} s\n")
        print("| kill | victim | after s | layers committed |\n|---|---|---|---|")
        num_kills, num_runs, receipts = 0, 0, {}
        while num_kills < arguments.kills or not (disturbed / "model" / "model.safetensors.index.json").exists():
            num_runs += 1
            if (disturbed / "model" / "model.safetensors.index.json").exists():
                check(undisturbed, disturbed)
                disturbed, receipts = Path(folder, f"disturbed-{num_runs}"), {}
            may_kill = num_kills < arguments.kills
            num_kills += run_once(
                [*command, f"output.path={disturbed}"], disturbed, chance, duration, num_kills, may_kill
            )
            receipts = compare_receipts(disturbed, receipts)
        check(undisturbed, disturbed)


def run_once(
    command: list[str | Path], directory: Path, chance: random.Random, duration: float, num_kills: int, may_kill: bool
) -> int:
    """One run, with at most one kill at a random moment; returns the number of kills."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    killed = 0
    if may_kill:
        delay, victim = chance.uniform(0, duration), chance.choice(["driver", "worker"])
        started = time.monotonic()
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            killed = kill(process, victim)
        num_committed = len(list((directory / "receipts").glob("*.json")))
        if killed:
            print(f"| {num_kills + 1} | {victim} | {time.monotonic() - started:.1f} | {num_committed} |", flush=True)
    stderr = process.communicate()[1].decode()
    if process.returncode not in (0, -9, 75):
        sys.exit(f"exit code {process.returncode}: {stderr}")
    return killed


def kill(process: "subprocess.Popen[bytes]", victim: str) -> int:
    """SIGKILL to the driver, or to a worker as soon as there is one; returns how many were killed."""
    if victim == "driver":
        process.kill()
        return 1
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            if is_worker(child):
                child.kill()
                return 1
        time.sleep(0.05)
    return 0


def is_worker(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[:1] != [] and process.cmdline()[0].startswith("ray::ShardActor")
    except psutil.Error:
        return False


def compare_receipts(directory: Path, before: dict[str, str]) -> dict[str, str]:
    """A receipt, once written, never changes, and no restart replays more than the bound."""
    now = {file.name: file.read_text() for file in sorted((directory / "receipts").glob("*.json"))}
    for name, text in before.items():
        assert now[name] == text, f"{name} was written twice"
    replays = [json.loads(text)["num_layers_replayed"] for text in now.values()]
    assert max(replays, default=0) <= KEEP_ENTRY_EVERY, replays
    return now


def check(undisturbed: Path, disturbed: Path) -> None:
    """The same files with the same bytes."""
    assert digests(undisturbed) == digests(disturbed), "the models differ"
    receipts = [json.loads(file.read_text()) for file in sorted((disturbed / "receipts").glob("*.json"))]
    replayed = [receipt["num_layers_replayed"] for receipt in receipts]
    attempts = [receipt["attempt"] for receipt in receipts]
    print(f"\nfinished: same sha256 for {len(digests(undisturbed))} files of model/; each of {len(receipts)} layers")
    print(f"committed once, in attempts {attempts}; layers replayed before each: {replayed}\n", flush=True)


def digests(directory: Path) -> dict[str, str]:
    files = sorted((directory / "model").rglob("*"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


if __name__ == "__main__":
    main()
