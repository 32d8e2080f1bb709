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
from pipeline.sparsity import Pattern


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
    started = time.perf_counter()
    statistic: Any = group.statistic
    weight_OI = group.weight_OI(layer)
    version = weight_OI._version
    with refused_where_unsolvable(group):
        pruned = method.prune(weight_OI, statistic, group.budget(patterns))
    assert weight_OI._version == version, f"{method.name} wrote into the weights that it was given"
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
    changes = [None] * len(num_rows) if pruned.change_O is None else torch.split(pruned.change_O, num_rows)
    results = []
    splits = (torch.split(tensor, num_rows) for tensor in (weight_OI, pruned.weight_OI, pruned.keep_OI))
    for linear, change, before, after, keep in zip(group.linears, changes, *splits, strict=True):
        layer.replace(linear, after)
        num_pruned = keep.numel() - int(keep.count_nonzero())
        assert not bool(((after != 0) > keep).any()), (
            f"{method.name} left a pruned weight of {linear.key} that is not 0"
        )
        relative_error = _relative_error(group.statistic, before, after, layer.weight_OI(linear), change)
        if not math.isfinite(relative_error):
            raise Refusal(
                f"tensor {linear.key}: its outputs after pruning are out of all proportion; prune it by another method"
            )
        results.append(
            LinearResult(
                name=linear.name,
                key=linear.key,
                pattern=str(patterns[linear.key]),
                num_weights=keep.numel(),
                num_pruned=num_pruned,
                num_zeros_in_source=before.numel() - int(before.count_nonzero()),
                relative_error=relative_error,
                error_kind=group.statistic.error_kind,
                damping=pruned.damping,
                num_tokens=group.statistic.num_tokens,
                seconds=seconds * linear.num_outputs / sum(num_rows),
            )
        )
    return results


def _relative_error(statistic: Any, before: Tensor, after: Tensor, stored: Tensor, change: Tensor | None) -> float:
    """Of what is stored. To a change that is known, rounding adds what it does where columns are not correlated."""
    if change is not None:
        change = change + (stored - after).square_() @ statistic.sum_squares_I
    return float(statistic.relative_error(before, stored, change))
