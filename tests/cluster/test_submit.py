"""A run as a Ray job on a real cluster that asks for a token: one live job a run, followed, stopped, resumed."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tiny import digests, save_model, save_windows, write_config

from cluster.metrics import COUNTERS, GAUGES
from pipeline import lease

pytestmark = pytest.mark.ray

BIN = Path(sys.executable).parent
NUM_LAYERS = 6


@dataclass(frozen=True)
class Cluster:
    """A Ray of one node on loopback, and what a process needs to reach it."""

    port: int
    dashboard: str
    metrics: str
    environment: dict[str, str]

    def start(self, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
        command = [str(BIN / "shardprune"), *map(str, arguments)]
        if arguments[0] != "run":
            command += ["--address", self.dashboard]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**self.environment, **environment})

    def shardprune(self, *arguments: object, **environment: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=180)
        return process.returncode, out, err


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # packages of our names that cannot be imported: a job must run the code it was submitted with
    decoys = tmp_path_factory.mktemp("decoys")
    for name in ("pipeline", "cluster"):
        (decoys / name).mkdir()
        (decoys / name / "__init__.py").write_text("raise ImportError('not what was submitted')\n")
    # sockets have short names
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    gcs, dashboard, agent, metrics, client = free_ports(5)
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_metrics_report_interval_ms": "500",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}", f"--temp-dir={folder}"]
    command += ["--num-cpus=2", f"--object-store-memory={100 * 2**20}", "--dashboard-host=127.0.0.1"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, text=True, env={**environment, "PYTHONPATH": str(decoys)}
        )
    urls = [f"http://127.0.0.1:{port}" for port in (dashboard, metrics)]
    running = Cluster(gcs, urls[0], f"{urls[1]}/metrics", environment)
    try:
        eventually(lambda: answers(running) or ended(process), 90)
        yield running
    finally:
        print((folder / "log").read_text())
        end_tree(process.pid)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, and in alone/ the run of it in one process."""
    folder = tmp_path_factory.mktemp("run")
    model = save_model(folder / "model", "llama", num_hidden_layers=NUM_LAYERS)
    windows = save_windows(folder / "windows.parquet", 200, 32)
    path = write_config(folder / "run.yaml", model, windows, folder / "alone", "sparsegpt", **{"cluster.num_shards": 2})
    subprocess.run([BIN / "shardprune", "run", path], check=True, capture_output=True)
    return path


