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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults import FAULTS, SPILL_SIZE, WITHOUT_HOSTS, Scene
from hosts import Network, why_not
from outcome import Fault, Receipts, Violation, digests, table

KEEP_ENTRY_EVERY, STALL_SECONDS, LONGEST_RUN_SECONDS = 2, 4, 900
STORAGE_SIZE = "400m"
SHARDPRUNE = Path(sys.executable).parent / "shardprune"
OVERRIDES = [
    *("runtime.threads=1", "evaluation.text=null", "evaluation.window_length=null"),
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


class Runs:
    """Disturbed runs, one after another, and the faults that struck them."""

    def __init__(self, scene: Scene, config: Path, folder: Path, logs: Path) -> None:
        self.scene, self.config, self.folder, self.logs = scene, config, folder, logs
        self.logs.mkdir(parents=True, exist_ok=True)
        self.faults: list[Fault] = []
        self._undisturbed: dict[tuple[str, ...], tuple[dict[str, str], float]] = {}
        self._numbers = itertools.count(1)

    def disturb(self, kinds: list[str], num_faults: int) -> None:
        """A new run, struck by the next faults for as long as it lasts, and looked at when it is done."""
        chance, number = self.scene.chance, next(self._numbers)
        propagation, num_replicas = chance.choice(["pruned", "shard", "dense"]), chance.choice([1, 2])
        chosen = [f"pruning.propagation={propagation}", f"cluster.num_replicas={num_replicas}"]
        # what a run gives depends on where its shards begin only with this propagation
        chosen.append(f"cluster.num_shards={3 if propagation == 'shard' else chance.choice([2, 3, 4])}")
        wanted, duration = self._without_disturbance(chosen)
        name = f"run {number} ({propagation}, {num_replicas} replicas, {chosen[-1].rpartition('=')[2]} shards)"
        output, log = self.scene.storage / f"run-{number}", self.logs / f"run-{number}.log"
        command = [SHARDPRUNE, "run", self.config, *OVERRIDES, *chosen, f"cluster.address={self.scene.address}"]
        faults: list[Fault] = []
        with Receipts(output / "receipts") as receipts, log.open("wb") as said:
            self._run([*command, f"output.path={output}"], said, name, kinds, num_faults, faults, receipts, duration)
        print(f"{name}: {receipts.told()}; undisturbed {duration:.0f} s", flush=True)
        if digests(output) != wanted:
            raise Violation(f"{name}: the bytes of model/ are not those of an undisturbed run")
        receipts.check(KEEP_ENTRY_EVERY, name)
        receipts.attribute(faults)
        self.faults += faults
        subprocess.run(["rm", "-r", output], check=True)

    def _run(self, command: list, said, name: str, kinds, num_faults: int, faults, receipts, duration: float) -> None:  # type: ignore
        """Start it, strike it, and start it again, until it is done."""
        scene, ends = self.scene, time.monotonic() + LONGEST_RUN_SECONDS
        while True:
            driver = scene.hosts[0].command(*command) if scene.hosts else command
            scene.driver = subprocess.Popen(driver, stdout=said, stderr=said)
            while kinds and len(faults) < num_faults and scene.is_running:
                self._wait(scene.chance.uniform(0, duration / 2), ends, name)
                if not scene.is_running:
                    break
                if kinds[0] != "driver killed":
                    scene.some_worker()
                fault = Fault(kinds[0], name, len(receipts.seen))
                fault.did = FAULTS[fault.kind](scene)
                if fault.did is not None:
                    kinds.pop(0)
                    faults.append(fault)
                    print(f"{len(self.faults) + len(faults):3} {fault}", flush=True)
            self._wait(ends - time.monotonic(), ends, name)
            code = scene.driver.wait()
            if code == 0:
                return
            if code not in (75, -9, 137):
                raise Violation(f"{name}: exit code {code}: {Path(said.name).read_text()[-3000:]}")

    def _wait(self, seconds: float, ends: float, name: str) -> None:
        """Until the driver has ended, or for some seconds."""
        assert self.scene.driver is not None
        try:
            self.scene.driver.wait(max(0.0, min(seconds, ends - time.monotonic())))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= ends:
                raise Violation(f"{name}: not done after {LONGEST_RUN_SECONDS} s") from None

    def _without_disturbance(self, chosen: list[str]) -> tuple[dict[str, str], float]:
        """The files and the seconds of a single process, which is the definition of correct."""
        key = tuple(chosen[:-1])
        if key not in self._undisturbed:
            output = self.folder / "undisturbed"
            command = [SHARDPRUNE, "run", self.config, *OVERRIDES, *chosen, f"output.path={output}"]
            started = time.monotonic()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            self._undisturbed[key] = digests(output), time.monotonic() - started
            subprocess.run(["rm", "-r", output], check=True)
        return self._undisturbed[key]


if __name__ == "__main__":
    try:
        main()
    except Violation as violation:
        sys.exit(f"chaos: {violation}")
