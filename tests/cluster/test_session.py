"""Connecting to Ray: a signal that comes meanwhile is not lost, and where nobody answers no secret is told."""

import signal
import subprocess
import sys
from typing import Any

import pytest
import ray
from ray.exceptions import AuthenticationError

from cluster.reasons import in_a_line
from cluster.session import _keeping_sigterm, connected, machine
from pipeline.config import ClusterSettings, RunConfig
from pipeline.errors import Incomplete, Refusal
from pipeline.runtime import Machine

CONNECTING = """
import os, signal, sys
from cluster.reasons import in_a_line
from cluster.session import _keeping_sigterm
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
with _keeping_sigterm(sys.argv[1]):
    # as Ray does
    signal.signal(signal.SIGTERM, signal.SIG_DFL if sys.argv[1] == "auto" else lambda number, frame: sys.exit(15))
    os.kill(os.getpid(), signal.SIGTERM)
    print("connected")
"""


def end_of(address: str) -> tuple[int, str, str]:
    finished = subprocess.run([sys.executable, "-c", CONNECTING, address], capture_output=True, text=True)
    return finished.returncode, finished.stdout, finished.stderr


def test_while_a_cluster_is_joined_it_waits() -> None:
    assert end_of("auto") == (75, "connected\n", "")


def test_while_a_ray_of_its_own_starts_it_ends_the_run_as_ever() -> None:
    code, told, error = end_of("local")
    assert code not in (0, 15) and not told
    assert error.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("address", ["auto", "local"])
def test_afterwards_nothing_is_held_back(address: str) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with _keeping_sigterm(address):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert (signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before


def config_of(propagation: str = "pruned", **cluster: Any) -> RunConfig:
    values = {
        "model": {"path": "m"},
        "calibration": {"source": {"name": "parquet", "path": "w"}},
        "output": {"path": "o"},
    }
    return RunConfig.model_validate({**values, "pruning": {"propagation": propagation}, "cluster": cluster})


def test_this_process_has_all_cores_and_workers_beside_each_other_share_them() -> None:
    here = Machine.here()
    assert machine(config_of()) == here
    assert machine(config_of(address="local")) == here
    assert machine(config_of(address="local", num_replicas=here.num_cores)).num_cores == 1
    assert machine(config_of("dense", address="local")).num_cores == 1
    assert machine(config_of("dense", address="local", worker={"num_cpus": here.num_cores})) == here


def test_a_gpu_that_is_asked_for_counts_before_the_autoscaler_has_brought_it() -> None:
    found = machine(config_of(address="auto", worker={"num_gpus": 1, "num_cpus": 3}))
    assert found == Machine(3, has_cuda=True)


def test_where_nobody_answers_it_is_tried_again_and_nothing_is_told_that_may_be_secret() -> None:
    settings = ClusterSettings(address="user:secret/+more@host.invalid:1")
    with (
        pytest.raises(Incomplete, match=r"cluster.address = '\*\*\*@host.invalid:1': no Ray cluster") as told,
        connected(settings),
    ):
        pass
    assert "secret" not in str(told.value)


def test_a_host_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(Refusal, match="no Ray cluster to join"), connected(ClusterSettings(address="a..b:1")):
        pass


def test_a_missing_token_is_refused_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*arguments: object, **options: object) -> None:
        raise AuthenticationError("no token")

    monkeypatch.setattr(ray, "init", init)
    settings = ClusterSettings(address="auto")
    with pytest.raises(Refusal, match=r"cluster.address = 'auto'.*RAY_AUTH_TOKEN"), connected(settings):
        pass


@pytest.mark.parametrize(
    ("error", "line"),
    [(MemoryError(), "MemoryError"), (OSError("first\nsecond"), "first"), (ValueError(" "), "ValueError")],
)
def test_an_error_has_a_line_even_where_it_says_nothing(error: Exception, line: str) -> None:
    assert in_a_line(error) == line
