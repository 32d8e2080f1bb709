"""Prune one decoder layer, group by group: one factorisation and one sweep for linears that read the same input."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import Refusal
from pipeline.groups import Group
from pipeline.methods import Method
from pipeline.methods.pruned import Pruned
from pipeline.models.skeleton import Linear, LoadedLayer
from pipeline.replicas import Alone, Replicas
from pipeline.runtime import return_memory
from pipeline.settings import Settings
from pipeline.sparsity import Budget, Pattern

# Of a method that goes by rows, on a processor: what its cache holds with scores and masks.
WEIGHTS_AT_ONCE = 2**18


class LinearResult(Settings):
    """What became of one weight matrix; errors are relative, `error_kind` says measured on what."""

    name: str
    key: str
    pattern: str
    num_weights: int
    num_pruned: int
    num_zeros_in_source: int
    relative_error: float
    error_kind: str
    damping: float | None
    num_tokens: int
    seconds: float


def prune_layer(
    layer: LoadedLayer,
    groups: list[Group],
    method: Method,
    patterns: dict[str, Pattern],
    replicas: Replicas | None = None,
) -> list[LinearResult]:
    """Prune every linear of a layer in place, group by group; the statistics are released on the way.

    `patterns` has the pattern of each linear by its key. Where there are replicas, each prunes the groups that it owns
    and gets the others from them.
    """
    replicas = replicas or Alone(0)
    pruned: list[list[LinearResult]] = []
    given = [(group.linears, group.owner) for group in groups]
    while groups:
        group = groups.pop(0)
        pruned.append([])
        if replicas.does(group.owner):
            group.settle(layer)
            pruned[-1] = prune_group(layer, group, method, patterns)
    results = []
    for (linears, owner), mine in zip(given, pruned, strict=True):
        results += _shared(layer, linears, owner, mine, replicas)
    return results


def prune_group(layer: LoadedLayer, group: Group, method: Method, patterns: dict[str, Pattern]) -> list[LinearResult]:
    """Prune the linears of one group in place."""
    # what forwards have left behind is not held while a group is solved
    return_memory()
    if method.goes_by_rows:
        return [_prune_by_rows(layer, group, linear, method, patterns[linear.key]) for linear in group.linears]
    started = time.perf_counter()
    weight_OI = group.weight_OI(layer)
    pruned = _pruned(method, group, weight_OI, group.budget(patterns))
    seconds = time.perf_counter() - started
    return put_in_place(layer, group, method, weight_OI, pruned, patterns, seconds)


@contextmanager
def refused_where_unsolvable(group: Group) -> Iterator[None]:
    """Turns the ArithmeticError of a solver into a Refusal that names the tensor."""
    try:
        yield
    except ArithmeticError as error:
        raise Refusal(f"tensor {group.linears[0].key}: cannot be pruned, {error}; try model.dtype=float32") from None


def _shared(
    layer: LoadedLayer, linears: list[Linear], owner: int | None, mine: list[LinearResult], replicas: Replicas
) -> list[LinearResult]:
    if owner is None:
        return mine
    stored = [layer.stored[linear.key].to(layer.device, copy=True).contiguous() for linear in linears]
    known = replicas.share(stored, mine, owner)
    if not replicas.does(owner):
        for linear, tensor in zip(linears, stored, strict=True):
            layer.place(linear.key, f"{linear.name}.weight", tensor)
    return known


def put_in_place(
    layer: LoadedLayer,
    group: Group,
    method: Method,
    weight_OI: Tensor,
    pruned: Pruned,
    patterns: dict[str, Pattern],
    seconds: float,
) -> list[LinearResult]:
    """Replace the weights of a group, and say what became of each. `weight_OI` has them stacked, as they were."""
    num_rows = [linear.num_outputs for linear in group.linears]
    results = []
    parts = zip(group.linears, torch.split(weight_OI, num_rows), pruned.split(num_rows), strict=True)
    for linear, before, part in parts:
        layer.replace(linear, part.weight_OI)
        outcome = _Outcome(group, linear, method, patterns[linear.key])
        outcome.add(before, part, layer.weight_OI(linear))
        results.append(outcome.result(seconds * linear.num_outputs / sum(num_rows)))
    return results


def _prune_by_rows(layer: LoadedLayer, group: Group, linear: Linear, method: Method, pattern: Pattern) -> LinearResult:
    """Prune one linear in place, few rows at a time; on a GPU all."""
    outcome = _Outcome(group, linear, method, pattern)
    before_OI = layer.as_stored(linear)
    after_OI = torch.empty_like(before_OI)
    most = linear.num_outputs if before_OI.is_cuda else max(1, WEIGHTS_AT_ONCE // linear.num_inputs)
    first, seconds = 0, 0.0
    for num_alike, alike in pattern.of_rows(*before_OI.shape):
        for start in range(first, first + num_alike, most):
            rows = slice(start, min(start + most, first + num_alike))
            started = time.perf_counter()
            weight_rI = before_OI[rows].to(torch.float32)
            pruned = _pruned(method, group, weight_rI, Budget((alike,), (len(weight_rI),), (linear.name,)))
            seconds += time.perf_counter() - started
            after_OI[rows] = pruned.weight_OI
            outcome.add(weight_rI, pruned, after_OI[rows].to(torch.float32))
        first += num_alike
    layer.replace(linear, after_OI)
    return outcome.result(seconds)


def _pruned(method: Method, group: Group, weight_OI: Tensor, budget: Budget) -> Pruned:
    statistic: Any = group.statistic
    version = weight_OI._version
    with refused_where_unsolvable(group):
        pruned = method.prune(weight_OI, statistic, budget)
    assert weight_OI._version == version, f"{method.name} wrote into the weights that it was given"
    return pruned


class _Outcome:
    """What became of a linear, summed up over its rows; its damping is that of the last ones."""

    def __init__(self, group: Group, linear: Linear, method: Method, pattern: Pattern) -> None:
        self._linear, self._method, self._pattern = linear, method, pattern
        self._statistic: Any = group.statistic
        self._num_weights = self._num_pruned = self._num_zeros_in_source = 0
        self._change = self._whole = 0.0
        self._damping: float | None = None

    def add(self, before_rI: Tensor, pruned: Pruned, stored_rI: Tensor) -> None:
        """Some rows as they were, as the method has pruned them, and as that is stored, in float32."""
        after_rI, keep_rI, change_r = pruned.weight_OI, pruned.keep_OI, pruned.change_O
        # counted: any() is not vectorised for booleans
        assert not int((after_rI.bool() > keep_rI).count_nonzero()), (
            f"{self._method.name} left a pruned weight of {self._linear.key} that is not 0"
        )
        self._num_weights += keep_rI.numel()
        self._num_pruned += keep_rI.numel() - int(keep_rI.count_nonzero())
        self._num_zeros_in_source += before_rI.numel() - int(before_rI.count_nonzero())
        if change_r is not None:
            # to a change that is known, rounding adds what it does where columns are not correlated
            change_r = change_r + (stored_rI - after_rI).square_() @ self._statistic.sum_squares_I
        change, whole = self._statistic.errors(before_rI, stored_rI, change_r)
        self._change += change
        self._whole += whole
        self._damping = pruned.damping

    def result(self, seconds: float) -> LinearResult:
        """Of all rows. Raises Refusal where their outputs, or what is lost of them, are not finite."""
        if not math.isfinite(self._change + self._whole):
            raise Refusal(
                f"tensor {self._linear.key}: its outputs after pruning are out of all proportion; "
                "prune it by another method"
            )
        return LinearResult(
            name=self._linear.name,
            key=self._linear.key,
            pattern=str(self._pattern),
            num_weights=self._num_weights,
            num_pruned=self._num_pruned,
            num_zeros_in_source=self._num_zeros_in_source,
            relative_error=self._change / self._whole if self._whole > 0 else 0.0,
            error_kind=self._statistic.error_kind,
            damping=self._damping,
            num_tokens=self._statistic.num_tokens,
            seconds=seconds,
        )
