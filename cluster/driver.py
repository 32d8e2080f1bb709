"""The run on a cluster, start to end."""

from collections.abc import Callable
from typing import Any, TypeVar

import ray

from cluster.actors import create_actor
from cluster.plan import Shard, plan_shards
from cluster.recovery import Decision, decide
from cluster.session import Waiter, WorkerLost, count_workers, gpus_of_worker
from cluster.stream import hand_over
from pipeline.activations import split_windows
from pipeline.errors import Incomplete
from pipeline.evaluate import Perplexity
from pipeline.job import Job
from pipeline.preparation import Prepared
from pipeline.store import Receipt

T = TypeVar("T")


def survey_on_cluster(job: Job, on_layer: Callable[[int], None], tell: Callable[[str], None]) -> list[float]:
    """The same as `survey_locally`, on one worker of the connected cluster."""
    return _with_workers(job, tell, lambda pool: _survey(pool, on_layer))


def run_on_cluster(
    job: Job, prepared: Prepared, on_layer: Callable[[Receipt], None], tell: Callable[[str], None]
) -> dict[str, Perplexity]:
    """The same run as `run_locally`, on workers of the connected cluster."""

    def run(pool: _Pool) -> dict[str, Perplexity]:
        _prune(pool, on_layer)
        return _finish(pool, prepared)

    return _with_workers(job, tell, run)


def _with_workers(job: Job, tell: Callable[[str], None], work: Callable[["_Pool"], T]) -> T:
    """The result of some work; a lost worker is replaced, and the work goes on from what is committed."""
    num_losses, num_committed = 0, -1
    while True:
        pool = _Pool(job, Waiter(job.guard, tell))
        try:
            return work(pool)
        except WorkerLost as lost:
            progress = len(job.directory.receipts())
            num_losses = num_losses + 1 if progress == num_committed else 1
            num_committed = progress
            if decide(num_losses) is Decision.STOP:
                raise Incomplete(f"{lost}; {num_losses} times in a row, run again to resume") from None
            tell(f"{lost}; going on from layer {progress} with new workers")
        finally:
            pool.close()


class _Pool:
    """The workers of a run, each created when it is first needed."""

    def __init__(self, job: Job, waiter: Waiter) -> None:
        cluster = job.config.cluster
        self.job, self.waiter = job, waiter
        self._num_gpus = gpus_of_worker(cluster.worker, job.resolved.device)
        num_workers = count_workers(cluster, self._num_gpus)
        # layers are pruned one after another: a second worker would wait for the first
        num_shards = 1 if cluster.num_shards == "auto" else cluster.num_shards
        self.shards: list[Shard] = plan_shards(job.num_layers, num_shards, num_workers)
        self._actors: dict[int, Any] = {}

    def worker(self, worker_index: int) -> Any:
        """The handle of a started worker."""
        if worker_index not in self._actors:
            actor = create_actor(self.job.config.cluster.worker, self._num_gpus)
            self._actors[worker_index] = actor
            asked = f"{self.job.config.cluster.worker.num_cpus:g} CPU, {self._num_gpus:g} GPU"
            self.waiter.result(actor.start.remote(self.job), f"starting worker {worker_index} ({asked})")
        return self._actors[worker_index]

    def release(self, shard: Shard) -> None:
        """Give back the worker of a shard unless it owns a later one."""
        if all(later.worker_index != shard.worker_index for later in self.shards[shard.index + 1 :]):
            ray.kill(self._actors.pop(shard.worker_index))

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)


def _survey(pool: _Pool, on_layer: Callable[[int], None]) -> list[float]:
    job, waiter, worker, measured = pool.job, pool.waiter, pool.worker(0), []
    if job.survey_needs_activations:
        waiter.result(worker.enter.remote(0), "entering the dense model")
    for layer_index in range(job.num_layers):
        measured.append(waiter.result(worker.survey.remote(layer_index), f"measuring layer {layer_index}"))
        on_layer(layer_index)
    return measured


def _prune(pool: _Pool, on_layer: Callable[[Receipt], None]) -> None:
    """Prune what is not committed yet, shard after shard, the hidden states following from worker to worker."""
    job, point, waiter = pool.job, pool.job.resume_point(), pool.waiter
    num_micro_batches = len(split_windows(job.config.calibration.num_windows, job.resolved.windows_per_micro_batch))
    previous: Shard | None = None
    for shard in pool.shards:
        if shard.stop_layer <= point.next_layer:
            continue
        moves = previous is not None and previous.worker_index != shard.worker_index
        if previous is not None and moves and not job.needs_activations:
            pool.release(previous)
        worker = pool.worker(shard.worker_index)
        if job.needs_activations and previous is None:
            _enter(pool, worker)
        elif job.needs_activations and previous is not None and moves:
            what = f"moving hidden states to shard {shard.index}"
            hand_over(pool.worker(previous.worker_index), worker, num_micro_batches, waiter, what)
            pool.release(previous)
        previous = shard
        for layer_index in range(max(shard.first_layer, point.next_layer), shard.stop_layer):
            num_replayed = point.num_layers_replayed if layer_index == point.next_layer else 0
            what = f"pruning layer {layer_index} in shard {shard.index}"
            on_layer(waiter.result(worker.prune.remote(layer_index, num_replayed), what))


def _enter(pool: _Pool, worker: Any) -> None:
    point = pool.job.resume_point()
    pool.waiter.result(worker.enter.remote(point.entry_layer), f"entering layer {point.entry_layer}")
    for layer_index in range(point.entry_layer, point.next_layer):
        pool.waiter.result(worker.replay.remote(layer_index), f"running layer {layer_index} again")


def _finish(pool: _Pool, prepared: Prepared) -> dict[str, Perplexity]:
    job, waiter, worker = pool.job, pool.waiter, pool.worker(pool.shards[-1].worker_index)
    waiter.result(worker.leave.remote(), "leaving the last layer")
    waiter.result(worker.finish.remote(), "finishing the model")
    if prepared.evaluation_ids_NL is None:
        return {}
    models = {"dense": job.source, "pruned": job.directory.model}
    return {
        name: waiter.result(worker.evaluate.remote(path, prepared.evaluation_ids_NL), f"evaluating the {name} model")
        for name, path in models.items()
    }
