"""The run on a cluster, start to end."""

from collections.abc import Callable
from typing import TypeVar

from cluster.actors import begin_measuring
from cluster.crew import Calls, Crew, Plan, Task
from cluster.metrics import RunMetrics
from cluster.plan import plan_shards
from cluster.recovery import Loss, decide
from cluster.session import Waiter, WorkerLost, check_head, count_workers, gpus_of_worker
from cluster.stream import hand_over
from cluster.sweep import Wave, sweep_alone
from cluster.teams import Team
from pipeline.config import RunConfig
from pipeline.errors import Incomplete
from pipeline.evaluate import Perplexity
from pipeline.job import Job, Resolved
from pipeline.preparation import Prepared
from pipeline.segments import Segment, Stretch
from pipeline.store import Receipt

T = TypeVar("T")
OnLayer = Callable[[Receipt], None]


def measure_on_cluster(config: RunConfig, resolved: Resolved, waiter: Waiter) -> int:
    """The same as `measure_micro_batch`, on a worker of the connected cluster."""
    what, num_gpus = "measuring micro-batches", gpus_of_worker(config.cluster.worker, resolved.device)
    count_workers(config.cluster, num_gpus)
    reference = begin_measuring(config, resolved, num_gpus)
    waiter.ready({reference: what}, lambda: None)
    try:
        return int(waiter.take(reference, what))
    except WorkerLost as error:
        raise Incomplete(f"{error}; run again") from None


def survey_on_cluster(job: Job, on_layer: Callable[[int], None], tell: Callable[[str], None]) -> list[float]:
    """The same as `survey_locally`, on one worker of the connected cluster."""
    measured: list[float] = []
    _with_crew(job, 1, RunMetrics(job, []), tell, lambda crew: _survey(crew, measured, on_layer), lambda: len(measured))
    return measured


def run_on_cluster(
    job: Job, prepared: Prepared, on_layer: OnLayer, metrics: RunMetrics, tell: Callable[[str], None]
) -> dict[str, Perplexity]:
    """The same run as `run_locally`, on workers of the connected cluster."""
    told = job.directory.committed()

    def on_committed(receipt: Receipt) -> None:
        told.add(receipt.layer_index)
        on_layer(receipt)

    def run(crew: Crew) -> dict[str, Perplexity]:
        # a worker may be lost between a commit and its answer
        untold = job.directory.committed() - told
        for receipt in job.directory.receipts() if untold else ():
            if receipt.layer_index in untold:
                on_committed(receipt)
        _prune(crew, on_committed)
        return _finish(crew, prepared)

    return _with_crew(job, job.num_replicas, metrics, tell, run, lambda: len(job.directory.committed()))


def _with_crew(
    job: Job,
    team_size: int,
    metrics: RunMetrics,
    tell: Callable[[str], None],
    work: Callable[[Crew], T],
    count_done: Callable[[], int],
) -> T:
    """The result of some work. Where something is lost it goes on from the layers that are done, with new workers."""
    num_in_a_row, num_done = 0, -1
    slowest: dict[str, float] = {}
    while True:
        crew = Crew(job, team_size, Waiter(job.guard, tell), metrics.on_moved, slowest)
        try:
            return work(crew)
        except WorkerLost as error:
            check_head()
            lost = error
        finally:
            crew.close()
        # a disk that is nearly full could not take them many times
        job.directory.drop_temporaries()
        progress = count_done()
        num_in_a_row, num_done = num_in_a_row + 1 if progress == num_done else 1, progress
        decision = decide(lost.loss, num_in_a_row)
        if not decision.goes_on:
            raise Incomplete(f"{lost}; {num_in_a_row} times in a row, run again to resume")
        when = f" in {decision.wait_seconds:.0f} s" * (decision.wait_seconds > 0)
        tell(f"{lost}; going on{when} with new workers, {num_done} of {job.num_layers} layers are done")
        metrics.on_restart()
        crew.waiter.pause(decision.wait_seconds)


def _survey(crew: Crew, measured: list[float], on_layer: Callable[[int], None]) -> None:
    """Measure the layers that are missing. Where they need activations, those before them are run for theirs."""
    job = crew.job

    def measure(team: Team) -> Plan:
        first = len(measured)
        if job.config.pruning.surveys_inputs:
            yield Calls(team.call("enter", 0, True), "entering", "the dense model")
            first = 0
        for layer_index in range(first, job.num_layers):
            (answer,) = yield Calls(team.call("survey", layer_index), "measuring", f"layer {layer_index}")
            if layer_index == len(measured):
                measured.append(answer)
                on_layer(layer_index)

    crew.share([measure])


