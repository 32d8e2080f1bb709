"""The whole run in this process: the definition of correct that the cluster reproduces."""

from collections.abc import Callable

import torch

from pipeline.calibration.generation import Generation
from pipeline.calibration.rows import Row
from pipeline.evaluate import Perplexity
from pipeline.job import Job
from pipeline.lease import LeaseGuard
from pipeline.preparation import Prepared
from pipeline.store import Receipt
from pipeline.worker import ShardWorker


def generate_locally(generation: Generation, guard: LeaseGuard, on_rows: Callable[[list[Row]], None]) -> None:
    """Generate what is missing of a source, batch after batch, each written as soon as it is there."""
    # transformers' whole models take a second to import, and only generation needs them
    from pipeline.calibration.generator import Generator

    generator = Generator(generation.task)
    for batch in generation.missing():
        rows = generator(batch)
        guard.check()
        generation.store.write(rows)
        on_rows(rows)
    # what torch keeps for itself would be missing where the next model looks for room
    del generator
    torch.cuda.empty_cache()


def survey_locally(job: Job, on_layer: Callable[[int], None] = lambda layer_index: None) -> list[float]:
    """What the allocation measures of every layer of the dense model."""
    worker, measured = ShardWorker(job), []
    if job.survey_needs_activations:
        worker.enter(0)
    for layer_index in range(job.num_layers):
        measured.append(worker.survey(layer_index))
        on_layer(layer_index)
    return measured


def run_locally(job: Job, prepared: Prepared, on_layer: Callable[[Receipt], None]) -> dict[str, Perplexity]:
    """Prune what is not committed yet, finish the model, and measure it beside the dense one."""
    worker = ShardWorker(job)
    _prune(worker, job, on_layer)
    worker.finish()
    ids_NL = prepared.evaluation_ids_NL
    if ids_NL is None:
        return {}
    return {"dense": worker.evaluate(job.source, ids_NL), "pruned": worker.evaluate(job.directory.model, ids_NL)}


def _prune(worker: ShardWorker, job: Job, on_layer: Callable[[Receipt], None]) -> None:
    point = job.resume_point()
    if job.needs_activations and point.next_layer < job.num_layers:
        worker.enter(point.entry_layer)
        for layer_index in range(point.entry_layer, point.next_layer):
            worker.replay(layer_index)
    for layer_index in range(point.next_layer, job.num_layers):
        num_replayed = point.num_layers_replayed if layer_index == point.next_layer else 0
        on_layer(worker.prune(layer_index, num_replayed))
    worker.leave()
