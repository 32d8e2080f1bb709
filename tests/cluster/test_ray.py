"""The Ray path gives the bytes of the single process: any number of shards, small object stores, lost workers."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tiny import digests, save_model, save_windows, write_config

pytestmark = pytest.mark.ray

SHARDPRUNE = Path(sys.executable).parent / "shardprune"


def run(config: Path, *overrides: str, **environment: str) -> None:
    result = subprocess.run(
        [SHARDPRUNE, "run", config, *overrides], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr


def fingerprint(out: Path) -> str:
    return str(json.loads((out / "receipts/layer-00003.json").read_text())["fingerprint"])


def workers_of(driver: psutil.Process) -> Iterator[psutil.Process]:
    for child in driver.children(recursive=True):
        try:
            if child.cmdline() and child.cmdline()[0].startswith("ray::ShardActor"):
                yield child
        except psutil.Error:
            continue


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    save_model(folder / "model", "llama", num_hidden_layers=6)
    save_windows(folder / "windows.parquet", 40, 16, 96)
    path = folder / "run.yaml"
    write_config(path, folder / "model", folder / "windows.parquet", folder / "alone", method="sparsegpt")
    run(path, "cluster.address=none")
    return path


def test_layers_are_measured_on_the_cluster_as_in_one_process(config: Path, tmp_path: Path) -> None:
    """The allocation, and what is made of it."""
    owl = "pruning.allocation={name: owl, max_deviation: 0.2, outlier_factor: 3}"
    run(config, owl, "cluster.address=none", f"output.path={tmp_path}/alone")
    run(config, owl, "cluster.address=local", "cluster.num_shards=2", f"output.path={tmp_path}/out")
    assert (tmp_path / "out/allocation.json").read_bytes() == (tmp_path / "alone/allocation.json").read_bytes()
    assert digests(tmp_path / "out/model") == digests(tmp_path / "alone/model")
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "alone")


@pytest.mark.parametrize(
    "method",
    [
        "sparsellm",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("magnitude", "wanda", "ria", "dsnot", "alps")),
    ],
)
def test_every_method_gives_the_same_bytes(method: str, config: Path, tmp_path: Path) -> None:
    override = f"pruning.method={{name: {method}}}"
    run(config, override, "cluster.address=none", f"output.path={tmp_path}/alone")
    run(config, override, "cluster.address=local", "cluster.num_shards=2", f"output.path={tmp_path}/out")
    assert digests(tmp_path / "out/model") == digests(tmp_path / "alone/model")
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "alone")


@pytest.mark.parametrize("num_shards", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_same_bytes_with_any_number_of_shards(config: Path, tmp_path: Path, num_shards: int) -> None:
    run(config, "cluster.address=local", f"cluster.num_shards={num_shards}", f"output.path={tmp_path}/out")
    assert digests(tmp_path / "out/model") == digests(config.parent / "alone/model")
    receipt = json.loads((tmp_path / "out/receipts/layer-00003.json").read_text())
    assert (
        receipt["fingerprint"]
        == json.loads((config.parent / "alone/receipts/layer-00003.json").read_text())["fingerprint"]
    )


@pytest.mark.parametrize(
    ("propagation", "granularity", "num_shards", "num_replicas"),
    [
        ("dense", "layer", 3, 1),
        pytest.param("shard", "layer", 3, 1, marks=pytest.mark.slow),
        pytest.param("dense", "layer", 1, 1, marks=pytest.mark.slow),
        ("shard", "layer", 2, 2),
        ("pruned", "linear", 2, 2),
        pytest.param("shard", "linear", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_same_bytes_with_every_propagation_and_with_replicas(
    config: Path, tmp_path: Path, propagation: str, granularity: str, num_shards: int, num_replicas: int
) -> None:
    """More shards than workers have room for, one alone, and replicas that exchange their sums."""
    chosen = [
        f"pruning.propagation={propagation}",
        f"pruning.granularity={granularity}",
        f"cluster.num_shards={num_shards}",
        f"cluster.num_replicas={num_replicas}",
        "cluster.worker.num_cpus=0.5",
    ]
    run(config, *chosen, "cluster.address=none", f"output.path={tmp_path}/alone")
    run(config, *chosen, "cluster.address=local", f"output.path={tmp_path}/out")
    assert digests(tmp_path / "out/model") == digests(tmp_path / "alone/model")
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "alone")


def test_replicas_that_find_no_room_are_refused(config: Path, tmp_path: Path) -> None:
    command = [SHARDPRUNE, "run", config, "cluster.address=local", "cluster.num_replicas=9"]
    result = subprocess.run([*command, f"output.path={tmp_path}/out"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "cluster.num_replicas = 9" in result.stderr


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["pruning.propagation=dense"], marks=pytest.mark.slow),
        ["cluster.num_replicas=2"],
    ],
    ids=str,
)
def test_a_killed_worker_is_replaced_and_nothing_committed_is_solved_again(
    config: Path, tmp_path: Path, settings: list[str]
) -> None:
    wanted, out = tmp_path / "alone", tmp_path / "out"
    run(config, *settings, "cluster.address=none", f"output.path={wanted}")
    layout = ["cluster.num_shards=2", "cluster.worker.num_cpus=0.5", f"output.path={out}"]
    command = [SHARDPRUNE, "run", config, *settings, "cluster.address=local", *layout]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not (out / "receipts/layer-00000.json").exists():
        assert process.poll() is None, "the run ended before its first layer"
        time.sleep(0.01)
    first = (out / "receipts/layer-00000.json").read_text()
    for worker in workers_of(psutil.Process(process.pid)):
        worker.kill()
    printed = process.communicate()[0]
    assert process.returncode == 0
    assert "the worker is gone" in printed
    assert (out / "receipts/layer-00000.json").read_text() == first
    assert digests(out / "model") == digests(wanted / "model")


@pytest.mark.slow
def test_activations_larger_than_the_object_store_stream_through_it(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama", num_hidden_layers=2, hidden_size=64, max_position_embeddings=256)
    save_windows(tmp_path / "windows.parquet", 4000, 256, 96)
    config = tmp_path / "run.yaml"
    write_config(
        config,
        tmp_path / "model",
        tmp_path / "windows.parquet",
        tmp_path / "alone",
        **{"runtime.micro_batch_tokens": 8192},
    )
    store_bytes = 80 * 1024**2
    assert 3 * store_bytes < 4000 * 256 * 64 * 4
    run(config, "cluster.address=none")
    run(
        config,
        "cluster.address=local",
        "cluster.num_shards=2",
        f"output.path={tmp_path}/out",
        RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES=str(store_bytes),
    )
    assert digests(tmp_path / "out/model") == digests(tmp_path / "alone/model")


def test_an_address_where_nobody_answers_means_run_again(config: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [SHARDPRUNE, "run", config, "cluster.address=127.0.0.1:9", f"output.path={tmp_path}/out"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 75
    assert "cluster.address" in result.stderr
    assert not (tmp_path / "out").exists()