def _prune(crew: Crew, on_layer: OnLayer) -> None:
    """What is left of the sweep, and then what is left of every segment."""
    job, work = crew.job, crew.job.work_left()
    if work.sweep:
        if crew.num_teams == 1:
            crew.share([sweep_alone(crew, work.sweep, on_layer)])
        else:
            crew.share(Wave(crew, work.sweep, on_layer).tasks())
    if job.needs_activations and len(job.segments) == 1:
        crew.run([_prune_in_shards(crew, stretch, on_layer) for stretch in work.stretches])
    else:
        crew.share([_prune_alone(crew, stretch, on_layer) for stretch in work.stretches])


def _prune_alone(crew: Crew, stretch: Stretch, on_layer: OnLayer) -> Task:
    """What is left of a segment, by one team."""

    def prune(team: Team) -> Plan:
        if crew.job.needs_activations:
            yield from _enter(team, stretch)
        yield from _prune_layers(crew, team, stretch, stretch.segment, on_layer)
        yield Calls(team.call("leave"), "leaving", f"layer {stretch.segment.stop - 1}")

    return prune


def _prune_in_shards(crew: Crew, stretch: Stretch, on_layer: OnLayer) -> Plan:
    """What is left of the one segment, shard after shard, the hidden states following from team to team."""
    num_shards = crew.job.config.cluster.num_shards
    # layers are pruned one after another: a second shard would only wait for the first
    shards = plan_shards(crew.job.num_layers, 1 if num_shards == "auto" else num_shards, crew.num_fitting)
    left = [shard for shard in shards if shard.stop_layer > stretch.next_layer]
    previous = None
    for shard in left:
        team = yield from crew.hire(shard.worker_index)
        if previous is None:
            yield from _enter(team, stretch)
        elif previous is not team:
            yield from hand_over(previous, team, f"to shard {shard.index}")
            if all(later.worker_index != previous.index for later in left[shard.index - left[0].index :]):
                crew.dismiss(previous.index)
        previous = team
        within = Segment(max(shard.first_layer, stretch.next_layer), shard.stop_layer)
        yield from _prune_layers(crew, team, stretch, within, on_layer)


def _enter(team: Team, stretch: Stretch) -> Plan:
    yield Calls(
        team.call("enter", stretch.entry_layer, stretch.enters_dense), "entering", f"layer {stretch.entry_layer}"
    )
    for layer_index in range(stretch.entry_layer, stretch.next_layer):
        yield Calls(team.call("replay", layer_index), "running again", f"layer {layer_index}")


def _prune_layers(crew: Crew, team: Team, stretch: Stretch, within: Segment, on_layer: OnLayer) -> Plan:
    for layer_index in range(max(within.first, stretch.next_layer), within.stop):
        num_replayed = stretch.num_layers_replayed if layer_index == stretch.next_layer else 0
        is_last = layer_index + 1 == stretch.segment.stop
        calls = team.call("prune", layer_index, num_replayed, is_last)
        receipt, *_ = yield Calls(calls, "pruning", f"layer {layer_index}")
        on_layer(receipt)
        if not is_last and crew.is_leaving(team):
            if crew.job.needs_activations:
                yield Calls(team.call("keep", layer_index + 1), "keeping", f"the input of layer {layer_index + 1}")
            raise WorkerLost("a node is about to be taken away", Loss.NOTICE)


def _finish(crew: Crew, prepared: Prepared) -> dict[str, Perplexity]:
    measured: dict[str, Perplexity] = {}

    def finish(team: Team) -> Plan:
        yield Calls([team.ask(0, "leave"), team.ask(0, "finish")], "finishing", "the model")

    def evaluate(name: str) -> Task:
        def measure(team: Team) -> Plan:
            references = [team.ask(0, "leave"), team.ask(0, "evaluate", name == "dense", prepared.evaluation_ids_NL)]
            _, measured[name] = yield Calls(references, "evaluating", f"the {name} model")

        return measure

    crew.share([finish])
    if prepared.evaluation_ids_NL is not None:
        crew.share([evaluate(name) for name in ("dense", "pruned")])
    return {name: measured[name] for name in ("dense", "pruned") if name in measured}
