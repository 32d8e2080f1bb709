"""Disturbs runs in every way that a cluster knows, and compares each with an undisturbed run of a single process.

    python scripts/chaos.py --faults 50 --seed 0
    python scripts/chaos.py --faults 10 --kinds "worker killed" "driver killed"

The cluster is one of hosts made of namespaces (hosts.py), for which it must be root; some kinds do without. Faults of
every kind strike at random moments, several in a run, and what ends with 75 is started again. Prints a line for each
fault, then a Markdown table, and fails unless every run ends with the same bytes in model/, no receipt was written
twice, and no restart ran more than output.keep_entry_every layers again.
"""

import argparse
import itertools
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from faults import FAULTS, SPILL_SIZE, WITHOUT_HOSTS, Scene
from hosts import Network, why_not
from outcome import Fault, Receipts, Violation, digests, table

KEEP_ENTRY_EVERY, STALL_SECONDS, LONGEST_RUN_SECONDS = 2, 4, 900
STORAGE_SIZE = "600m"
SHARDPRUNE = Path(sys.executable).parent / "shardprune"
OVERRIDES = [
    "runtime.threads=1",
    *(f"output.keep_entry_every={KEEP_ENTRY_EVERY}", f"cluster.stall_seconds={STALL_SECONDS}"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--faults-per-run", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=list(FAULTS), default=list(FAULTS), metavar="KIND")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, help="where what the runs print is kept")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--windows", type=int, default=128)
    arguments = parser.parse_args()
    reason = why_not()
    if reason and not set(arguments.kinds) <= set(WITHOUT_HOSTS):
        sys.exit(f"chaos: {reason}; or ask for --kinds {' '.join(map(repr, WITHOUT_HOSTS))}")
    chance = random.Random(arguments.seed)
    kinds = list(itertools.islice(itertools.cycle(arguments.kinds), arguments.faults))
    chance.shuffle(kinds)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        config = make_run(folder, arguments.layers, arguments.windows)
        with scene_of(folder, chance, with_hosts=not reason) as scene:
            runs = Runs(scene, config, folder, arguments.logs or folder)
            while kinds:
                runs.disturb(kinds, arguments.faults_per_run)
    print(table(runs.faults), flush=True)


def make_run(folder: Path, num_layers: int, num_windows: int) -> Path:
    """A random model and a config for it, of which a layer takes about a second."""
    size = ["--layers", num_layers, "--hidden", 256, "--windows", num_windows, "--window-length", 256]
    command = [sys.executable, Path(__file__).with_name("random_model.py"), folder, *size]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    config = folder / "run.yaml"
    config.write_text(
        f"model: {{path: {folder}/model}}\n"
        f"calibration: {{source: {{name: parquet, path: {folder}/windows.parquet, column: input_ids}}, "
        f"num_windows: {num_windows}, window_length: 256}}\n"
        f"output: {{path: {folder}/out}}\n"
    )
    return config


@contextmanager
def scene_of(folder: Path, chance: random.Random, with_hosts: bool) -> Iterator[Scene]:
    """Where runs are disturbed: three hosts and a small disk, or this machine as it is."""
    scene = Scene(chance, folder / "storage", folder / "spill")
    scene.storage.mkdir()
    if not with_hosts:
        yield scene
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={STORAGE_SIZE}", "tmpfs", scene.storage], check=True)
    try:
        with Network() as network:
            for name in ("head", "a", "b"):
                scene.hosts.append(network.host(name, {scene.spill: SPILL_SIZE}))
                scene.start_ray(scene.hosts[-1])
            yield scene
    finally:
        subprocess.run(["umount", "--lazy", scene.storage], check=True)


@dataclass
class Run:
    """A run that is disturbed. `duration`: the seconds of an undisturbed one."""

    name: str
    command: list[str | Path]
    log: Path
    receipts: Receipts
    duration: float
    faults: list[Fault] = field(default_factory=list)


class Runs:
    """Disturbed runs, one after another, and the faults that struck them."""

    def __init__(self, scene: Scene, config: Path, folder: Path, logs: Path) -> None:
        self.scene, self.config, self.folder, self.logs = scene, config, folder, logs
        self.logs.mkdir(parents=True, exist_ok=True)
        self.faults: list[Fault] = []
        layouts = list(itertools.product(["pruned", "shard", "dense"], [1, 2]))
        scene.chance.shuffle(layouts)
        self._layouts = itertools.cycle(layouts)
        self._undisturbed: dict[tuple[str, ...], tuple[dict[str, str], float]] = {}
        self._numbers = itertools.count(1)

    def disturb(self, kinds: list[str], num_faults: int) -> None:
        """A new run, struck by the next faults for as long as it lasts, and looked at when it is done."""
        number, (propagation, num_replicas) = next(self._numbers), next(self._layouts)
        # what a run gives depends on where its shards begin only with this propagation
        num_shards = 3 if propagation == "shard" else self.scene.chance.choice([2, 3, 4])
        chosen = [f"pruning.propagation={propagation}", f"cluster.num_replicas={num_replicas}"]
        chosen.append(f"cluster.num_shards={num_shards}")
        wanted, duration = self._without_disturbance(chosen)
        output = self.scene.storage / f"run-{number}"
        command: list[str | Path] = [SHARDPRUNE, "run", self.config, *OVERRIDES, *chosen]
        with Receipts(output / "receipts") as receipts:
            run = Run(
                f"run {number} ({propagation}, {num_shards} shards, {num_replicas} replicas)",
                [*command, f"cluster.address={self.scene.address}", f"output.path={output}"],
                self.logs / f"run-{number}.log",
                receipts,
                duration,
            )
            self.scene.ends = time.monotonic() + LONGEST_RUN_SECONDS
            while not self._is_done(run, kinds, num_faults):
                pass
        print(f"{run.name}: {receipts.told()}; undisturbed {duration:.0f} s", flush=True)
        found = digests(output)
        if found != wanted:
            differing = sorted(name for name, _ in found.items() ^ wanted.items())
            raise Violation(
                f"{run.name}: model/ is not that of an undisturbed run: {', '.join(dict.fromkeys(differing))}"
            )
        receipts.check(KEEP_ENTRY_EVERY, run.name)
        receipts.attribute(run.faults)
        self.faults += run.faults
        shutil.rmtree(output)

    def _is_done(self, run: Run, kinds: list[str], num_faults: int) -> bool:
        """Start it, and strike it until it ends; whether it is done then."""
        scene = self.scene
        with run.log.open("ab") as said:
            driver = scene.hosts[0].command(*run.command) if scene.hosts else run.command
            scene.driver = subprocess.Popen(driver, stdout=said, stderr=said)
        while kinds and len(run.faults) < num_faults:
            self._wait(run, scene.chance.uniform(0, run.duration / 2))
            # what strikes before there is work would strike nothing
            if scene.some_worker() is None:
                break
            fault = Fault(kinds[0], run.name, len(run.receipts.seen))
            fault.did = FAULTS[fault.kind](scene)
            if fault.did is not None:
                kinds.pop(0)
                run.faults.append(fault)
                print(f"{len(self.faults) + len(run.faults):3} {fault}", flush=True)
        self._wait(run, LONGEST_RUN_SECONDS)
        code = scene.driver.wait()
        if code not in (0, 75, -9, 137):
            raise Violation(f"{run.name}: exit code {code}: {run.log.read_text()[-3000:]}")
        return code == 0

    def _wait(self, run: Run, seconds: float) -> None:
        """Until the driver has ended, or for some seconds."""
        assert self.scene.driver is not None
        try:
            self.scene.driver.wait(max(0.0, min(seconds, self.scene.ends - time.monotonic())))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= self.scene.ends:
                raise Violation(f"{run.name}: not done after {LONGEST_RUN_SECONDS} s") from None

    def _without_disturbance(self, chosen: list[str]) -> tuple[dict[str, str], float]:
        """The files and the seconds of a single process, which is the definition of correct."""
        key = tuple(chosen[:-1])
        if key not in self._undisturbed:
            output = self.folder / "undisturbed"
            command: list[str | Path] = [SHARDPRUNE, "run", self.config, *OVERRIDES, *chosen, f"output.path={output}"]
            started = time.monotonic()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            self._undisturbed[key] = digests(output), time.monotonic() - started
            shutil.rmtree(output)
        return self._undisturbed[key]


if __name__ == "__main__":
    # hosts would outlive this process
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("chaos: stopped"))
    try:
        main()
    except Violation as violation:
        sys.exit(f"chaos: {violation}")
