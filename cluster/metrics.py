"""What a run tells Prometheus, through Ray, of which every node serves the metrics of its processes.

Ray puts `ray_` before each name, and `_total` after that of a counter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from cluster.submission import run_id
from pipeline.job import Job
from pipeline.methods import Method
from pipeline.store import Receipt

TAGS = ("run", "method")

GAUGES = {
    "shardprune_layers": "Layers of the model.",
    "shardprune_layers_done": "Layers committed, those of earlier attempts included.",
    "shardprune_sparsity": "Fraction of the weights of the committed layers that is pruned.",
    "shardprune_tokens_per_second": "Calibration tokens of the newest layer by the seconds it was pruned in.",
}
COUNTERS = {
    "shardprune_written_bytes": "Bytes of committed layers.",
    "shardprune_moved_bytes": "Bytes of activations that went from worker to worker.",
    "shardprune_damping_raised": "Linears that needed more damping than was asked for.",
    "shardprune_restarts": "Times that workers were lost and replaced.",
    "shardprune_layers_replayed": "Layers run again, unsolved, after a restart.",
}


@dataclass(frozen=True)
class Pruned:
    """Weights of committed layers, and how many of them are pruned."""

    num_weights: int = 0
    num_pruned: int = 0

    def __add__(self, other: "Pruned") -> "Pruned":
        return Pruned(self.num_weights + other.num_weights, self.num_pruned + other.num_pruned)

    @classmethod
    def of(cls, receipt: Receipt) -> "Pruned":
        return cls(
            sum(linear.num_weights for linear in receipt.linears), sum(linear.num_pruned for linear in receipt.linears)
        )


class RunMetrics:
    """The metrics of one attempt, told by its driver. Without a connection to Ray they go nowhere."""

    def __init__(self, job: Job, committed: Sequence[Receipt]) -> None:
        method = job.config.pruning.method
        self._damping = _most_damping(method)
        self._num_done, self._pruned = len(committed), sum(map(Pruned.of, committed), Pruned())
        self._metrics: dict[str, Any] = {}
        if ray.is_initialized():
            tags = {"run": run_id(job.config.output.path), "method": method.name}
            kinds = {Gauge: GAUGES, Counter: COUNTERS}
            for kind, descriptions in kinds.items():
                for name, description in descriptions.items():
                    self._metrics[name] = kind(name, description, TAGS).set_default_tags(tags)
        self._set("shardprune_layers", job.num_layers)
        self._set_progress()

    def on_layer(self, receipt: Receipt) -> None:
        """A layer is committed."""
        self._num_done += 1
        self._pruned += Pruned.of(receipt)
        self._set_progress()
        if receipt.num_tokens and receipt.seconds:
            self._set("shardprune_tokens_per_second", receipt.num_tokens / receipt.seconds)
        self._add("shardprune_written_bytes", receipt.num_bytes)
        self._add("shardprune_layers_replayed", receipt.num_layers_replayed)
        self._add("shardprune_damping_raised", num_dampings_raised(receipt, self._damping))

    def on_restart(self) -> None:
        """Workers were lost, and are replaced."""
        self._add("shardprune_restarts", 1)

    def on_moved(self, num_bytes: int) -> None:
        """Activations went from one worker to another."""
        self._add("shardprune_moved_bytes", num_bytes)

    def _set_progress(self) -> None:
        self._set("shardprune_layers_done", self._num_done)
        if self._pruned.num_weights:
            self._set("shardprune_sparsity", self._pruned.num_pruned / self._pruned.num_weights)

    def _set(self, name: str, value: float) -> None:
        if name in self._metrics:
            self._metrics[name].set(value)

    def _add(self, name: str, amount: int) -> None:
        # Ray takes nothing but increases
        if name in self._metrics and amount > 0:
            self._metrics[name].inc(amount)


def num_dampings_raised(receipt: Receipt, asked: float | None) -> int:
    """How many linears of a layer were solved with more damping than the method was given."""
    dampings = [linear.damping for linear in receipt.linears]
    return sum(asked is not None and damping is not None and damping > asked for damping in dampings)


def _most_damping(method: Method) -> float | None:
    """The damping a method was given, for its choice or for its refit, None where it needs none."""
    given = [getattr(method, name) for name in ("damping", "refit_damping") if hasattr(method, name)]
    return max(given, default=None)
