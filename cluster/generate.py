"""The calibration stage on Ray Data: missing batches -> a pool of generators -> rows, written by the driver.

The graph streams: batches are read as generators become free, and every finished batch is written at once, by the one
process that holds the lease. Nothing else is kept in memory.
"""

import logging
import pickle
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError, RayTaskError, UserCodeException
from ray.util.annotations import RayDeprecationWarning

from cluster.parcel import packed, unpacked
from cluster.reasons import in_a_line
from cluster.recovery import decide
from cluster.session import Waiter, WorkerLost, check_head
from cluster.vllm import generate_with_vllm
from pipeline.calibration.generation import Batch, Generation, GenerationTask
from pipeline.calibration.generator import Generator
from pipeline.calibration.rows import Row
from pipeline.calibration.selfgen import VllmEngine
from pipeline.config import ClusterSettings
from pipeline.errors import Incomplete

_MAX_RESTARTS = 3


@dataclass(frozen=True)
class Shift:
    """The time in which one generator generated one batch, in seconds since the epoch."""

    generator: str
    started: float
    ended: float


@dataclass(frozen=True)
class Written:
    """The rows of one batch; vLLM, which generates many at once, does not say when it did."""

    rows: list[Row]
    shift: Shift | None = None


class GeneratorActor:
    """The plain Generator as Ray Data maps it. The model is loaded by the first call, which can say what goes wrong."""

    def __init__(self, task: GenerationTask) -> None:
        self._task = task
        self._generator: Generator | None = None

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"written": packed(lambda: self._write(pickle.loads(item["batch"])))}

    def _write(self, batch: Batch) -> Written:
        if self._generator is None:
            self._generator = Generator(self._task)
        started = time.time()
        rows = self._generator(batch)
        name = ray.get_runtime_context().get_actor_id() or ""
        return Written(rows, Shift(name, started, time.time()))


def generate_on_cluster(
    generation: Generation,
    cluster: ClusterSettings,
    num_gpus: float,
    waiter: Waiter,
    on_rows: Callable[[list[Row]], None],
) -> list[Shift]:
    """Generate what is missing of a source; returns when who worked, as far as the engine says.

    Raises Refusal as a generator did, Incomplete where the cluster is lost.
    """
    shifts: list[Shift] = []
    num_losses = 0
    while generation.num_missing:
        try:
            for written in _stream(generation, cluster, num_gpus, waiter):
                waiter.guard.check()
                generation.store.write(written.rows)
                on_rows(written.rows)
                shifts += [written.shift] if written.shift else []
                num_losses = 0
        except WorkerLost as lost:
            check_head()
            num_losses += 1
            if not decide(lost.loss, num_losses).goes_on:
                raise Incomplete(f"{lost}; {num_losses} times in a row, run again to resume") from None
            waiter.tell(f"{lost}; going on with new generators")
    return shifts


def describe(shifts: list[Shift]) -> str:
    """How busy the generators were from the first start to the last end."""
    num_generators = len({shift.generator for shift in shifts})
    elapsed = max(shift.ended for shift in shifts) - min(shift.started for shift in shifts)
    busy = sum(shift.ended - shift.started for shift in shifts) / num_generators
    plural = "s" * (num_generators > 1)
    return f"{num_generators} generator{plural}, busy {busy:.1f} of {elapsed:.1f} s ({busy / max(elapsed, 1e-9):.0%})"


def _stream(generation: Generation, cluster: ClusterSettings, num_gpus: float, waiter: Waiter) -> Iterator[Written]:
    """Batches as they are finished, in any order."""
    finished: queue.Queue[Written | BaseException | None] = queue.Queue(maxsize=4)

    def consume() -> None:
        try:
            for written in _results(generation, cluster, num_gpus):
                finished.put(written)
            finished.put(None)
        except BaseException as error:  # whatever it is, the thread that waits here raises it
            finished.put(error)

    threading.Thread(target=consume, name="generate", daemon=True).start()
    while (result := waiter.next(finished, "generating texts")) is not None:
        if isinstance(result, BaseException):
            raise _explained(result)
        yield result


def _results(generation: Generation, cluster: ClusterSettings, num_gpus: float) -> Iterator[Written]:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # it would tell each error twice, with tracebacks
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # of `ray_remote_args_fn` below, which has no successor yet
    warnings.filterwarnings("ignore", category=RayDeprecationWarning)
    batches = generation.missing()
    most = len(batches) if cluster.num_generators == "auto" else cluster.num_generators
    least = 1 if cluster.num_generators == "auto" else cluster.num_generators
    if isinstance(generation.task.engine, VllmEngine):
        yield from (Written(rows) for rows in generate_with_vllm(generation.task, batches, least, most))
        return
    items = [{"batch": pickle.dumps(batch)} for batch in batches]
    graph = ray.data.from_items(items, override_num_blocks=len(items)).map(
        GeneratorActor,
        fn_constructor_args=(generation.task,),
        compute=ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=2),
        num_cpus=cluster.worker.num_cpus,
        num_gpus=num_gpus,
        # without bounds a generator that always dies, for lack of memory say, would be started for ever
        ray_remote_args_fn=lambda: {"max_restarts": _MAX_RESTARTS, "max_task_retries": _MAX_RESTARTS},
        memory=cluster.worker.memory_bytes,
    )
    for item in graph.iter_rows():
        yield unpacked(item["written"])


def _explained(error: BaseException) -> BaseException:
    """That generators are lost, where that is so; Ray Data wraps what happened several times over."""
    causes = [error]
    while (cause := getattr(causes[-1], "cause", None) or causes[-1].__cause__) is not None:
        causes.append(cause)
    if any(isinstance(cause, UserCodeException) for cause in causes):
        return error
    for cause in causes:
        if isinstance(cause, RayError) and not isinstance(cause, RayTaskError):
            return WorkerLost(f"a generator is gone ({in_a_line(cause)})")
    return error
