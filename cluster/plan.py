"""Layers to shards to workers, as a value that is decided before anything runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Consecutive layers [first_layer, stop_layer) owned by one worker."""

    index: int
    first_layer: int
    stop_layer: int
    worker_index: int


def plan_shards(num_layers: int, num_shards: int, num_workers: int) -> list[Shard]:
    """Shards of nearly equal size, dealt to the workers in turn; a worker may own several."""
    assert 1 <= num_shards <= num_layers and num_workers >= 1
    bounds = [num_layers * index // num_shards for index in range(num_shards + 1)]
    return [Shard(index, bounds[index], bounds[index + 1], index % num_workers) for index in range(num_shards)]
