"""The whole run in this process: the definition of correct that the cluster reproduces."""

from collections.abc import Callable

import torch

from pipeline.calibration.generation import Generation
from pipeline.calibration.rows import Row
from pipeline.evaluate import Perplexity
from pipeline.job import Job
from pipeline.lease import LeaseGuard
from pipeline.preparation import Prepared
from pipeline.segments import Stretch, Sweep
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
    if job.config.pruning.surveys_inputs:
        worker.enter(0, is_dense=True)
    for layer_index in range(job.num_layers):
        measured.append(worker.survey(layer_index))
        on_layer(layer_index)
    return measured


def run_locally(job: Job, prepared: Prepared, on_layer: Callable[[Receipt], None]) -> dict[str, Perplexity]:
    """Prune what is not committed yet, finish the model, and measure it beside the dense one."""
    worker, work = ShardWorker(job), job.work_left()
    if work.sweep:
        sweep_locally(worker, work.sweep, on_layer)
    for stretch in work.stretches:
        prune_locally(worker, stretch, on_layer)
    worker.leave()
    worker.finish()
    ids_NL = prepared.evaluation_ids_NL
    if ids_NL is None:
        return {}
    return {name: worker.evaluate(name == "dense", ids_NL) for name in ("dense", "pruned")}


def sweep_locally(worker: ShardWorker, sweep: Sweep, on_layer: Callable[[Receipt], None]) -> None:
    """Run layers of the dense model, and prune those that are pruned meanwhile."""
    worker.enter(sweep.entry_layer, is_dense=True)
    closed: list[int] = []

    def tell(layer_index: int) -> None:
        receipt = worker.receipt(layer_index)
        assert receipt is not None, "one worker alone commits all layers"
        on_layer(receipt)

    for layer_index in range(sweep.entry_layer, sweep.stop):
        next_layer = layer_index + 1 if layer_index + 1 < sweep.stop else None
        worker.open(layer_index, next_layer, layer_index in sweep.pruned, keeps=True)
        for index in range(len(worker.hidden)):
            worker.step(index)
        if layer_index + 1 in sweep.kept:
            worker.keep_dense(layer_index + 1)
        worker.close(sweep.num_layers_replayed(layer_index))
        # the newest is still being written
        while closed:
            tell(closed.pop())
        if layer_index in sweep.pruned:
            closed.append(layer_index)
    while closed:
        tell(closed.pop())


def prune_locally(worker: ShardWorker, stretch: Stretch, on_layer: Callable[[Receipt], None]) -> None:
    """Prune what is left of a segment, each layer on what those before it give."""
    if worker.job.needs_activations:
        worker.enter(stretch.entry_layer, is_dense=stretch.enters_dense)
        for layer_index in range(stretch.entry_layer, stretch.next_layer):
            worker.replay(layer_index)
    for layer_index in range(stretch.next_layer, stretch.segment.stop):
        num_replayed = stretch.num_layers_replayed if layer_index == stretch.next_layer else 0
        receipt = worker.prune(layer_index, num_replayed, is_last=layer_index + 1 == stretch.segment.stop)
        assert receipt is not None, "one worker alone commits all layers"
        on_layer(receipt)
