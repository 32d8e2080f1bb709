"""Fills the object stores of a Ray cluster, and the disks they spill to, and frees them after some seconds.

python scripts/fill_store.py HOST:PORT --seconds 10 NODE_ADDRESS ...
"""

import argparse
import time
from contextlib import suppress
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

CHUNK_BYTES = 4 * 1024**2


class Filler:
    """Holds as many objects as one node takes."""

    def __init__(self) -> None:
        self.held: list[Any] = []

    def fill(self, seconds: float) -> int:
        """For some seconds take what becomes free too; returns the most bytes that were held."""
        ends, pattern = time.monotonic() + seconds, np.random.default_rng(0)
        while time.monotonic() < ends:
            try:
                self.held.append(ray.put(pattern.bytes(CHUNK_BYTES)))
            except (ObjectStoreFullError, OutOfDiskError):
                time.sleep(0.1)
        return len(self.held) * CHUNK_BYTES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("nodes", nargs="+")
    arguments = parser.parse_args()
    ray.init(arguments.address, log_to_driver=False, logging_level="ERROR")
    ids = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] in arguments.nodes]
    remote: Any = ray.remote(num_cpus=0)(Filler)
    fillers = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote()
        for node_id in ids
    ]
    held = []
    for reference in [filler.fill.remote(arguments.seconds) for filler in fillers]:
        # the last node of a host that is new may still count as alive
        with suppress(RayActorError):
            held.append(ray.get(reference))
    print(f"{' and '.join(f'{num_bytes / 1e6:.0f} MB' for num_bytes in held)} held")


if __name__ == "__main__":
    main()
