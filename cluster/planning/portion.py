"""How a run is laid out on workers, and what one of them holds of it."""

import math
from dataclasses import dataclass, replace

from pipeline.config import RunConfig
from pipeline.models.tracing import LayerTrace
from pipeline.planning.memory import Moment, Share, at_the_ends, measuring, moments, widest
from pipeline.planning.rates import Rates
from pipeline.planning.scope import Scope
from pipeline.runtime import resolve_ram
from pipeline.segments import Propagation


@dataclass(frozen=True)
class Choice:
    """How a run is laid out on workers; `num_shards` None is auto."""

    propagation: Propagation
    num_shards: int | None
    num_replicas: int
    num_workers: int

    @classmethod
    def of(cls, config: RunConfig, num_workers: int) -> "Choice":
        num_shards = None if config.cluster.num_shards == "auto" else config.cluster.num_shards
        if config.cluster.address == "none":
            # one process stands for all replicas
            return cls(config.pruning.propagation, num_shards, 1, 1)
        return cls(config.pruning.propagation, num_shards, config.cluster.num_replicas, num_workers)

    @property
    def num_fitting(self) -> int:
        """How many teams find room."""
        return max(1, self.num_workers // self.num_replicas)

    def within(self, scope: Scope) -> Scope:
        """The same run with this choice in it."""
        pruning = scope.config.pruning.model_copy(update={"propagation": self.propagation})
        shards = "auto" if self.num_shards is None else self.num_shards
        cluster = scope.config.cluster.model_copy(update={"num_shards": shards, "num_replicas": self.num_replicas})
        config = scope.config.model_copy(update={"pruning": pruning, "cluster": cluster})
        settled = {"num_replicas": self.num_replicas, "granularity": pruning.settle_granularity(None)}
        return replace(scope, config=config, resolved=scope.resolved.model_copy(update=settled))


@dataclass(frozen=True)
class Portion:
    """What one worker has of the windows: hidden states on a GPU, in RAM or in a file, and room for forwards that stand
    still."""

    num_windows: int
    gpu_hidden_bytes: int
    hidden_bytes: int
    spilled_bytes: int
    beside_bytes: float


def portion_of(scope: Scope, rates: Rates, choice: Choice) -> Portion:
    num_micro_batches = -(-scope.num_micro_batches // choice.num_replicas)
    return _portion(scope, rates, scope.hidden_bytes, num_micro_batches, choice.num_workers)


def portion_of_survey(scope: Scope, rates: Rates) -> Portion:
    """Of the one worker that an allocation is measured by: all windows, if it is run at all."""
    return _portion(scope, rates, scope.survey_hidden_bytes, scope.num_micro_batches, 1)


def _portion(scope: Scope, rates: Rates, of_all_bytes: int, num_micro_batches: int, num_sharing: int) -> Portion:
    hidden = of_all_bytes * num_micro_batches // scope.num_micro_batches
    runtime, ram_bytes = scope.config.runtime, math.inf
    if not isinstance(runtime.ram_bytes, str):
        ram_bytes = runtime.ram_bytes
    elif scope.config.cluster.is_here and rates.device == "cpu":
        ram_bytes = resolve_ram("auto", num_sharing)
    gpu_bytes = 0
    if rates.gpu_bytes is not None:
        gpu_bytes = rates.gpu_bytes // 2 if isinstance(runtime.gpu_bytes, str) else runtime.gpu_bytes
    on_gpu = hidden if hidden <= gpu_bytes else 0
    in_ram = hidden if on_gpu < hidden <= ram_bytes else 0
    beside = ram_bytes - in_ram if rates.gpu_bytes is None else gpu_bytes - on_gpu
    num_windows = min(num_micro_batches * scope.resolved.windows_per_micro_batch, scope.config.calibration.num_windows)
    return Portion(num_windows, on_gpu, in_ram, hidden - on_gpu - in_ram, beside)


def suspended(scope: Scope, trace: LayerTrace, portion: Portion) -> list[int]:
    """Bytes of all forwards of a single pass that stand before each group; 0 where there is no room for them."""
    if scope.resolved.granularity == "layer":
        return [0 for _ in trace.group_bytes]
    asked = [each * portion.num_windows for each in trace.group_bytes]
    return [each if each <= portion.beside_bytes else 0 for each in asked]


def memory_of(scope: Scope, rates: Rates, portion: Portion) -> tuple[Moment, Moment]:
    """Of the worker that holds most, when its host does and when its GPU does."""
    pruning = scope.config.pruning
    needs_inputs = pruning.method.statistic.needs_inputs
    worker = _share(scope, rates, portion, is_dense=needs_inputs and pruning.propagation == "dense")
    found = at_the_ends(scope.outside, worker) + _of_survey(scope, rates)
    # where nothing flows from layer to layer, each is read when its turn comes
    ahead = [*scope.traces[1:], None] if needs_inputs else [None for _ in scope.traces]
    for trace, before, following in zip(scope.traces, [None, *scope.traces[:-1]], ahead, strict=True):
        standing = tuple(suspended(scope, trace, portion)) if scope.resolved.granularity == "linear" else None
        found += moments(trace, before, following, pruning.method, replace(worker, suspended=standing))
    return widest(found)


def _of_survey(scope: Scope, rates: Rates) -> list[Moment]:
    statistic = scope.config.pruning.allocation.statistic
    if statistic is None:
        return []
    worker = _share(scope, rates, portion_of_survey(scope, rates), is_dense=False)
    found = at_the_ends(scope.outside, worker) if statistic.needs_inputs else []
    for trace, following in zip(scope.traces, [*scope.traces[1:], None], strict=True):
        found += measuring(trace, following, statistic, worker)
    return found


def _share(scope: Scope, rates: Rates, portion: Portion, is_dense: bool) -> Share:
    return Share(
        hidden_bytes=portion.hidden_bytes,
        gpu_hidden_bytes=portion.gpu_hidden_bytes,
        windows_per_micro_batch=min(scope.resolved.windows_per_micro_batch, portion.num_windows),
        window_length=scope.config.calibration.window_length,
        itemsize=scope.itemsize,
        base_bytes=rates.base_bytes,
        on_gpu=rates.device == "cuda",
        is_dense=is_dense,
    )