def test_a_run_is_submitted_once_stopped_and_resumed(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run = (config, f"output.path={output}")
    first = cluster.start("submit", *run)
    eventually(lambda: (output / "receipts" / "layer-00000.json").exists() or ended(first), 120)
    driver = pause(output)

    code, told, _ = cluster.shardprune("status", *run)
    assert code == 0 and "-1 is RUNNING" in told
    assert "state     running" in told and f"process {driver.pid}" in told

    code, told, _ = cluster.shardprune("submit", *run, "--no-wait")
    assert code == 0 and "-1 is RUNNING already" in told
    code, _, error = cluster.shardprune("submit", *run, "pruning.sparsity=0.6")
    assert code == 2 and "with another config" in sentence(error)

    first.send_signal(signal.SIGINT)
    printed, error = first.communicate(timeout=60)
    assert first.returncode == 75 and "Running entrypoint" in printed
    assert "goes on without this command" in sentence(error) and "shardprune stop" in error
    assert driver.status() == psutil.STATUS_STOPPED

    following = cluster.start("submit", *run)
    stopping = cluster.start("stop", output)
    eventually(lambda: has_pending(driver, signal.SIGTERM) or ended(stopping), 60)
    driver.resume()
    told, error = stopping.communicate(timeout=120)
    assert stopping.returncode == 0 and "-1 is STOPPED; what is committed is kept" in told
    _, error = following.communicate(timeout=60)
    assert following.returncode == 75 and "was stopped" in sentence(error)
    committed = digests(output / "receipts")
    assert 0 < len(committed) < NUM_LAYERS

    code, told, _ = cluster.shardprune("status", output)
    assert code == 0 and "-1 is STOPPED" in told
    assert "state     run again to resume" in told and "held by nobody" in told

    code, printed, error = cluster.shardprune("submit", *run)
    assert code == 0, printed + error
    assert "-2 submitted" in printed and "in 2 attempts" in printed
    assert digests(output / "model") == digests(config.parent / "alone" / "model")
    assert committed.items() <= digests(output / "receipts").items()

    eventually(lambda: "ray_shardprune_written_bytes_total" in samples(cluster, "out"), 20)

    code, told, _ = cluster.shardprune("status", tmp_path / "elsewhere")
    assert code == 0 and "knows of no job" in told and "not to be seen" in told
    code, told, _ = cluster.shardprune("stop", *run)
    assert code == 0 and "nothing to stop" in told and "-2 is SUCCEEDED" in told


def test_a_refused_run_is_a_refused_job(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """Its sentence is in the log that is followed, its exit code that of the command."""
    code, printed, error = cluster.shardprune(
        "submit", config, f"output.path={tmp_path}/out", f"model.path={tmp_path}/none"
    )
    assert code == 2, printed + error
    assert "no such folder" in printed and "failed with exit code 2" in sentence(error)


@pytest.mark.parametrize("command", ["submit", "status", "stop"])
def test_another_token_is_refused_in_one_sentence(command: str, cluster: Cluster, config: Path, tmp_path: Path) -> None:
    code, printed, error = cluster.shardprune(command, config, RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert code == 2 and not printed
    assert "RAY_AUTH_TOKEN" in sentence(error) and cluster.dashboard in error


def test_metrics_are_served_by_the_name_of_the_run(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """All of them at once, from a driver that tells what a finished run did, a restart and a move."""
    script = """
import sys, ray
from pathlib import Path
from cluster.metrics import RunMetrics
from pipeline.config_file import load_config
from pipeline.job import Job, Resolved
from pipeline.lease import LeaseGuard
config = load_config(Path(sys.argv[1]), [])
resolved = Resolved(dtype="float32", device="cpu", threads=1, windows_per_micro_batch=4)
job = Job(config=config, resolved=resolved, source=config.model.path, num_layers=6, measured=(), fingerprint="",
          attempt=1, guard=LeaseGuard(config.output.folder, "", 1))
ray.init(sys.argv[2], log_to_driver=False)
first, *others = job.directory.receipts()
raised = [linear.model_copy(update={"damping": 1.0}) for linear in first.linears]
metrics = RunMetrics(job, [])
metrics.on_layer(first.model_copy(update={"num_layers_replayed": 3, "linears": raised}))
for receipt in others:
    metrics.on_layer(receipt)
metrics.on_restart()
metrics.on_moved(1000)
input()
"""
    command = [sys.executable, "-c", script, str(config), f"127.0.0.1:{cluster.port}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=cluster.environment, text=True) as driver:
        names = {f"ray_{name}" for name in GAUGES} | {f"ray_{name}_total" for name in COUNTERS}
        eventually(lambda: names <= samples(cluster, "alone").keys() or ended(driver), 60)
        served = samples(cluster, "alone")
        driver.communicate("\n")
    wanted = {
        "layers": NUM_LAYERS,
        "layers_done": NUM_LAYERS,
        "sparsity": 0.5,
        "moved_bytes_total": 1000,
        "restarts_total": 1,
        "layers_replayed_total": 3,
        "damping_raised_total": 7,
    }
    for name, value in wanted.items():
        assert served[f"ray_shardprune_{name}"] == pytest.approx(value)
    receipts = sorted((config.parent / "alone" / "receipts").iterdir())
    num_bytes = [json.loads(file.read_text())["num_bytes"] for file in receipts]
    assert served["ray_shardprune_written_bytes_total"] == sum(num_bytes)


def samples(cluster: Cluster, run: str) -> dict[str, float]:
    """The metrics of shardprune that carry both tags, by name; `run` is the last name of the run directory."""
    with urllib.request.urlopen(cluster.metrics, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        name, _, rest = line.partition("{")
        if name.startswith("ray_shardprune_") and f'run="shardprune-{run}-' in rest and 'method="sparsegpt"' in rest:
            found[name] = float(rest.rpartition(" ")[2])
    return found


def pause(output: Path) -> psutil.Process:
    """Stop the driver of a run where it is; it goes on with `resume`."""
    held = lease.held(output)
    assert held is not None, "the run ended before it could be paused"
    driver = psutil.Process(held.holder.process.pid)
    driver.suspend()
    return driver


def has_pending(process: psutil.Process, number: signal.Signals) -> bool:
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return bool((int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)) >> (number - 1) & 1)


def end_tree(pid: int) -> None:
    """Kill a process and all it started, by their ids: `ray stop` would end every Ray of this machine."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        tree = [first, *first.children(recursive=True)]
        for each in tree:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(tree[1:], timeout=10)


def answers(cluster: Cluster) -> bool:
    request = urllib.request.Request(f"{cluster.dashboard}/api/version")
    request.add_header("Authorization", f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}")
    with suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def ended(process: "subprocess.Popen[str]") -> bool:
    """False; a process that has ended will not bring what is waited for."""
    assert process.poll() is None, process.communicate()
    return False


def eventually(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def sentence(error: str) -> str:
    """What a command that failed says: one line, no traceback."""
    [line] = error.strip().splitlines()
    assert line.startswith("shardprune: "), line
    return line


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
