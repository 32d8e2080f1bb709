"""Layers to shards to workers, as a value that is decided before anything runs."""

from dataclasses import dataclass

from pipeline.segments import cut

# Of a layer of a sweep, so many micro-batches of all replicas together may wait for the next layer while that runs too.
NUM_AHEAD = 16


@dataclass(frozen=True)
class Shard:
    """Consecutive layers [first_layer, stop_layer) owned by one worker."""

    index: int
    first_layer: int
    stop_layer: int
    worker_index: int


def plan_shards(num_layers: int, num_shards: int, num_workers: int) -> list[Shard]:
    """Shards of nearly equal size, dealt to the workers in turn; a worker may own several."""
    parts = cut(num_layers, num_shards)
    return [Shard(index, part.first, part.stop, index % num_workers) for index, part in enumerate(parts)]
