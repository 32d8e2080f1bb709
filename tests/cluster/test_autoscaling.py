"""On a cluster without room, a run is what makes a worker come; it leaves afterwards, and the bytes are the same."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import shardprune
from tiny import digests, save_model, save_windows, write_config

pytestmark = pytest.mark.ray

# Ray's own end of a node reaches every process it can see, and its ports are those of everybody.
OF_ITS_OWN = ["unshare", "--pid", "--net", "--mount", "--fork", "--mount-proc", "--kill-child"]
SETTLE = "ip link set lo up && mkdir -p /tmp/ray && mount -t tmpfs -o size=1g tmpfs /tmp/ray"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tried = subprocess.run([*OF_ITS_OWN, "sh", "-c", SETTLE], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"needs namespaces of its own, which root has: {tried.stderr.strip()}")
    folder = tmp_path_factory.mktemp("autoscaling")
    save_model(folder / "model", "llama", num_hidden_layers=24)
    windows = save_windows(folder / "windows.parquet", 40, 16)
    path = write_config(folder / "run.yaml", folder / "model", windows, folder / "alone", method="sparsegpt")
    assert shardprune("run", path).code == 0
    return path


def autoscaled(what: str, config: Path, output: Path, *overrides: str) -> dict[str, Any]:
    """What autoscaled.py prints, of a run that ended well."""
    program = Path(__file__).with_name("autoscaled.py")
    inside = ["sh", "-c", f'{SETTLE} && exec "$@"', "sh", sys.executable, program, what, config, output, *overrides]
    environment = {
        **os.environ,
        "RAY_ADDRESS": "127.0.0.1:6379",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    finished = subprocess.run([*OF_ITS_OWN, *inside], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    seen: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    assert seen["code"] == 0, seen
    return seen


def test_a_worker_comes_for_a_run_and_leaves_after_it(config: Path, tmp_path: Path) -> None:
    seen = autoscaled("keep", config, tmp_path / "out")
    assert [count for _, count in seen["nodes"]] == [0, 1, 0]
    assert digests(tmp_path / "out/model") == digests(config.parent / "alone/model")


@pytest.mark.slow
def test_a_worker_that_is_taken_away_is_replaced_by_another_node(config: Path, tmp_path: Path) -> None:
    seen = autoscaled("lose", config, tmp_path / "out")
    # another node has come; on a busy machine before Ray has noticed that the first one is gone
    assert [count for _, count in seen["nodes"]] in ([0, 1, 0, 1, 0], [0, 1, 2, 1, 0])
    assert "the worker is gone" in seen["printed"]
    assert digests(tmp_path / "out/model") == digests(config.parent / "alone/model")


@pytest.mark.slow
def test_as_many_workers_come_as_there_are_replicas(config: Path, tmp_path: Path) -> None:
    replicas = "cluster.num_replicas=2"
    assert shardprune("run", config, replicas, f"output.path={tmp_path}/alone").code == 0
    seen = autoscaled("keep", config, tmp_path / "out", replicas)
    counts = [count for _, count in seen["nodes"]]
    assert (counts[0], max(counts), counts[-1]) == (0, 2, 0)
    assert digests(tmp_path / "out/model") == digests(tmp_path / "alone/model")
