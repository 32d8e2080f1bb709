"""A team: the replicas of a shard, each with a part of the windows, called together."""

from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors import COMMITS, create_actor
from pipeline.config import WorkerSettings
from pipeline.job import Job
from pipeline.segments import split


class Team:
    """`size` actors that are created together or not at all. One alone stands for all replicas that there may be."""

    def __init__(self, job: Job, index: int, size: int, num_gpus: float) -> None:
        self.job, self.index, self.size = job, index, size
        self.node_ids: list[str] = []
        self.num_micro_batches = [len(part) for part in split(len(job.micro_batches), size)]
        worker = job.config.cluster.worker
        # of one worker too: it tells room that is not there from a worker that does not answer
        self._group = placement_group([_bundle(worker, num_gpus)] * size, strategy="PACK")
        self._actors = [
            create_actor(worker, num_gpus, PlacementGroupSchedulingStrategy(self._group, rank)) for rank in range(size)
        ]

    def room(self) -> list[Any]:
        """A reference to the news that there is room for all actors."""
        return [self._group.ready()]

    def start(self) -> list[Any]:
        """References to the nodes of the started actors."""
        meeting = self._actors[0].meet.remote(self.job.config.cluster.address) if self.size > 1 else None
        return [actor.start.remote(self.job, rank, meeting) for rank, actor in enumerate(self._actors)]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """References to what each replica answers to the same call."""
        return [getattr(actor, method).remote(*arguments) for actor in self._actors]

    def ask(self, rank: int, method: str, *arguments: Any) -> Any:
        """A reference to what one replica answers."""
        return getattr(self._actors[rank], method).remote(*arguments)

    def pass_on(self, rank: int, index: int, given: Any, is_wanted: bool) -> tuple[Any, Any]:
        """References to what the opened layer gives for a micro-batch, and to the news that it has."""
        output, done = self._actors[rank].pass_on.options(num_returns=2).remote(index, given, is_wanted)
        return output, done

    def receipt(self, layer_index: int) -> list[Any]:
        """References to the receipt of a closed layer once it is committed, for which other calls do not wait."""
        return [actor.receipt.options(concurrency_group=COMMITS).remote(layer_index) for actor in self._actors]

    def dismiss(self) -> None:
        """End the actors at once, whatever they do."""
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._group)


def _bundle(settings: WorkerSettings, num_gpus: float) -> dict[str, float]:
    asked = {"CPU": settings.num_cpus, "GPU": num_gpus, "memory": float(settings.memory_bytes or 0)}
    return {name: amount for name, amount in asked.items() if amount > 0}
