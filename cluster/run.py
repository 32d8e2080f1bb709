"""What the commands do, from a config to a result: in this process or on Ray, as the config says."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster import session
from cluster.driver import measure_on_cluster, run_on_cluster, survey_on_cluster
from cluster.metrics import RunMetrics
from cluster.progress import GenerationProgress, RunProgress
from cluster.session import Waiter
from cluster.vllm import check_available
from pipeline.calibration.generation import Generation
from pipeline.calibration.selfgen import VllmEngine
from pipeline.calibration.summary import summarize, write_calibration
from pipeline.config import RunConfig
from pipeline.evaluate import Perplexity
from pipeline.job import Job, Resolved
from pipeline.lease import LeaseGuard
from pipeline.local import generate_locally, run_locally, survey_locally
from pipeline.micro_batch import measure_micro_batch, settle_micro_batch
from pipeline.preparation import Prepared, begin, opened, prepare, with_windows
from pipeline.report import read_evaluation, write_report
from pipeline.revision import finished_report, with_revision
from pipeline.store import Receipt

Connect = Callable[[], None]
Tell = Callable[[str], None]


def run_all(config: RunConfig, tell: Tell) -> str:
    """Calibrate, prune, finish and measure, as far as that has not been done; returns the report."""
    named = with_revision(config)
    if named is not config and (report := finished_report(named)) is not None:
        tell(f"{named.output.path}: finished earlier, nothing to do")
        return report
    config = named
    with _calibrated(config, tell) as (prepared, guard, connect):

        def measure(config: RunConfig, resolved: Resolved) -> int:
            connect()
            if config.cluster.address == "none":
                return measure_micro_batch(config, resolved)
            return measure_on_cluster(config, resolved, Waiter(guard, tell))

        def survey(job: Job) -> list[float]:
            connect()
            what = f"measured for {config.pruning.allocation.name}, in the dense model"

            def on_layer(layer_index: int) -> None:
                tell(f"layer {layer_index + 1}/{job.num_layers}  {what}")

            if config.cluster.address == "none":
                return survey_locally(job, on_layer)
            return survey_on_cluster(job, on_layer, tell)

        prepared = settle_micro_batch(prepared, measure, tell)
        job = begin(prepared, guard, survey)
        measured = read_evaluation(job, prepared)
        if measured is None:
            committed = job.directory.receipts()
            with RunProgress(job.num_layers, committed) as progress:
                connect()
                measured = _prune(job, prepared, progress, RunMetrics(job, committed))
        job.directory.drop_activations()
        return write_report(job, prepared, measured)


def calibrate_only(config: RunConfig, tell: Tell) -> str:
    """The calibration stage of a run; returns its summary."""
    with _calibrated(with_revision(config), tell) as (prepared, guard, _):
        assert prepared.windows is not None
        guard.check()
        write_calibration(prepared.calibration, prepared.windows, prepared.directory.calibration)
        return summarize(prepared.calibration, prepared.windows)


@contextmanager
def _calibrated(config: RunConfig, tell: Tell) -> Iterator[tuple[Prepared, LeaseGuard, Connect]]:
    """A run whose directory is held and whose windows are known; with it, what connects to Ray."""
    with session.connecting(config.cluster) as connect:
        prepared = prepare(config, session.machine(config), tell)
        missing = [generation for generation in prepared.calibration.generations if generation.num_missing]
        for generation in missing:
            if isinstance(generation.source.engine, VllmEngine):
                check_available(generation.source.engine)
        with opened(prepared) as (guard, taken_over):
            if taken_over:
                tell(taken_over)
            for generation in missing:
                connect()
                _generate(generation, prepared, guard)
            if prepared.windows is None:
                prepared = with_windows(prepared)
            yield prepared, guard, connect


def _generate(generation: Generation, prepared: Prepared, guard: LeaseGuard) -> None:
    cluster = prepared.config.cluster
    with GenerationProgress(generation.source.num_texts, generation.num_missing) as progress:
        if cluster.address == "none":
            generate_locally(generation, guard, progress.on_rows)
            return
        # Ray Data takes a second to import, and only generation needs it
        from cluster.generate import describe, generate_on_cluster

        num_gpus = session.gpus_of_worker(cluster.worker, prepared.resolved.device)
        session.count_workers(cluster, num_gpus)
        shifts = generate_on_cluster(generation, cluster, num_gpus, Waiter(guard, progress.tell), progress.on_rows)
        if shifts:
            progress.tell(describe(shifts))


def _prune(job: Job, prepared: Prepared, progress: RunProgress, metrics: RunMetrics) -> dict[str, Perplexity]:
    def on_layer(receipt: Receipt) -> None:
        progress.on_layer(receipt)
        metrics.on_layer(receipt)

    if job.config.cluster.address == "none":
        return run_locally(job, prepared, on_layer)
    return run_on_cluster(job, prepared, on_layer, metrics, progress.tell)
