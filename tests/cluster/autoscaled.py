"""A run on a Ray whose workers come and go: in namespaces of its own.

`python autoscaled.py keep|lose CONFIG OUTPUT OVERRIDE...`: the head has room for nobody; the autoscaler starts further
nodes, at most two, as processes of this machine. With `lose`, they are killed as soon as a layer is committed. Prints
JSON: how the run ended, and how many such nodes there were, and when.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray

IDLE_SECONDS, ENDS_WITHIN_SECONDS = 3, 240
_BIN = Path(sys.executable).parent
# the names that Ray's provider for tests wants them to have
_HEAD_TYPE, _HEAD_ID = "ray.head.default", "f" * 51 + "00000"
_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_STORE_BYTES = 100_000_000


def start_head() -> None:
    """A head with an autoscaler, at the RAY_ADDRESS and with the token that this process was given."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(_cluster(), file)
    of_head = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
    }
    command = [_BIN / "ray", "start", "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false"]
    command += [f"--object-store-memory={_STORE_BYTES}", f"--autoscaling-config={file.name}"]
    subprocess.run(command, env={**os.environ, **of_head}, check=True, stdout=sys.stderr)


def watch(run: "subprocess.Popen[str]", on_tick: Callable[[], None]) -> list[tuple[float, int]]:
    """When how many nodes were there, from the start of a run until the last has left after its end."""
    started, seen = time.monotonic(), [(0.0, _num_workers())]
    while run.poll() is None or seen[-1][1]:
        seconds = time.monotonic() - started
        assert seconds < ENDS_WITHIN_SECONDS, f"still running or not left: {seen}"
        on_tick()
        if (num_workers := _num_workers()) != seen[-1][1]:
            seen.append((seconds, num_workers))
        time.sleep(0.01)
    return seen


def kill_workers() -> None:
    """As where spot instances are taken away: Ray's process of each node and everything that it runs."""
    raylets = [each for each in psutil.process_iter() if each.name() == "raylet" and "--head" not in each.cmdline()]
    for process in [*raylets, *(child for raylet in raylets for child in raylet.children(recursive=True))]:
        process.kill()


def _cluster() -> dict[str, Any]:
    worker = {"CPU": 1, "GPU": 1, "object_store_memory": _STORE_BYTES}
    types = {
        _HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    return {
        "cluster_name": "autoscaled",
        "max_workers": 2,
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        "provider": {
            "type": "external",
            "module": _PROVIDER,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": _HEAD_ID,
        },
        "head_node_type": _HEAD_TYPE,
        "available_node_types": types,
        **{name: {} for name in ("docker", "auth", "file_mounts")},
        **{
            name: []
            for name in (
                "setup_commands",
                "head_setup_commands",
                "worker_setup_commands",
                "head_start_ray_commands",
                "worker_start_ray_commands",
                "initialization_commands",
                "cluster_synced_files",
                "rsync_exclude",
                "rsync_filter",
            )
        },
        "file_mounts_sync_continuously": False,
    }


def _num_workers() -> int:
    return sum(node["Alive"] and "node:__internal_head__" not in node["Resources"] for node in ray.nodes())


def main(what: str, config: str, output: str, *overrides: str) -> None:
    start_head()
    ray.init("auto", log_to_driver=False)
    remaining = [kill_workers] if what == "lose" else []

    def on_tick() -> None:
        if remaining and Path(output, "receipts/layer-00000.json").exists():
            remaining.pop()()

    command = [_BIN / "shardprune", "run", config, "cluster.address=auto", f"output.path={output}"]
    command += ["cluster.worker={num_gpus: 1, num_cpus: 1}", *overrides]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    nodes = watch(run, on_tick)
    assert run.stdout
    print(json.dumps({"code": run.returncode, "printed": run.stdout.read(), "nodes": nodes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
