"""shardprune as a subject, in this process or on a Ray of its own; with --stages FILE also where the time goes."""

import argparse
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pyarrow.parquet as pq

from benchmarking.stages import watched
from benchmarking.subject import SPARSITY, Task, parse_task, phase
from cluster.driver import run_on_cluster
from cluster.metrics import RunMetrics
from cluster.session import connected
from pipeline.config import RunConfig
from pipeline.config_file import validate
from pipeline.local import run_locally
from pipeline.preparation import begin, opened, prepare
from pipeline.runtime import Machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", choices=["none", "local"], default="none")
    parser.add_argument("--granularity", choices=["layer", "linear"], default="layer")
    parser.add_argument("--stages", type=Path)
    task, arguments = parse_task(parser)
    config = config_of(task, arguments.address, arguments.granularity)
    with ExitStack() as stack:
        if arguments.address == "local":
            with phase("connect"):
                stack.enter_context(connected(config.cluster))
        with phase("prepare"):
            prepared = prepare(config, Machine.here(), print)
        with opened(prepared) as (guard, _):
            job = begin(prepared, guard, lambda job: [])
            with watched(arguments.stages) if arguments.stages else nullcontext(), phase("prune"):
                if arguments.address == "none":
                    run_locally(job, prepared, lambda receipt: None)
                else:
                    run_on_cluster(job, prepared, lambda receipt: None, RunMetrics(job, []), print)


def config_of(task: Task, address: str, granularity: str) -> RunConfig:
    """As a user would write it."""
    ids = pq.read_table(task.windows)["input_ids"]
    values = {
        "model": {"path": str(task.model)},
        "calibration": {
            "source": {"name": "parquet", "path": str(task.windows)},
            "num_windows": len(ids),
            "window_length": len(ids[0]),
        },
        "pruning": {
            "method": {"name": task.method},
            "sparsity": SPARSITY,
            "pattern": task.pattern,
            "granularity": granularity,
        },
        "cluster": {"address": address, "worker": {"num_cpus": task.threads}},
        "runtime": {"threads": task.threads, "device": "cpu"},
        "output": {"path": str(task.out)},
    }
    return validate(RunConfig, values, [])


if __name__ == "__main__":
    main()
